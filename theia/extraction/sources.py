"""Where images come from: a folder, a list, tar or parquet files, the hub, recordings, or sample photographs."""

import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from PIL import Image

from theia.errors import ConfigError, ImageError
from theia.extraction.images import UnreadableImageError, read_image
from theia.extraction.joined import join, split_name
from theia.extraction.parquet import HUB, PARQUET_ENDING, HubSource, ParquetSource, parquet_of_split
from theia.extraction.recordings import LEROBOT, VIDEO, open_recordings
from theia.extraction.remote import RemoteSource, is_remote
from theia.extraction.tars import TarSource
from theia.extraction.user_files import (
    COMPRESSED_TAR_ENDINGS,
    IMAGE_ENDINGS,
    TAR_ENDING,
    PassedOver,
    is_folder,
    open_regular,
)
from theia.types import Json

logger = logging.getLogger(__name__)

SAMPLE = "sample"
SAMPLE_COUNT = 640
_LIST_ENDING = ".txt"


class ImageSource(Protocol):
    """A fixed sequence of images.

    A source holds no open file, so that it can be pickled, and forked into worker processes.
    """

    @property
    def ids(self) -> Sequence[str]:
        """Sample ids, unique, in a fixed order."""

    @property
    def labels(self) -> Sequence[int] | None:
        """Class index of every image, or ``None``."""

    @property
    def classes(self) -> list[str] | None:
        """Class names by index, or ``None`` where they are not known."""

    @property
    def description(self) -> dict[str, Json]:
        """Record of the source: ``kind``, and what identifies it among others of its kind, wherever it lies."""

    def read(self, index: int) -> Image.Image:
        """Decodes one image; RGB, any size.

        Raises:
            UnreadableImageError: If this image alone cannot be read or decoded. The message is the reason.
            ImageError: If no image can be read, for instance because the file system fails.
        """


def has_recordings(location: str | Sequence[str]) -> bool:
    """Whether a place, or one of several, is of recordings, of which every k-th frame can be taken."""
    if isinstance(location, str):
        return location.startswith((f"{LEROBOT}:", f"{VIDEO}:"))
    return any(has_recordings(split_name(text)[1]) for text in location)


