"""A folder that one process works in at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from theia.errors import ConfigError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuses a folder that another process works in. A process that was killed holds it no longer.

    Raises:
        ConfigError: If another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigError(
            f"Another process works in {folder}. Wait for it, or choose another folder with --out."
        ) from error
    finally:
        os.close(descriptor)
