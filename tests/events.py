"""What tests wait for: something that happens, never a time that it should take."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

# Against a hang alone. No machine is so slow, or so busy, that a test fails for it.
PATIENCE_S = 1800.0


def wait_for(condition: Callable[[], object]) -> None:
    """Returns when something is the case."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def has_ended(process: "psutil.Process") -> bool:
    """Whether a process is no more; one that nobody has reaped, as an orphan in a container, counts as ended."""
    import psutil  # not to be found where forked.py stands for a command

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def aged(folder: Path, pattern: str = "*") -> dict[Path, int]:
    """Makes files old, so that the next write shows in the time of change, however soon it comes.

    Args:
        folder: Looked through to any depth.
        pattern: Names of the files.

    Returns:
        Times of change in nanoseconds, by path.
    """
    files = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
    for path in files:
        os.utime(path, (1, 1))
    return changed(files)


def changed(files: Iterable[Path]) -> dict[Path, int]:
    """Times of change in nanoseconds of files that are still there, by path."""
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}