def open_source(location: str | Sequence[str], split: str, labels: bool = False, every: int = 1) -> ImageSource:
    """Opens images for extraction.

    Args:
        location: One or several (see :func:`theia.extraction.joined.join`) of

            - a folder of images, at any depth, in sorted order; the id is the path below the folder. With
              ``labels`` the folders right below it are the classes, in sorted order.
            - a ``.tar`` file or a folder of them, uncompressed; the id is ``<tar>/<member>``. With ``labels``
              the member ``a.cls`` holds the class of ``a.jpg`` as an integer, and of ``a.left.jpg``.
            - a folder of ``.parquet`` files as Hugging Face writes them, or one of them; the id is
              ``<file>/row-<row>``. Files that are named after splits are chosen by ``split``. With ``labels`` the
              column ``label`` holds the class.
            - ``hf:OWNER/NAME`` or ``hf:OWNER/NAME:SPLIT``: a set on the Hugging Face hub.
            - a ``.txt`` file with the path of an image in each line, relative to that file; the id is the path. With
              ``labels`` the first folders in the paths are the classes.
            - ``sample`` or ``sample:COUNT``: crops of photographs that come with scikit-image. A folder of that
              name is ``./sample``.
            - ``lerobot:FOLDER`` or ``lerobot:FOLDER#CAMERA``: frames of recorded robot episodes.
            - ``video:FOLDER``: frames of the videos in a folder, at any depth, or of one video.
            - a URL that fsspec opens, such as ``s3://BUCKET/FOLDER``, of image files or tar files.
        split: Split whose photographs ``sample`` shows. Of recordings, ``train`` has all but every fifth episode or
            video, and any other split has every fifth. Folders and tar files of images hold one split each.
        labels: Whether to read class labels.
        every: Distance between the frames that are taken of recordings.

    Files that are not read are logged in one line. A file that is named like an image but is not a regular file is
    listed as an image that cannot be read.

    Raises:
        ImageError: If the place does not exist or holds no image, tar files and images are mixed, a tar file is damaged
            or compressed, a name is not valid UTF-8, or labels are asked for and missing.
        TrajectoryError: If recorded episodes cannot be read.
        ConfigError: If a camera is not there, what reads recordings or parquet files is not installed, or ``every`` has
            no use.
    """
    if not isinstance(location, str):
        # Beside recordings, images are taken as they are.
        mixed = has_recordings(location)
        return join(
            location, lambda one: open_source(one, split, labels, 1 if mixed and not has_recordings(one) else every)
        )
    kind, colon, place = location.partition(":")
    if has_recordings(location):
        return open_recordings(kind, place, split, labels, every)
    if every != 1:
        raise ConfigError(f"--every is for recordings ({LEROBOT}: and {VIDEO}:), and {location} is none. Leave it out.")
    if kind == SAMPLE:
        return _open_sample(location, split, labels)
    if colon and kind == HUB:
        return HubSource(place, split, labels)
    path, _, column = location.partition("#")
    root = Path(location if Path(location).exists() else path)
    source: ImageSource
    passed_over = PassedOver()
    if is_remote(location):
        source = RemoteSource(location, labels, passed_over)
    elif is_folder(root, f"Give a folder of images, a .tar file or a folder of them, or {SAMPLE!r}."):
        source = _open_folder(root, split, labels, column or None, passed_over)
    elif root.suffix.lower() == TAR_ENDING:
        source = TarSource(root.parent, [root.name], labels, passed_over)
    elif root.suffix.lower() == PARQUET_ENDING:
        source = ParquetSource(root.parent, [root.name], column or None, labels)
    elif root.suffix.lower() == _LIST_ENDING:
        source = FolderSource(root.parent, _read_list(root), labels)
    else:
        raise ImageError(
            f"{root} is neither a folder nor a .tar, .parquet or {_LIST_ENDING} file. {_compressed_hint([root.name])}"
        )
    if not source.ids:
        there = f" There are: {passed_over}." if str(passed_over) else ""
        raise ImageError(
            f"No image in {location}.{there} Names that count end in {', '.join(IMAGE_ENDINGS)} (any case), or in .tar "
            "or .parquet for files that hold such; hidden ones do not. A tar file of tar files must be unpacked once."
        )
    _check_names(source.ids, location)
    if str(passed_over):
        level = logging.WARNING if passed_over.may_surprise else logging.INFO
        logger.log(level, "Passed over in %s: %s", location, passed_over)
    return source


def _open_folder(root: Path, split: str, labels: bool, column: str | None, passed_over: PassedOver) -> ImageSource:
    names = list_files(root, passed_over)
    images = [name for name in names if name.lower().endswith(IMAGE_ENDINGS)]
    tars = [name for name in names if name.lower().endswith(TAR_ENDING)]
    tables = [name for name in names if name.lower().endswith(PARQUET_ENDING)]
    compressed = [name for name in names if name.lower().endswith(COMPRESSED_TAR_ENDINGS)]
    if images and tars:
        raise ImageError(
            f"{root} holds both images ({images[0]}) and tar files ({tars[0]}). Point to a folder with one of the two."
        )
    if tables and (images or tars):
        raise ImageError(
            f"{root} holds both parquet files ({tables[0]}) and others ({(images or tars)[0]}). Point to a folder with "
            "one of the two."
        )
    if compressed and not images:
        raise ImageError(f"{root} holds compressed tar files ({compressed[0]}). {_compressed_hint(compressed)}")
    for name in names:
        if not name.lower().endswith((*IMAGE_ENDINGS, TAR_ENDING, PARQUET_ENDING)):
            passed_over.add(name)
    if tables:
        return ParquetSource(root, parquet_of_split(tables, split, root), column, labels)
    return TarSource(root, tars, labels, passed_over) if tars else FolderSource(root, images, labels)


