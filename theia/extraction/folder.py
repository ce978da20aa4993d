"""Images that are files in a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from theia.errors import ImageError
from theia.extraction.decode import read_image
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
            self.classes = sorted(
                path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
            )
            self.labels = _labels(root, names, self.classes)

    def read(self, index: int) -> Image.Image:
        """Reads one image; RGB.

        Raises:
            UnreadableImageError: If the file is gone or forbidden, or cannot be decoded.
            ImageError: If the file system fails.
        """
        return read_image(self._root / self.ids[index])


def list_files(root: Path) -> list[str]:
    """All files below a folder, at any depth, following links.

    Returns:
        Paths relative to ``root``, with ``/``, sorted. Hidden files and folders (``.git``, macOS's
        ``._a.jpg``) are left out.

    Raises:
        ImageError: If a folder cannot be listed, or is reached twice through links.
    """
    return sorted(_walk(root))


def _walk(root: Path) -> Iterator[str]:
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
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = "" if here == root else f"{here.relative_to(root).as_posix()}/"
        yield from (prefix + name for name in files if not name.startswith("."))


def _refuse(error: OSError) -> None:
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
