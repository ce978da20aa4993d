"""File handling of the store, on top of files that are whole or absent: its errors, its lock, and digests."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock

from theia.errors import StoreError
from theia.utils import files

_KEPT = "Whole shards are kept"
# Turns a system error in a block into a StoreError that names the file and, if its disk is full, the disk.
writing = partial(files.writing, error=StoreError, kept=_KEPT)


class UnreadableFileError(StoreError):
    """The system refuses to read a file, which may be whole, so there is no reason to make it anew."""


def unreadable(path: Path | str, error: OSError) -> UnreadableFileError:
    """Makes the error for a file that cannot be read. An exception with arguments of its own could not be pickled."""
    return UnreadableFileError(
        f"{path} cannot be read: {error}. Check the file system, the permissions and 'ulimit -n'; the file itself "
        "may be whole."
    )


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a small file atomically, and leaves it alone if it already holds this content.

    Raises:
        StoreError: If it cannot be written, for instance on a full disk.
    """
    with writing(path):
        if path.is_file() and path.read_bytes() == content:
            return
    files.write_whole(path, content, StoreError, _KEPT)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, so that two jobs on one store take turns with its manifest."""
    with writing(path):
        path.touch()
    lock = FileLock(path)
    # Some network file systems have no locks. A single job per store needs none.
    with suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns a system error inside the block into an error that names the file.

    Raises:
        UnreadableFileError: On any OSError.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def file_size(path: Path) -> int | None:
    """Size of a file in bytes; ``None`` if there is no file.

    Raises:
        UnreadableFileError: If the system does not tell.
    """
    with reading(path):
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None