def _read_list(path: Path) -> list[str]:
    """Paths in a text file, one in each line, without those that are empty."""
    try:
        with open_regular(path) as file:
            lines = file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{path} cannot be read as a list of images: {error}. It is text in UTF-8.") from error
    names = [line.strip() for line in lines if line.strip()]
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise ImageError(f"{path} names {repeated} twice. Every image counts once: remove one of the two lines.")
    return names


def _open_sample(location: str, split: str, labels: bool) -> ImageSource:
    _, colon, text = location.partition(":")
    count = int(text) if text.isdecimal() else 0 if colon else SAMPLE_COUNT
    if count < 1:
        raise ImageError(f"{location!r} asks for {text!r} sample crops. Give a number from 1, as in '{SAMPLE}:640'.")
    if labels:
        raise ImageError("The sample photographs have no labels. Extract without labels, or give a folder of classes.")
    return SampleSource(split, count)


def _compressed_hint(names: list[str]) -> str:
    if names[0].lower().endswith(COMPRESSED_TAR_ENDINGS):
        return "Images are read by offset, so decompress tar files first."
    return "Give the folder that holds it."


def _check_names(ids: Sequence[str], location: str) -> None:
    for sample_id in ids:
        try:
            sample_id.encode()
        except UnicodeEncodeError as error:
            raise ImageError(
                f"The name {sample_id!r} in {location} is not valid UTF-8 and cannot be a sample id. Rename it."
            ) from error


class FolderSource:
    """Image files below a folder.

    Args:
        root: The folder.
        names: Paths of the images relative to it, with ``/``: the sample ids.
        labels: Whether the folders right below ``root`` are classes, numbered in sorted order.

    Raises:
        ImageError: If labels are asked for and an image lies in no sub-folder.
    """

    def __init__(self, root: Path, names: list[str], labels: bool) -> None:
        self.ids = names
        self.classes: list[str] | None = None
        self.labels: list[int] | None = None
        self.description: dict[str, Json] = {"kind": "folder", "name": root.resolve().name}
        self._root = root
        if labels:
            # Folders without an image count, too: two splits with the same folders number their classes alike.
            _, folders, _ = next(os.walk(root, onerror=_refuse))
            self.classes = sorted(name for name in folders if not name.startswith("."))
            self.labels = _labels(root, names, self.classes)

    def read(self, index: int) -> Image.Image:
        """Reads one image; RGB.

        Raises:
            UnreadableImageError: If the file is missing, forbidden or not a regular one, or cannot be decoded.
            ImageError: If the file system fails.
        """
        try:
            return read_image(self._root / self.ids[index])
        except UnreadableImageError as error:
            # An unmounted disk leaves no folder, or an empty one; then the missing file is not at fault.
            if isinstance(error.__cause__, OSError) and _is_gone(self._root):
                raise ImageError(
                    f"The folder {self._root} is gone or empty: {self.ids[index]} {error}. Bring it back and run the "
                    "same command again; whole shards are kept."
                ) from error
            raise


def list_files(root: Path, passed_over: PassedOver) -> list[str]:
    """Lists all files below a folder, at any depth, following links.

    Args:
        root: The folder.
        passed_over: Counter of the hidden files and folders.

    Returns:
        Paths relative to ``root``, with ``/``, sorted. Hidden files and folders (``.git``, macOS's ``._a.jpg``) are
        left out; files that are not regular ones are included.

    Raises:
        ImageError: If a folder cannot be listed, or is reached twice through links.
    """
    return sorted(_walk(root, passed_over))


