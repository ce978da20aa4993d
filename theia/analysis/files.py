"""Files of a report, each whole or not at all."""

import os
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
