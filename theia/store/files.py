"""Files that are whole or absent: temporary names, atomic replacement, and errors of a full disk."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from theia.errors import StoreError

_SUFFIX = ".tmp"
_HOST = socket.gethostname().replace("~", "-")

# Whether a writer on another host lives cannot be asked; it touches its file with every batch.
_ABANDONED_SECONDS = 6 * 3600.0


class UnreadableFileError(StoreError):
    """The system refuses to read a file, which may be whole: not a reason to make it anew."""


def unreadable(path: Path | str, error: OSError) -> UnreadableFileError:
    """The error that says so. Made here, since an exception with arguments of its own could not be pickled."""
    return UnreadableFileError(
        f"{path} cannot be read: {error}. Check the file system, the permissions and 'ulimit -n'; the file itself "
        "may be whole."
    )


def temporary_path(path: Path) -> Path:
    """Where this process writes a file before it gets its name; unique over hosts and processes."""
    return path.with_name(f".{path.name}~{_HOST}~{os.getpid()}{_SUFFIX}")


def remove_stale(folder: Path) -> None:
    """Removes temporary files of writers that are dead from one folder."""
    for path in folder.glob(f".*~*~*{_SUFFIX}"):
        _, host, pid = path.name.removesuffix(_SUFFIX).rsplit("~", 2)
        if not pid.isdecimal():
            continue
        # A file that its writer renames or removes meanwhile is no concern of ours.
        try:
            if _is_dead(int(pid)) if host == _HOST else time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a small file atomically, and not at all where it already holds this content.

    Raises:
        StoreError: If it cannot be written, for instance on a full disk.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.read_bytes() == content:
            return
        temporary = temporary_path(path)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Gives a synced temporary file its final name, durably."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, so that two jobs on one store take turns with its manifest."""
    with writing(path):
        file = path.open("a")
    with file:
        # Some network file systems have no locks; a single job per store needs none.
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns system errors inside into an error that names the file.

    Raises:
        UnreadableFileError: On any OSError.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def file_size(path: Path) -> int | None:
    """Bytes of a file, or ``None`` where there is none.

    Raises:
        UnreadableFileError: If the system does not tell.
    """
    with reading(path):
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns system errors inside into a StoreError that names the file.

    Raises:
        StoreError: On any OSError; says so where the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"Disk full while writing {path}. Whole shards are kept: free space and run the same command again."
            ) from error
        raise StoreError(f"Cannot write {path}: {error}. Mend that and run the same command again.") from error


def _is_dead(pid: int) -> bool:
    # A file of our own number is a predecessor's: containers number their processes alike, and nothing is open yet.
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # It lives, and is another user's.
    return False
