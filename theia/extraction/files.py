"""Files as users keep them: which may be opened, whose fault it is if one cannot be, and which are passed over."""

import errno
import os
import stat
from collections import Counter
from pathlib import Path
from typing import BinaryIO, Literal

from theia.errors import ImageError

# File names that count as images, in lower case.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

# What the system says of one odd file: it would say so on any disk, and says it again tomorrow. Anything else (EIO,
# ESTALE, ETIMEDOUT, EMFILE, ENOMEM, ...) is said of the disk, the network or this process: trying again may help, and
# no image must be written off for it.
_FAULTS_OF_ONE_FILE = frozenset(
    {
        errno.ENOENT,  # gone since it was listed, or a link to nothing
        errno.ELOOP,  # a link to itself, or links in a circle
        errno.ENOTDIR,  # a link through a file as if that were a folder
        errno.ENAMETOOLONG,  # a link to a name that no file can have
        errno.EACCES,  # forbidden
        errno.EPERM,  # likewise
        errno.EISDIR,  # replaced by a folder
        errno.ENXIO,  # replaced by a socket, or by a device that is not there
        errno.ENODEV,  # likewise
    }
)

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class IrregularFileError(OSError):
    """Not a regular file but a folder, FIFO, socket or device."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, and never waits for one of another kind.

    Args:
        path: The file, or a link to it.

    Raises:
        IrregularFileError: If it is of another kind.
        OSError: If the system refuses.
    """
    # Opening alone may do something to a device.
    _check_regular(path.stat())
    # What the path leads to may have changed since: opened without waiting, a FIFO is found out.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb")
    try:
        _check_regular(os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def is_fault_of_one_file(error: OSError) -> bool:
    """Whether an error is about the file alone, so that others are worth reading."""
    return isinstance(error, IrregularFileError) or error.errno in _FAULTS_OF_ONE_FILE


def was_never_a_file(error: OSError) -> bool:
    """Whether no content can be missing where this error was met: another kind of file, or links in a circle."""
    return isinstance(error, IrregularFileError) or error.errno == errno.ELOOP


def reason(path: Path, error: OSError) -> str:
    """What the system said of a file, and where a link leads: of a target that is gone it names the link alone."""
    try:
        return f"{error} (a link to {path.readlink()})"
    except OSError:
        return str(error)


def is_folder(place: Path, wanted: str) -> bool:
    """Whether a place that a user gave is a folder; it is a regular file otherwise.

    Args:
        place: The place.
        wanted: A sentence for the message that says what to give.

    Raises:
        ImageError: If nothing is there, or something that is neither, or the system does not tell.
    """
    try:
        status = place.stat()
        if stat.S_ISDIR(status.st_mode):
            return True
        _check_regular(status)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not place.is_symlink():
            raise ImageError(f"There is no {place}. {wanted}") from error
        raise ImageError(f"{place} cannot be read: {reason(place, error)}. {wanted}") from error
    return False


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise IrregularFileError(f"{_KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, not a regular file")


TAR_ENDING = ".tar"
COMPRESSED_TAR_ENDINGS = (".tgz", ".tbz", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")

# Endings that a user may well take for those of images, and what to know of them. JPEGs by other endings are not read
# either: ids are made of the list, and no store that was begun without them could be continued.
_EXPLAINED = (
    (
        (".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".ico", ".tga", ".psd", ".exr", ".hdr",
         ".ppm", ".pgm", ".pnm", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
        "not JPEG, PNG, WebP, BMP or TIFF",
    ),
    ((".jfif", ".jif", ".jpe", ".pjpeg", ".pjp"), "JPEG by another ending: rename to .jpg"),
    (COMPRESSED_TAR_ENDINGS, "compressed: decompress first"),
)  # fmt: skip
_SURPRISING = tuple(ending for endings, _ in _EXPLAINED for ending in endings)
_SHOWN = 4  # endings that nobody takes for those of images

PassedKind = Literal["parent", "hidden", "hidden folder", "replaced"]
_SAID: dict[PassedKind, str] = {
    "parent": "with '..' in the path (pack with tar -C FOLDER)",
    "hidden": "hidden",
    "hidden folder": "hidden folder",
    "replaced": "replaced by a later member of the same name",
}


class PassedOver:
    """Counts the files that are not read, by their ending or by the reason."""

    def __init__(self) -> None:
        self._endings: Counter[str] = Counter()
        self._kinds: Counter[PassedKind] = Counter()
        self._examples: dict[PassedKind, str] = {}

    def add(self, name: str) -> None:
        """Counts a file whose ending is not that of an image.

        Args:
            name: Its path, with ``/``.
        """
        base = name.rpartition("/")[2].lower()
        compressed = next((ending for ending in COMPRESSED_TAR_ENDINGS if base.endswith(ending)), None)
        self._endings[compressed or ("." + base.rpartition(".")[2] if "." in base else "")] += 1

    def add_kind(self, kind: PassedKind, name: str) -> None:
        """Counts a file that has a reason of its own, if its ending may be that of an image; or a hidden folder.

        Args:
            kind: The reason.
            name: Its path, with ``/``.
        """
        if kind == "hidden folder" or name.lower().endswith((*IMAGE_ENDINGS, *_SURPRISING, TAR_ENDING)):
            self._kinds[kind] += 1
            self._examples.setdefault(kind, name)

    @property
    def may_surprise(self) -> bool:
        """Whether there is something among it that a user may take for images that are read."""
        return self._kinds["parent"] > 0 or any(ending in self._endings for ending in _SURPRISING)

    def __str__(self) -> str:
        """Such as ``12 .gif, 3 .heic (not JPEG, ...); 4 hidden, such as ._a.jpg``; empty if there is nothing."""
        rest = Counter(self._endings)
        parts = []
        for endings, explanation in _EXPLAINED:
            found = Counter({ending: rest.pop(ending) for ending in endings if ending in rest})
            if found:
                parts.append(f"{_listed(found, len(found))} ({explanation})")
        if rest:
            parts.append(_listed(rest, _SHOWN))
        for kind, said in _SAID.items():
            if count := self._kinds[kind]:
                several = "s" if kind == "hidden folder" and count > 1 else ""
                parts.append(f"{count:,} {said}{several}, such as {self._examples[kind]}")
        return "; ".join(parts)


def _listed(counts: Counter[str], most: int) -> str:
    shown = counts.most_common(most)
    others = counts.total() - sum(count for _, count in shown)
    text = ", ".join(f"{count:,} {ending or 'without ending'}" for ending, count in shown)
    return f"{text} and {others:,} other{'s' * (others > 1)}" if others else text
