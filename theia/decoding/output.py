"""The folder that decoded pictures go to."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from theia.errors import ConfigError
from theia.utils.files import check_folder, replacing, write_whole, writing
from theia.utils.pictures import Picture

RECORD = "decoded.json"
_MARK = "theia_decode"
_VERSION = 1
_KEPT = "Pictures that are finished are kept"


def check_free(out: Path, overwrite: bool) -> None:
    """Makes sure that pictures can be written there, before any work; leaves everything as it is.

    Pictures of a call that was interrupted are not in the way.

    Args:
        out: The folder.
        overwrite: Whether the pictures of an earlier call may be replaced.

    Raises:
        ConfigError: If the folder holds something else, or pictures that are not to be replaced, or cannot be written.
    """
    check_folder(out, "--out")
    if out.is_dir() and any(out.iterdir()):
        record = _read(out)
        if record is None:
            raise ConfigError(f"{out} is not empty and holds no decoded pictures. Choose another folder with --out.")
        if record.get("finished") and not overwrite:
            raise ConfigError(
                f"{out} holds decoded pictures already. Replace them with --overwrite, or choose another folder with "
                "--out."
            )


class Output:
    """Writes pictures, each whole or not at all, over those of an earlier call.

    Earlier pictures of other images stay until :meth:`finish`, so that an interruption never costs any.

    Args:
        out: The folder; see :func:`check_free`.
        names: File of each image relative to the folder, by image id.
    """

    def __init__(self, out: Path, names: Mapping[str, str]) -> None:
        self._out, self._names = out, names
        self._earlier: list[str] = [str(name) for name in (_read(out) or {}).get("files", ())]

    def begin(self, files: Sequence[str]) -> None:
        """Notes which files may be there if the call is interrupted, so that a later one may replace them.

        Args:
            files: The files that will be written, relative to the folder.
        """
        self._write_record({}, finished=False, files=[*dict.fromkeys([*self._earlier, *files])])

    def save(self, sample_id: str, picture: Picture) -> None:
        """Writes the picture of an image as a PNG."""
        with replacing(self._out / self._names[sample_id], kept=_KEPT) as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")

    def finish(self, record: Mapping[str, Any], files: Sequence[str]) -> None:
        """Writes ``decoded.json``, and removes what only an earlier call wrote.

        Args:
            record: Record to write.
            files: The files that were written, relative to the folder.
        """
        self._write_record(record, finished=True, files=files)
        with writing(self._out):
            for name in {*self._earlier}.difference(files):
                path = self._out / name
                # A record may have been edited; nothing outside the folder is ours.
                if path.resolve().is_relative_to(self._out.resolve()) and path.is_file():
                    path.unlink()
                    with suppress(OSError):  # not empty
                        path.parent.rmdir()

    def _write_record(self, record: Mapping[str, Any], finished: bool, files: Sequence[str]) -> None:
        content = {_MARK: _VERSION, **record, "finished": finished, "files": files}
        write_whole(self._out / RECORD, json.dumps(content, indent=1, default=str) + "\n")


def picture_names(ids: Sequence[str], endings: Sequence[str]) -> dict[str, str]:
    """Names of the PNG files of images.

    Args:
        ids: Sample ids, with ``/`` between folders.
        endings: Endings of image files; they are left out unless that gives two images the same name.

    Returns:
        File names by id, relative to the folder of all pictures and never outside of it.
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


def _read(out: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((out / RECORD).read_text())
    except (OSError, ValueError):
        return None
    good = isinstance(record, dict) and _MARK in record and isinstance(record.get("files"), list)
    return record if good else None
