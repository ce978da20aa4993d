"""Files that are whole or absent: written beside their target, synced, renamed; and what a full disk is called."""

import errno
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from theia.errors import ConfigError, FileError, TheiaError

KEPT = "What was there before is whole"
AGAIN = "run the same command again"

_SUFFIX = ".tmp"
_HOST = socket.gethostname().replace("~", "-")

# Whether a writer on another host lives cannot be asked; it touches its file with every batch.
_ABANDONED_SECONDS = 6 * 3600.0


@contextmanager
def replacing(path: Path, error: type[TheiaError] = FileError, kept: str = KEPT, again: str = AGAIN) -> Iterator[Path]:
    """Gives a path to write to, beside the target; when the block ends well, what was written there is the target.

    Whatever happens at any time, a kill or a full disk included, the target is the old file or the new one, whole.

    Args:
        path: The target. Its folder is made if need be.
        error: Type of the error where the system refuses.
        kept: What is not lost, as the message says.
        again: What to do next, as the message says.

    Yields:
        A path in the same folder, and so on the same disk.

    Raises:
        FileError: Or ``error``, on any OSError in the block or here.
    """
    temporary = temporary_path(path)
    with writing(path, error, kept, again):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, path.name)
        try:
            yield temporary
            sync(temporary)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_whole(
    path: Path,
    content: str | bytes,
    error: type[TheiaError] = FileError,
    kept: str = KEPT,
    again: str = AGAIN,
) -> None:
    """Writes a small file: afterwards there is the old content or the new, whole, and it survives a loss of power.

    Args:
        path: Its folder is made if need be.
        content: Text is written as UTF-8.
        error: See :func:`replacing`.
        kept: Likewise.
        again: Likewise.

    Raises:
        FileError: Or ``error``, if it cannot be written, for instance on a full disk.
    """
    with replacing(path, error, kept, again) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: Path, error: type[TheiaError] = FileError, kept: str = KEPT, again: str = AGAIN) -> Iterator[None]:
    """Turns system errors inside into one that names the file, and the disk where that is full.

    Raises:
        FileError: Or ``error``, on any OSError.
    """
    try:
        yield
    except OSError as cause:
        raise error(what_failed(path, cause, kept, again)) from cause


def what_failed(path: Path | str, cause: OSError, kept: str = KEPT, again: str = AGAIN) -> str:
    """Says that a file could not be written, why, and on which disk if that is full.

    Args:
        path: The file, or the folder that it was to lie in.
        cause: What the system said.
        kept: What is not lost.
        again: What to do when the disk has space again.
    """
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        full = "the quota of file system" if cause.errno == errno.EDQUOT else "file system"
        place = f"{full} {mount_of(Path(path))}"
        return f"Disk full while writing {path} ({place}). {kept}: free space and {again}."
    return f"Cannot write {path}: {cause.strerror or cause}. {kept}: mend that and {again}."


def what_was_refused(cause: OSError) -> str:
    """Says the same where it is no longer known what was to be read or written: what the system says of it.

    Args:
        cause: What the system said.
    """
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return what_failed(cause.filename, cause) if cause.filename else "Disk full. Free space and run it again."
    where = "" if cause.filename is None else f"{os.fsdecode(cause.filename)}: "
    return f"{where}{cause.strerror or cause}. Mend that and run the same command again."


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal: which file it is, whatever it is called.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(folder: Path, option: str) -> None:
    """Refuses a folder that files cannot be written into; leaves everything as it is.

    Args:
        folder: Where files will be written later; it need not exist.
        option: The option that it was given with, for messages.

    Raises:
        ConfigError: If the folder, or the first one above it that exists, is no folder or may not be written.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return
    why = f"no permission to write into {there}" if there.is_dir() else f"{there} is not a folder"
    raise ConfigError(f"{folder} cannot be written ({why}). Choose another folder with {option}.")


def at_home(path: str) -> str:
    """Puts the home folder in place of a leading ``~``, as a shell does where it sees one."""
    return os.path.expanduser(path)  # noqa: PTH111  # pathlib's raises on what is no user's name, and drops slashes


def mount_of(path: Path) -> Path:
    """Where the file system of a file is mounted: which disk it is."""
    there = path.absolute()
    while not there.is_mount() and there != there.parent:
        there = there.parent
    return there


def temporary_path(path: Path) -> Path:
    """Where this process writes a file before it gets its name; unique over hosts and processes."""
    return path.with_name(f".{path.name}~{_HOST}~{os.getpid()}{_SUFFIX}")


def remove_stale(folder: Path, name: str = "*") -> None:
    """Removes temporary files of writers that are dead from one folder.

    Args:
        folder: Where to look, not below it.
        name: Target of the files; all by default.
    """
    for path in folder.glob(f".{name}~*~*{_SUFFIX}"):
        _, host, pid = path.name.removesuffix(_SUFFIX).rsplit("~", 2)
        if not pid.isdecimal():
            continue
        # A file that its writer renames or removes meanwhile is no concern of ours.
        try:
            if _is_dead(int(pid)) if host == _HOST else time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue


def publish(temporary: Path, path: Path) -> None:
    """Gives a synced temporary file, or folder, its final name, durably."""
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
