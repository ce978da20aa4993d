"""Rendered rooms as data for dense probes."""

import math
from itertools import combinations

import numpy as np

from theia.probing.cameras import Camera, Floats
from theia.probing.datasets import IMAGE_SIZE, DenseData, DenseSplit, Storage
from theia.probing.rendering import CLASSES, Box, Plane, Scene, Shape, Sphere, Thing, random_texture, render
from theia.utils.progress import Progress

_SPLITS = ("train", "val")


def scenes(train: int, val: int, storage: Storage, seed: int = 0) -> DenseData:
    """Rooms with five views each; rooms of the two splits differ. The same numbers give the same data.

    Args:
        train: Number of rooms that heads are fitted on.
        val: Number of rooms that they are tested on; all pairs of views of one room are matched.
        storage: Storage for the views.
        seed: Seed of the rooms.
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
    with Progress(f"rendering {name}", rooms, unit="room") as progress:
        for room in range(rooms):
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
            progress.advance(1)
    return DenseSplit(images, depth, normals, labels, cameras, pairs)


# Degrees around the room from the first camera: pairs fall into every bin of viewpoints.
AZIMUTHS = (0.0, 9.0, 26.0, 60.0, 140.0)

_FIELD_OF_VIEW = 60.0  # degrees
_REACH = 1.3  # metres from the middle to the centre of a thing
_TRIES = 100
_HEIGHTS = (0.6, 2.2)  # metres
_DISTANCES = (1.8, 2.8)  # metres from the middle
_AIM = 0.8  # metres that the cameras' aim is off the middle, at most


def random_room(random: np.random.Generator) -> Scene:
    """A closed room with four to seven balls and boxes that stand apart. Colours say nothing of what a thing is.

    Args:
        random: Generator that decides everything.
    """
    half_x, half_y = random.uniform(3.2, 4.2, 2)
    height = random.uniform(2.6, 3.4)
    planes = [
        ("floor", Plane(np.zeros(3), np.array([0.0, 0, 1]))),
        ("ceiling", Plane(np.array([0, 0, height]), np.array([0.0, 0, -1]))),
        ("wall", Plane(np.array([-half_x, 0, 0]), np.array([1.0, 0, 0]))),
        ("wall", Plane(np.array([half_x, 0, 0]), np.array([-1.0, 0, 0]))),
        ("wall", Plane(np.array([0, -half_y, 0]), np.array([0.0, 1, 0]))),
        ("wall", Plane(np.array([0, half_y, 0]), np.array([0.0, -1, 0]))),
    ]
    things = [
        Thing(shape, random_texture(random), CLASSES.index(name)) for name, shape in [*planes, *_furniture(random)]
    ]
    return Scene(things, np.array([*random.uniform(-1.5, 1.5, 2), height - 0.2]))


def cameras_around(random: np.random.Generator, size: int) -> list[Camera]:
    """One camera per azimuth, all looking at one place in the room, each from its own distance.

    Height and aim differ from room to room, so that a place in the picture alone does not tell how far away things are.

    Args:
        random: Generator that decides where the first camera stands, what all look at, and how little they differ.
        size: Width and height of the pictures, in pixels.
    """
    start = random.uniform(0, 360)
    height = random.uniform(*_HEIGHTS)
    aim = np.array([*random.uniform(-_AIM, _AIM, 2), random.uniform(0, 2 * _AIM)])
    found = []
    for azimuth in AZIMUTHS:
        angle = math.radians(start + azimuth + random.uniform(-2, 2))
        distance = random.uniform(*_DISTANCES)
        eye = np.array([distance * math.cos(angle), distance * math.sin(angle), height + random.uniform(-0.3, 0.3)])
        found.append(camera_at(eye, aim + random.uniform(-0.2, 0.2, 3), size))
    return found


def camera_at(eye: Floats, target: Floats, size: int) -> Camera:
    """A camera with a square picture of 60 degrees and its x axis level.

    Args:
        eye: Position of the camera.
        target: Point in the middle of the picture; not right above or below the eye.
        size: Width and height of the picture, in pixels.
    """
    ahead = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    to_world = np.eye(4)
    to_world[:3] = np.stack([right, np.cross(ahead, right), ahead, eye], 1)
    focal = size / 2 / math.tan(math.radians(_FIELD_OF_VIEW) / 2)
    return Camera(np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]), to_world, size, size)


def _furniture(random: np.random.Generator) -> list[tuple[str, Shape]]:
    found: list[tuple[str, Shape]] = []
    taken: list[tuple[Floats, float]] = []
    wanted = random.integers(4, 8)
    for _ in range(_TRIES):
        if len(found) == wanted:
            break
        place = random.uniform(-_REACH, _REACH, 2)
        half = random.uniform(0.15, 0.45, 3)
        is_ball = random.random() < 0.5
        room = float(half[0] if is_ball else np.linalg.norm(half[:2]))
        if np.linalg.norm(place) > _REACH or any(np.linalg.norm(place - at) < room + other for at, other in taken):
            continue
        taken.append((place, room))
        if is_ball:
            found.append(("sphere", Sphere(np.array([*place, half[0]]), float(half[0]))))
        else:
            found.append(("box", Box(np.array([*place, half[2]]), half, random.uniform(0, math.pi))))
    return found
