"""Data for dense probes: pictures, the true maps of their pixels, and cameras, read from a folder and checked."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from theia.errors import ConfigError, ImageError
from theia.extraction.images import UnreadableImageError, read_image, to_square
from theia.extraction.user_files import open_regular
from theia.probing.cameras import Camera
from theia.probing.dense_metrics import IGNORED
from theia.utils.files import allocate, writing
from theia.utils.progress import Progress

Task = Literal["depth", "normals", "segmentation", "correspondence"]
TASKS: tuple[Task, ...] = ("depth", "normals", "segmentation", "correspondence")

IMAGE_SIZE = 224  # pixels along each side of every picture and map
MAX_DEPTH = 10.0  # metres: heads are not fitted to what is farther, nor judged by it


class Storage:
    """Gives arrays: in memory, or in files of a folder that are mapped into memory.

    Args:
        folder: Folder for the files; ``None`` keeps arrays in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array whose values are not set.

        Raises:
            FileError: If the disk is full.
        """
        if self._folder is None:
            return np.empty(shape, dtype)
        path = self._folder / f"{next(self._numbers)}.npy"
        with writing(path):
            array: NDArray[Any] = np.lib.format.open_memmap(path, "w+", dtype, tuple(shape))
            allocate(path)
        return array


@contextmanager
def temporary(on_disk: bool, folder: Path | None) -> Iterator[Storage]:
    """Gives a storage whose files are deleted when the block ends.

    Args:
        on_disk: Whether to map files; memory otherwise.
        folder: Folder to put them in; the system's temporary folder by default.
    """
    if not on_disk:
        yield Storage()
        return
    with TemporaryDirectory(prefix="theia-probing-", dir=folder) as files:
        yield Storage(Path(files))


@dataclass(frozen=True)
class DenseSplit:
    """A split; what is not known is ``None``. ``S`` is :data:`IMAGE_SIZE`.

    Attributes:
        images: RGB, uint8, shape ``(n, 3, S, S)``.
        depth: Depth in metres along the optical axis, float32, shape ``(n, S, S)``; 0 where it is not known.
        normals: Surface normals of unit length, float32, shape ``(n, 3, S, S)``; zero where it is not known.
        labels: Class indices, uint8, shape ``(n, S, S)``; 255 where they do not count.
        cameras: Camera of each picture.
        pairs: Indices of the two pictures of each pair, which show the same scene.
    """

    images: NDArray[np.uint8]
    depth: NDArray[np.float32] | None = None
    normals: NDArray[np.float32] | None = None
    labels: NDArray[np.uint8] | None = None
    cameras: Sequence[Camera] | None = None
    pairs: Sequence[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class DenseData:
    """What dense probes are trained and tested on.

    Attributes:
        train: Split that heads are fitted on.
        val: Split that figures are measured on.
        classes: Names of the classes of ``labels``, or as many numbers.
        description: Description of the data, for the record.
    """

    train: DenseSplit
    val: DenseSplit
    classes: Sequence[str]
    description: str


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
        root: Folder in the layout that ``docs/probing.md`` shows.
        tasks: Tasks that will be probed; maps of other tasks are not read.
        storage: Where to keep what is read.

    Raises:
        ImageError: If files are missing, cannot be read, or are not what they must be. The message names the first.
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
    with Progress(f"reading {split.name}", count) as progress:
        for place, name in enumerate(names):
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
            progress.advance(1)
    return DenseSplit(images, depth, normals, labels)


def _check_known(split: Path, found: DenseSplit, tasks: Sequence[Task]) -> None:
    """Refuses a split of which nothing is known: there would be nothing to learn, and no figure."""
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


_MODES = {"depth": ("I;16", "I;16B", "I"), "normals": ("RGB",), "labels": ("L", "P")}


def check_maps(split: Path, names: Sequence[str], maps: Sequence[str]) -> None:
    """Looks at the headers of all maps, so that nothing is missed after hours of work.

    Args:
        split: Folder that holds ``rgb`` and the folders of maps.
        names: File names of the pictures.
        maps: Kinds of maps: any of ``depth``, ``normals`` and ``labels``.

    Raises:
        ImageError: If one is missing, cannot be read, or is of another size than its picture,
            or its pixels are not what its kind needs.
    """
    for kind in maps:
        missing = [name for name in names if not path_of(split, kind, name).is_file()]
        if missing:
            others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
            raise ImageError(f"{path_of(split, kind, missing[0])} is missing{others}: rgb has {missing[0]}.")
        for name in names:
            size, _ = header(split / "rgb" / name)
            map_size, mode = header(path_of(split, kind, name))
            if map_size != size:
                raise ImageError(
                    f"{path_of(split, kind, name)} is {size_text(map_size)}, but its picture is {size_text(size)}."
                )
            if mode not in _MODES[kind]:
                raise ImageError(
                    f"{path_of(split, kind, name)} has pixels of mode {mode!r}; depth must have 16 bits of "
                    "millimetres, normals RGB, labels 8 bits of class indices."
                )


def header(path: Path) -> tuple[tuple[int, int], str]:
    """Width and height of an image file, and Pillow's mode of its pixels.

    Raises:
        ImageError: If it cannot be read.
    """
    with _opened(path) as image:
        return image.size, image.mode


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with open_regular(path) as file, Image.open(file) as image:
            yield image
    except (OSError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be read: {error}. Remove or replace it.") from error


def nearest_values(path: Path) -> NDArray[np.float32]:
    """Reads a map and resizes it to the square of the pictures, by nearest neighbours.

    Returns:
        Shape ``(S, S)`` or ``(S, S, 3)``.

    Raises:
        ImageError: If it cannot be read.
    """
    with _opened(path) as image:
        values = np.asarray(image)
    rows, columns = (((np.arange(IMAGE_SIZE) + 0.5) * edge / IMAGE_SIZE).astype(int) for edge in values.shape[:2])
    found: NDArray[np.float32] = values[rows][:, columns].astype(np.float32)
    return found


def unit_vectors(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit normals ``(3, S, S)`` from colours of 0 to 255 ``(S, S, 3)``; zero where the length is far from 1."""
    vectors = (colours / 127.5 - 1).transpose(2, 0, 1)
    length = np.linalg.norm(vectors, axis=0)
    # 8 bits put a unit vector off by a hundredth; black has a length of 1.7.
    known = (length > 0.5) & (length < 1.5)
    return np.where(known, vectors / np.where(known, length, 1), 0).astype(np.float32)