def _walk(root: Path, passed_over: PassedOver) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_refuse):
        here = Path(folder)
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            raise ImageError(
                f"Folder {here} is reached twice through symbolic links, so its images would count twice. "
                "Remove the link, or point to a folder without one."
            )
        seen.add((status.st_dev, status.st_ino))
        prefix = "" if here == root else f"{here.relative_to(root).as_posix()}/"
        for name in subfolders:
            if name.startswith("."):
                passed_over.add_kind("hidden folder", prefix + name)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                passed_over.add_kind("hidden", prefix + name)
            else:
                yield prefix + name


def _is_gone(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _refuse(error: OSError) -> NoReturn:
    # Unless told otherwise, os.walk silently passes over a folder that cannot be listed.
    raise ImageError(f"Folder {error.filename} cannot be listed: {error.strerror}. Correct its permissions.") from error


def _labels(root: Path, names: list[str], classes: list[str]) -> list[int]:
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for name in names:
        folder, slash, _ = name.partition("/")
        if not slash:
            raise ImageError(
                f"Labels were asked for, but {root / name} lies in no sub-folder: the folders right below "
                f"{root} are the classes. Move it into one, or extract without labels."
            )
        labels.append(numbers[folder])
    return labels


# Loaders of skimage.data by the names used here. Drawings, scans of text, and pictures under 256 pixels are left out.
TRAIN_PHOTOS = {
    "astronaut": "astronaut",
    "motorcycle_left": "stereo_motorcycle",
    "motorcycle_right": "stereo_motorcycle",
    "hubble": "hubble_deep_field",
    "ihc": "immunohistochemistry",
    "retina": "retina",
    "moon": "moon",
    "clock": "clock",
    "coins": "coins",
    "brick": "brick",
    "grass": "grass",
    "gravel": "gravel",
}
HELD_OUT_PHOTOS = {"chelsea": "chelsea", "coffee": "coffee", "rocket": "rocket", "camera": "camera"}

_SIDE_RANGE = (0.3, 1.0)  # as shares of the photograph's short edge
_MIN_SIDE = 64  # pixels


class SampleSource:
    """Square crops of real photographs, the same in every process and on every machine.

    Crop ``i`` shows photograph ``i % n``. The first ``n`` are the largest centred squares; the later ones have
    a random place and side, and half of them are mirrored.

    Args:
        split: ``"train"`` has its own photographs; every other split shows the held-out ones.
        count: Number of crops.
    """

    def __init__(self, split: str, count: int) -> None:
        self._photos = list(TRAIN_PHOTOS if split == "train" else HELD_OUT_PHOTOS)
        self._split = split
        self.ids = [f"{self._photo(index)}/crop-{index:05d}" for index in range(count)]
        self.labels: list[int] | None = None
        self.classes: list[str] | None = None
        self.description: dict[str, Json] = {"kind": "sample", "photographs": [*self._photos], "crops": count}

    def read(self, index: int) -> Image.Image:
        """Makes one crop; RGB, square."""
        photo = _load(self._photo(index))
        short = min(photo.size)
        if index < len(self._photos):
            left, top = (photo.width - short) // 2, (photo.height - short) // 2
            return photo.crop((left, top, left + short, top + short))
        # Seeded with text: for text the standard library keeps the stream the same across versions and processes.
        rng = random.Random(f"{self._split}/{index}")
        side = max(_MIN_SIDE, round(short * rng.uniform(*_SIDE_RANGE)))
        left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        crop = photo.crop((left, top, left + side, top + side))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop

    def _photo(self, index: int) -> str:
        return self._photos[index % len(self._photos)]


@cache
def _load(photo: str) -> Image.Image:
    # Importing scikit-image takes long, and other image sources do not need it.
    import skimage.data

    loaded: Any = getattr(skimage.data, (TRAIN_PHOTOS | HELD_OUT_PHOTOS)[photo])()
    if photo.startswith("motorcycle"):
        left, right, _disparity = loaded
        loaded = left if photo == "motorcycle_left" else right
    return Image.fromarray(np.asarray(loaded)).convert("RGB")
