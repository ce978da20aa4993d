"""Files that are whole or absent: written beside their target, synced, renamed.

Also the messages for a full disk, and values in a form that JSON can hold.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from theia.errors import ConfigError, FileError, TheiaError

KEPT = "What was there before is whole"
AGAIN = "run the same command again"

_SUFFIX = ".tmp"
_HOST = socket.gethostname().replace("~", "-")

# A writer on another host cannot be asked whether it lives; it touches its file with every batch.
_ABANDONED_SECONDS = 6 * 3600.0


@contextmanager
def replacing(path: Path, error: type[TheiaError] = FileError, kept: str = KEPT, again: str = AGAIN) -> Iterator[Path]:
    """Gives a path beside the target to write to, which becomes the target when the block ends well.

    Whatever happens at any time, even a kill or a full disk, the target is either the old file or the new one, whole.

    Args:
        path: Path of the target. Its folder is made if it is missing.
        error: Class of the error if the system refuses.
        kept: Part of the message that says what is not lost.
        again: Part of the message that says what to do next.

    Yields:
        A path in the same folder, and so on the same disk.

    Raises:
        FileError: Or ``error``, on any OSError in the block or in this function.
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
    """Writes a small file so that it holds the old content or the new one, whole, even after a loss of power.

    Args:
        path: Path of the file. Its folder is made if it is missing.
        content: Content to write. Text is written as UTF-8.
        error: Class of the error if the system refuses.
        kept: Part of the message that says what is not lost.
        again: Part of the message that says what to do next.

    Raises:
        FileError: Or ``error``, if it cannot be written, for instance on a full disk.
    """
    with replacing(path, error, kept, again) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: Path, error: type[TheiaError] = FileError, kept: str = KEPT, again: str = AGAIN) -> Iterator[None]:
    """Turns a system error inside the block into one that names the file and, if its disk is full, the disk.

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
        path: Path of the file, or of the folder that it was meant for.
        cause: Error of the system.
        kept: Part of the message that says what is not lost.
        again: Part of the message that says what to do when the disk has space again.
    """
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        full = "the quota of file system" if cause.errno == errno.EDQUOT else "file system"
        place = f"{full} {mount_of(Path(path))}"
        return f"Disk full while writing {path} ({place}). {kept}: free space and {again}."
    return f"Cannot write {path}: {cause.strerror or cause}. {kept}: mend that and {again}."


def what_was_refused(cause: OSError) -> str:
    """Describes a system error where it is no longer known which file was to be read or written.

    Args:
        cause: Error of the system.
    """
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return what_failed(cause.filename, cause) if cause.filename else "Disk full. Free space and run it again."
    where = "" if cause.filename is None else f"{os.fsdecode(cause.filename)}: "
    return f"{where}{cause.strerror or cause}. Mend that and run the same command again."


def jsonable(value: Any) -> Any:
    """Copies nested values into a form that any JSON reader takes, since JSON knows neither NaN nor infinity.

    Args:
        value: Mappings, lists and tuples, with whatever they hold.

    Returns:
        Dictionaries with text as keys, lists, text, integers, booleans and finite floats. ``None`` stands for a float
        that is not finite; anything else, such as a path, becomes text.
    """
    if isinstance(value, Mapping):
        return {str(name): jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file whose loss costs nothing but what it says; empty if it is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def alone(folder: Path, option: str = "--out") -> Iterator[None]:
    """Keeps other processes out of a folder, which is made if need be. One that is killed holds it no longer.

    Args:
        folder: Folder to keep to this process.
        option: Option that named the folder, for the message.

    Raises:
        ConfigError: If another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"Another process works in {folder}. Wait for it, or choose another folder with {option}."
            ) from error
        yield
    finally:
        os.close(descriptor)


def allocate(path: Path) -> None:
    """Takes all the room on the disk that a file will need once it is filled.

    A file that is mapped into memory has holes at first. Where the disk has no room for one that is written to, the
    system ends the process without a message.

    Raises:
        OSError: If the disk is full.
    """
    if hasattr(os, "posix_fallocate"):  # macOS has no such call
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def file_sha256(path: Path) -> str:
    """Sha256 of a file's content, in hexadecimal. It identifies the file, whatever its name.

    Raises:
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(folder: Path, option: str) -> None:
    """Refuses a folder that files cannot be written into, and changes nothing on the disk.

    Args:
        folder: Folder where files will be written later. It need not exist.
        option: Option that named the folder, for messages.

    Raises:
        ConfigError: If the folder, or else its nearest parent that exists, is not a folder or may not be written.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return
    why = f"no permission to write into {there}" if there.is_dir() else f"{there} is not a folder"
    raise ConfigError(f"{folder} cannot be written ({why}). Choose another folder with {option}.")


def at_home(path: str) -> str:
    """Replaces a leading ``~`` with the home folder, as a shell does where it sees one."""
    return os.path.expanduser(path)  # noqa: PTH111  # pathlib's raises on what is no user's name, and drops slashes


def mount_of(path: Path) -> Path:
    """Mount point of the file system that holds a file, as a name for its disk."""
    there = path.absolute()
    while not there.is_mount() and there != there.parent:
        there = there.parent
    return there


def temporary_path(path: Path) -> Path:
    """Path that this process writes a file to before it gets its final name; unique over hosts and processes."""
    return path.with_name(f".{path.name}~{_HOST}~{os.getpid()}{_SUFFIX}")


def remove_stale(folder: Path, name: str = "*") -> None:
    """Removes temporary files of dead writers from one folder.

    Args:
        folder: Folder to search, without its sub-folders.
        name: Name of the target whose temporary files are removed; all by default.
    """
    for path in folder.glob(f".{name}~*~*{_SUFFIX}"):
        _, host, pid = path.name.removesuffix(_SUFFIX).rsplit("~", 2)
        if not pid.isdecimal():
            continue
        # If the writer of a file renames or removes it meanwhile, there is nothing left to do.
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
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_dead(pid: int) -> bool:
    # A file with our own process id is a predecessor's: containers number their processes alike, and nothing is open
    # yet.
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # It is alive and belongs to another user.
    return False


def open_url(url: str) -> tuple[Any, str]:
    """File system of a place elsewhere, and the place's path in it.

    Args:
        url: Place that fsspec opens, such as ``s3://bucket/folder``.

    Raises:
        ConfigError: If it is no such place, or what opens it is not installed.
    """
    import fsspec  # what works on a local disk does not need it

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{url} cannot be opened: {error}. fsspec opens such places with that package.") from error
    except ValueError as error:
        raise ConfigError(f"{url} is no place that fsspec opens: {error}.") from error
    return fs, str(path)
