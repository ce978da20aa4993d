"""Files as users keep them: which may be opened, and whose fault it is where one cannot be."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from theia.errors import ImageError

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
