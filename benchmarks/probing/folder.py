"""Pictures with depth, normals, classes and camera poses in a folder, as NYU Depth and ScanNet are often kept.

```
DATA/train/ and DATA/val/, each with
    rgb/NAME.png          or .jpg: every picture; sizes may differ
    depth/NAME.png        16 bits: millimetres along the optical axis; 0: not known; depth is told up to 10 m
    normals/NAME.png      8-bit RGB: 255 (n + 1) / 2 of the unit normal n in any axes; black or mid-grey: not known
    labels/NAME.png       8 bits: class index; 255 does not count
    pose/NAME.txt         camera to world, 4x4, metres; x to the right, y down, z ahead
    intrinsics.txt        3x3 (or 4x4, of which the upper left counts), in pixels of the pictures
    pairs.txt             two names a line: pictures to match
```

``rgb`` is needed, and what the chosen tasks look at: depth, normals, labels; for correspondence, of ``val`` alone,
depth, pose, intrinsics.txt and pairs.txt. A map has the size of its picture. Pictures are squashed to a square as in an
extraction, maps are read at the pixel that is nearest, so that no value is mixed with another across an edge.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.probing.data import IMAGE_SIZE, MAX_DEPTH, TASKS, DenseData, DenseSplit, Task
from benchmarks.probing.maps import check_maps, nearest_values, path_of, unit_vectors
from benchmarks.probing.poses import read_cameras
from benchmarks.probing.segmentation_metrics import IGNORED
from benchmarks.probing.storage import Storage
from theia.errors import ConfigError, ImageError
from theia.extraction.decode import UnreadableImageError, read_image, to_square

_ENDINGS = (".png", ".jpg", ".jpeg")
_MAPS: dict[Task, str] = {"depth": "depth", "normals": "normals", "segmentation": "labels"}
_POSES = ("depth", "pose", "intrinsics.txt", "pairs.txt")


def tasks_of(root: Path) -> list[Task]:
    """Tasks that a folder has data for.

    Raises:
        ImageError: If there are none.
    """
    found = [task for task in TASKS if all((root / name).exists() for name in _needed(task))]
    if not found:
        raise ImageError(
            f"{root} has no data to probe. There must be folders train and val, each with rgb and at least one of "
            "depth, normals, labels; for correspondence val needs depth, pose, intrinsics.txt and pairs.txt."
        )
    return found


def open_folder(root: Path, tasks: Sequence[Task], storage: Storage) -> DenseData:
    """Checks all files of a folder, then reads them.

    Args:
        root: Laid out as this module says.
        tasks: What will be probed: other maps are not read.
        storage: Where to keep what is read.

    Raises:
        ImageError: If files are missing, cannot be read, or are not what they must be; names the first.
        ConfigError: If the labels of training are of one class, or those of val of none; or a split has no depth up to
            10 m, or no normal.
    """
    for task in tasks:
        for name in _needed(task):
            if not (root / name).exists():
                raise ImageError(
                    f"--tasks {task} needs {root / name}, and there is none. Leave the task out, or add it."
                )
    maps = [_MAPS[task] for task in tasks if task in _MAPS]
    matched = "correspondence" in tasks
    val_maps = list(dict.fromkeys([*maps, "depth"] if matched else maps))
    # Without a head there is nothing to train.
    names = {split: _names(root / split) for split in (("train", "val") if maps else ("val",))}
    if len(names.get("train", names["val"])) < 2:
        raise ImageError(f"{root} has one picture; a head is fitted on two or more, and a match needs two.")
    for split, files in names.items():
        check_maps(root / split, files, maps if split == "train" else val_maps)
    cameras, pairs = read_cameras(root / "val", names["val"]) if matched else (None, [])
    val = replace(_read(root / "val", names["val"], val_maps, storage), cameras=cameras, pairs=pairs)
    train = _read(root / "train", names["train"], maps, storage) if maps else val
    for split, found in (("train", train), ("val", val)):
        _check_known(root / split, found, tasks)
    counts = ", ".join(f"{len(files)} {split}" for split, files in names.items())
    return DenseData(train, val, _classes(train, val), f"{root.resolve().name}: {counts}")


def _needed(task: Task) -> list[str]:
    if task == "correspondence":
        return [f"val/{name}" for name in ("rgb", *_POSES)]
    return [f"{split}/{kind}" for split in ("train", "val") for kind in ("rgb", _MAPS[task])]


def _names(split: Path) -> list[str]:
    """File names of the pictures, sorted."""
    folder = split / "rgb"
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and path.name[0] != ".")
    if not found:
        raise ImageError(f"No picture in {folder}: names that count end in {', '.join(_ENDINGS)}.")
    stems: dict[str, str] = {}
    for name in found:
        other = stems.setdefault(Path(name).stem, name)
        if other != name:
            raise ImageError(f"{folder} holds {other} and {name}, whose maps would be the same. Keep one.")
    return found


def _read(split: Path, names: Sequence[str], maps: Sequence[str], storage: Storage) -> DenseSplit:
    count, size = len(names), IMAGE_SIZE
    images = storage.empty((count, 3, size, size), np.uint8)
    depth = storage.empty((count, size, size), np.float32) if "depth" in maps else None
    normals = storage.empty((count, 3, size, size), np.float32) if "normals" in maps else None
    labels = storage.empty((count, size, size), np.uint8) if "labels" in maps else None
    for place, name in enumerate(tqdm(names, desc=f"reading {split.name}", unit="image")):
        try:
            images[place] = to_square(read_image(split / "rgb" / name), size, "squash")
        except UnreadableImageError as error:
            raise ImageError(f"{split / 'rgb' / name} {error}. Remove or replace it.") from error
        if depth is not None:
            depth[place] = nearest_values(path_of(split, "depth", name)) / 1000
        if normals is not None:
            normals[place] = unit_vectors(nearest_values(path_of(split, "normals", name)))
        if labels is not None:
            labels[place] = nearest_values(path_of(split, "labels", name))
    return DenseSplit(images, depth, normals, labels)


def _check_known(split: Path, found: DenseSplit, tasks: Sequence[Task]) -> None:
    """Where nothing is known there is nothing to learn, and no figure."""
    if "depth" in tasks and found.depth is not None:
        deepest = max(float(depth.max()) for depth in found.depth)
        if not any(((depth > 0) & (depth <= MAX_DEPTH)).any() for depth in found.depth):
            raise ConfigError(
                f"{split / 'depth'} has no pixel of more than 0 and at most {MAX_DEPTH:g} m, which is what counts; the "
                f"greatest is {deepest:g} m. Files hold millimetres: are these of another unit?"
            )
    if "normals" in tasks and found.normals is not None and not any(normals.any() for normals in found.normals):
        raise ConfigError(
            f"{split / 'normals'} has no known normal: colours must be 255 (n + 1) / 2 of a vector n whose length is 1 "
            "(0.5 to 1.5 counts)."
        )


def _classes(train: DenseSplit, val: DenseSplit) -> list[str]:
    if train.labels is None or val.labels is None:
        return []
    seen, met = (set(np.unique(labels).tolist()) - {IGNORED} for labels in (train.labels, val.labels))
    if len(seen) < 2 or not met:
        raise ConfigError(
            f"The labels of train are of {len(seen)} classes and those of val of {len(met)}; 255 does not count. "
            "Training needs two or more, and there must be something to test."
        )
    # A class that only val has is never told right, and counts as such.
    return [str(number) for number in range(max(seen | met) + 1)]