def path_of(split: Path, kind: str, name: str, ending: str = ".png") -> Path:
    """The file of a kind that belongs to a picture."""
    return split / kind / (Path(name).stem + ending)


def size_text(shape: Sequence[int]) -> str:
    """Such as ``640x480``."""
    return "x".join(map(str, shape))


def fingerprint(*parts: object) -> str:
    """Digest of arrays and of values that JSON can hold; it differs if one of them does."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()


def of_data(data: DenseData) -> str:
    """Fingerprint of all pictures, maps, cameras and pairs."""
    parts: list[object] = [list(data.classes)]
    for split in (data.train, data.val):
        parts += [values for values in (split.images, split.depth, split.normals, split.labels) if values is not None]
        parts += [array for camera in split.cameras or () for array in (camera.intrinsics, camera.to_world)]
        parts.append([list(pair) for pair in split.pairs])
    return fingerprint(*parts)


def of_files(*roots: str | None) -> str:
    """Fingerprint of sizes and times of files, and of all files in folders with their paths in them.

    It does not depend on where a folder lies, nor on how its path is spelt.
    """
    every = [(root, path) for root in roots if root for path in [Path(root), *sorted(Path(root).rglob("*"))]]
    files = [(str(path.relative_to(root)), path.stat()) for root, path in every if path.is_file()]
    return fingerprint([[name, found.st_size, found.st_mtime_ns] for name, found in files])


def read_cameras(split: Path, names: Sequence[str]) -> tuple[list[Camera], list[tuple[int, int]]]:
    """Reads poses, intrinsics and pairs.

    Args:
        split: Folder that holds ``rgb``, ``pose``, ``intrinsics.txt`` and ``pairs.txt``.
        names: File names of the pictures.

    Returns:
        The camera of each picture, and the indices of the two pictures of each pair.

    Raises:
        ImageError: If a file is missing or does not hold what it must. The message names it.
    """
    intrinsics = _matrix(split / "intrinsics.txt")[:3, :3]
    if min(intrinsics[0, 0], intrinsics[1, 1], intrinsics[2, 2]) <= 0:
        raise ImageError(f"{split / 'intrinsics.txt'} has no focal lengths above zero. Write fx 0 cx, 0 fy cy, 0 0 1.")
    cameras = []
    for name in names:
        (width, height), _ = header(split / "rgb" / name)
        cameras.append(Camera(intrinsics, _matrix(path_of(split, "pose", name, ".txt"), 4), width, height))
    places = {known: place for place, name in enumerate(names) for known in (name, Path(name).stem)}
    pairs = []
    for number, line in enumerate((split / "pairs.txt").read_text().splitlines(), 1):
        pair = line.split()
        if not pair:
            continue
        if len(pair) != 2 or not all(name in places for name in pair):
            raise ImageError(f"{split / 'pairs.txt'}, line {number}: {line!r} is not two names of pictures in rgb.")
        pairs.append((places[pair[0]], places[pair[1]]))
    if not pairs:
        raise ImageError(f"{split / 'pairs.txt'} has no pair. Write two names of pictures a line.")
    return cameras, pairs


def _matrix(path: Path, least: int = 3) -> NDArray[np.float64]:
    try:
        found: NDArray[np.float64] = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be read: {error}") from error
    if min(found.shape) < least or not np.isfinite(found).all():
        raise ImageError(f"{path} holds no finite matrix of {least}x{least}, but {size_text(found.shape)}.")
    return found
