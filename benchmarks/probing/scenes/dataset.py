"""Rendered rooms as data for dense probes."""

from itertools import combinations

import numpy as np
from tqdm import tqdm

from benchmarks.probing.camera import Camera
from benchmarks.probing.data import IMAGE_SIZE, DenseData, DenseSplit
from benchmarks.probing.scenes.render import CLASSES, render
from benchmarks.probing.scenes.rooms import AZIMUTHS, cameras_around, random_room
from benchmarks.probing.storage import Storage

_SPLITS = ("train", "val")


def scenes(train: int, val: int, storage: Storage, seed: int = 0) -> DenseData:
    """Rooms with five views each; rooms of the two splits differ. The same numbers give the same data.

    Args:
        train: How many rooms heads are fitted on.
        val: How many they are tested on; all pairs of views of one room are matched.
        storage: Where to keep the views.
        seed: Another gives other rooms.
    """
    found = {name: _split(name, count, storage, seed) for name, count in zip(_SPLITS, (train, val), strict=True)}
    views = len(AZIMUTHS)
    return DenseData(**found, classes=CLASSES, description=f"scenes, seed {seed}: {train}+{val} rooms of {views} views")


def _split(name: str, rooms: int, storage: Storage, seed: int) -> DenseSplit:
    views, size = len(AZIMUTHS), IMAGE_SIZE
    count = rooms * views
    images = storage.empty((count, 3, size, size), np.uint8)
    depth = storage.empty((count, size, size), np.float32)
    normals = storage.empty((count, 3, size, size), np.float32)
    labels = storage.empty((count, size, size), np.uint8)
    cameras: list[Camera] = []
    pairs: list[tuple[int, int]] = []
    for room in tqdm(range(rooms), desc=f"rendering {name}", unit="room"):
        # A room is the same however many others there are.
        random = np.random.default_rng([seed, _SPLITS.index(name), room])
        scene = random_room(random)
        first = len(cameras)
        for camera in cameras_around(random, size):
            place = len(cameras)
            view = render(scene, camera)
            images[place], depth[place], normals[place], labels[place] = (
                view.image, view.depth, view.normals, view.labels,
            )  # fmt: skip
            cameras.append(camera)
        pairs += combinations(range(first, len(cameras)), 2)
    return DenseSplit(images, depth, normals, labels, cameras, pairs)
