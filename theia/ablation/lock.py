"""Locks that nothing leaves behind: the system drops them with the last process that holds them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from theia.errors import ConfigError


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[int | None]:
    """Holds a file for one process, and for those of its children that are given the descriptor.

    Args:
        path: Of the file, which stays.
        wait: Until whoever holds it lets go.

    Yields:
        The descriptor, or ``None`` if somebody else holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be locked ({error.strerror}): the file system has no locks. Choose another folder."
            ) from error
        else:
            yield descriptor
    finally:
        os.close(descriptor)
