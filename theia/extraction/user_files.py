"""Rules for users' files: which may be opened, whether an error is the fault of one file, and which are not read."""

import errno
import importlib.util
import os
import stat
from collections import Counter
from pathlib import Path
from typing import BinaryIO, Literal

from theia.errors import ImageError

# HEIC is read by a package of its own.
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
_HEIF_ENDINGS = (".heic", ".heif")

# File names that counted as images when the first stores were made, in lower case.
EARLY_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# File names that count as images, in lower case.
IMAGE_ENDINGS = (
    *EARLY_ENDINGS, ".gif", ".avif", ".jfif", ".jif", ".jpe", ".jp2", ".j2k", *(_HEIF_ENDINGS if HAS_HEIF else ()),
)  # fmt: skip

FORMATS_SAID = "JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or JPEG 2000"

# Errors that are about one file alone: they would be the same on any disk, and will be the same tomorrow. All others
# (EIO, ESTALE, ETIMEDOUT, EMFILE, ENOMEM, ...) are about the disk, the network or this process: trying again may help,
# and no image must be written off for them.
_FAULTS_OF_ONE_FILE = frozenset(
    {
        errno.ENOENT,  # removed since it was listed, or a link to nothing
        errno.ELOOP,  # a link to itself, or links in a circle
        errno.ENOTDIR,  # a link that goes through a file as if it were a folder
        errno.ENAMETOOLONG,  # a link to a name that no file can have
        errno.EACCES,  # forbidden
        errno.EPERM,  # forbidden
        errno.EISDIR,  # replaced by a folder
        errno.ENXIO,  # replaced by a socket, or by a device that is not there
        errno.ENODEV,  # replaced by a socket, or by a device that is not there
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
    """The path leads to a folder, FIFO, socket or device instead of a regular file."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, and never waits for a file of another kind.

    Args:
        path: The file, or a link to it.

    Raises:
        IrregularFileError: If the file is of another kind.
        OSError: If the system refuses to open it.
    """
    # Checked first: merely opening a device may have an effect on it.
    _check_regular(path.stat())
    # The path may lead to something else by now. Opened without waiting, a FIFO is found out.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb")
    try:
        _check_regular(os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def is_fault_of_one_file(error: OSError) -> bool:
    """Whether an error is about one file alone, so that other files are still worth reading."""
    return isinstance(error, IrregularFileError) or error.errno in _FAULTS_OF_ONE_FILE


def was_never_a_file(error: OSError) -> bool:
    """Whether this error means that there never was a file with content: another kind of file, or links in a circle."""
    return isinstance(error, IrregularFileError) or error.errno == errno.ELOOP


def reason(path: Path, error: OSError) -> str:
    """System's message about a file, with the target of a link, which the system does not name if it is gone."""
    try:
        return f"{error} (a link to {path.readlink()})"
    except OSError:
        return str(error)


def is_folder(place: Path, wanted: str) -> bool:
    """Whether a place that a user gave is a folder. If it is not, it is a regular file.

    Args:
        place: Path that the user gave.
        wanted: Sentence that says what to give, for the message.

    Raises:
        ImageError: If nothing is there, it is neither a folder nor a regular file, or the system does not tell.
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

# Endings that a user may expect to be read as images, and what to say about them.
_EXPLAINED = (
    (_HEIF_ENDINGS, "to read them: pip install pillow-heif"),
    (
        (".jxl", ".svg", ".ico", ".tga", ".psd", ".exr", ".hdr", ".ppm", ".pgm", ".pnm", ".raw", ".dng", ".cr2",
         ".cr3", ".nef", ".arw"),
        f"not {FORMATS_SAID}",
    ),
    ((".pjpeg", ".pjp"), "JPEG by another ending: rename to .jpg"),
    (COMPRESSED_TAR_ENDINGS, "compressed: decompress first"),
)  # fmt: skip
_SURPRISING = tuple(ending for endings, _ in _EXPLAINED for ending in endings)
_SHOWN = 4  # number of other endings in a message

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
            name: Path of the file, with ``/``.
        """
        base = name.rpartition("/")[2].lower()
        compressed = next((ending for ending in COMPRESSED_TAR_ENDINGS if base.endswith(ending)), None)
        self._endings[compressed or ("." + base.rpartition(".")[2] if "." in base else "")] += 1

    def add_kind(self, kind: PassedKind, name: str) -> None:
        """Counts a hidden folder, or a file that has a reason of its own and may be an image by its ending.

        Args:
            kind: Reason why it is not read.
            name: Path of the file or folder, with ``/``.
        """
        if kind == "hidden folder" or name.lower().endswith((*IMAGE_ENDINGS, *_SURPRISING, TAR_ENDING)):
            self._kinds[kind] += 1
            self._examples.setdefault(kind, name)

    @property
    def may_surprise(self) -> bool:
        """Whether a user may have expected some of these files to be read."""
        return self._kinds["parent"] > 0 or any(ending in self._endings for ending in _SURPRISING)

    def __str__(self) -> str:
        """Summary, such as ``12 .gif, 3 .heic (not JPEG, ...); 4 hidden, such as ._a.jpg``; may be empty."""
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
