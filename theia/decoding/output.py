"""The folder that decoded pictures go to."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from theia.analysis.files import check_writable
from theia.errors import ConfigError

RECORD = "decoded.json"
_MARK = "theia_decode"
_VERSION = 1


def check_free(out: Path, overwrite: bool) -> None:
    """Makes sure that pictures can be written there, before any work; leaves everything as it is.

    Args:
        out: The folder.
        overwrite: Whether what an earlier call wrote may be removed.

    Raises:
        ConfigError: If the folder holds something else, or pictures that are not to be replaced, or cannot be written.
    """
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise ConfigError(f"{out} is no folder. Choose another with --out.")
    if out.is_dir() and any(out.iterdir()):
        if _files_of(out) is None:
            raise ConfigError(f"{out} is not empty and holds no decoded pictures. Choose another folder with --out.")
        if not overwrite:
            raise ConfigError(
                f"{out} holds decoded pictures already. Replace them with --overwrite, or choose another folder with "
                "--out."
            )
    try:
        check_writable(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error}). Choose another folder with --out.") from error


def prepare(out: Path, files: Sequence[str], overwrite: bool) -> None:
    """Makes a folder ready and notes what will be written, so that a later call can tell it from a foreign one.

    Args:
        out: The folder.
        files: Relative to it.
        overwrite: Remove what an earlier call wrote.

    Raises:
        ConfigError: See :func:`check_free`.
    """
    check_free(out, overwrite)
    for name in _files_of(out) or ():
        path = out / name
        # A record may have been edited; nothing outside the folder is ours.
        if path.is_file() and path.resolve().is_relative_to(out.resolve()):
            path.unlink()
            with suppress(OSError):  # not empty
                path.parent.rmdir()
    out.mkdir(parents=True, exist_ok=True)
    write_record(out, {"finished": False, "files": list(files)})


def write_record(out: Path, content: dict[str, Any]) -> None:
    """Writes ``decoded.json``, whole or not at all."""
    temporary = out / f".{RECORD}"
    temporary.write_text(json.dumps({_MARK: _VERSION, **content}, indent=1) + "\n")
    temporary.replace(out / RECORD)


def picture_names(ids: Sequence[str], endings: Sequence[str]) -> dict[str, str]:
    """Names of the PNG files of images.

    Args:
        ids: Sample ids, with ``/`` between folders.
        endings: Of image files, which are left out where no two images differ in nothing else.

    Returns:
        By id, relative to the folder of all, and never outside of it.
    """
    names: dict[str, str] = {}
    for shorten in (True, False):
        for sample_id in ids:
            parts = [part.replace("..", "__") for part in PurePosixPath(sample_id).parts if part != "/"]
            path = PurePosixPath(*parts)
            names[sample_id] = f"{path.with_suffix('') if shorten and path.suffix.lower() in endings else path}.png"
        if len(set(names.values())) == len(names):
            break
    return names


def _files_of(out: Path) -> list[str] | None:
    try:
        record = json.loads((out / RECORD).read_text())
        if _MARK not in record:
            return None
        return [str(name) for name in record["files"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
