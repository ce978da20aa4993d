"""Files of a report, each whole or not at all."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_whole(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files by name, in their order, each under a temporary name first.

    Args:
        folder: Made if need be.
        contents: By name.

    Raises:
        OSError: If one cannot be written; those before it are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(content)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Tries whether files can be written into a folder, and leaves everything as it was.

    Raises:
        OSError: If they cannot, or the folder cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()
