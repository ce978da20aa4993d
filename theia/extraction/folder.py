"""Images that are files in a folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from PIL import Image

from theia.errors import ImageError
from theia.extraction.decode import UnreadableImageError, read_image
from theia.extraction.passed_over import PassedOver
from theia.types import Json


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
            # Also those without an image: two splits with the same folders number their classes alike.
            _, folders, _ = next(os.walk(root, onerror=_refuse))
            self.classes = sorted(name for name in folders if not name.startswith("."))
            self.labels = _labels(root, names, self.classes)

    def read(self, index: int) -> Image.Image:
        """Reads one image; RGB.

        Raises:
            UnreadableImageError: If the file is gone, forbidden or not a regular one, or cannot be decoded.
            ImageError: If the file system fails.
        """
        try:
            return read_image(self._root / self.ids[index])
        except UnreadableImageError as error:
            # A disk that was unmounted leaves no folder, or an empty one; then it is not this file that is gone.
            if isinstance(error.__cause__, OSError) and _is_gone(self._root):
                raise ImageError(
                    f"The folder {self._root} is gone or empty: {self.ids[index]} {error}. Bring it back and run the "
                    "same command again; whole shards are kept."
                ) from error
            raise


def list_files(root: Path, passed_over: PassedOver) -> list[str]:
    """All files below a folder, at any depth, following links.

    Args:
        root: The folder.
        passed_over: Counts the hidden files and folders.

    Returns:
        Paths relative to ``root``, with ``/``, sorted. Hidden files and folders (``.git``, macOS's
        ``._a.jpg``) are left out; what is not a regular file is not.

    Raises:
        ImageError: If a folder cannot be listed, or is reached twice through links.
    """
    return sorted(_walk(root, passed_over))


def _walk(root: Path, passed_over: PassedOver) -> Iterator[str]:
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_refuse):
        here = Path(folder)
        try:
            status = here.stat()
        except OSError as error:
            _refuse(error)
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
    # os.walk passes over such a folder in silence unless told otherwise.
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
