"""The folder that decoded pictures go to, and what a call that was stopped has left there."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from theia.errors import ConfigError
from theia.utils.files import check_folder, remove_stale, replacing, write_whole, writing
from theia.utils.pictures import Picture

RECORD, SCORES = "decoded.json", "decoded.jsonl"
_MARK = "theia_decode"
_VERSION = 1
_KEPT = "Pictures that are finished are kept"

Scores = dict[str, dict[str, float]]  # by teacher and name of a score


def check_free(out: Path, overwrite: bool) -> None:
    """Makes sure that pictures can be written there, before any work; leaves everything as it is.

    What a call that was stopped left is not in the way: see :func:`find_unfinished`.

    Args:
        out: The folder.
        overwrite: Whether what an earlier call wrote may be removed.

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


@dataclass(frozen=True)
class Unfinished:
    """What a call that was stopped has left.

    Attributes:
        start: What it noted before its first picture.
        scores: Of each image whose picture is whole, by id.
    """

    start: dict[str, Any]
    scores: dict[str, Scores]


def find_unfinished(out: Path, call: Mapping[str, Any], files: Mapping[str, str]) -> Unfinished | None:
    """Looks for a call to go on with.

    Args:
        out: The folder.
        call: By option, what pictures depend on, as plain values.
        files: By image id, its file relative to the folder.

    Returns:
        ``None`` if there is none, or it was stopped before its first picture was whole.

    Raises:
        ConfigError: If it was a call with other options.
    """
    record = _read(out)
    if record is None or record.get("finished"):
        return None
    scores: dict[str, Scores] = {}
    with suppress(OSError):
        for line in (out / SCORES).read_text().splitlines():
            with suppress(ValueError, TypeError, KeyError):  # torn when the process was killed
                entry = json.loads(line)
                if (out / entry["file"]).is_file():
                    scores[entry["image"]] = entry["scores"]
    if not scores:
        return None
    then: dict[str, Any] = record.get("call") or {}
    now = json.loads(json.dumps({**call}, default=str))
    differing = [name for name in now if then.get(name) != now[name]]
    if not differing and record["files"] != [*files.values()]:
        differing = ["images"]
    if differing:
        raise ConfigError(
            f"{out} holds {len(scores)} pictures of a call that was stopped, with other {', '.join(differing)}. Give "
            "what was given then to go on with it, replace them with --overwrite, or choose another folder with --out."
        )
    return Unfinished(record["start"], scores)


class Output:
    """Writes pictures, each whole or not at all, and notes each with its scores.

    Args:
        out: The folder; see :func:`check_free`.
        files: By image id, its file relative to the folder.
    """

    def __init__(self, out: Path, files: Mapping[str, str]) -> None:
        self._out, self._files = out, files

    def begin(self, call: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Removes what an earlier call wrote, and notes what will be written: a later call can go on with it.

        Args:
            call: See :func:`find_unfinished`.
            start: To be given back by it.
        """
        with writing(self._out):
            for name in [*((_read(self._out) or {}).get("files", ())), SCORES]:
                path = self._out / str(name)
                # A record may have been edited; nothing outside the folder is ours.
                if not path.resolve().is_relative_to(self._out.resolve()):
                    continue
                remove_stale(path.parent)
                if path.is_file():
                    path.unlink()
                    with suppress(OSError):  # not empty
                        path.parent.rmdir()
        write_record(
            self._out,
            {"finished": False, "call": {**call}, "start": {**start}, "files": [*self._files.values()]},
        )

    def go_on(self, scores: Mapping[str, Scores]) -> None:
        """Instead of :meth:`begin`: keeps what is whole, by image id."""
        write_whole(self._out / SCORES, "".join(self._line(sample_id, each) for sample_id, each in scores.items()))

    def save(self, sample_id: str, picture: Picture, scores: Scores) -> None:
        """Writes the picture of an image, then notes it."""
        path = self._out / self._files[sample_id]
        with replacing(path, kept=_KEPT) as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")
        with writing(path, kept=_KEPT), (self._out / SCORES).open("a") as lines:
            lines.write(self._line(sample_id, scores))

    def finish(self, record: Mapping[str, Any]) -> None:
        """Writes the record of everything; nothing is left to go on with."""
        write_record(self._out, {**record, "finished": True, "files": [*self._files.values()]})
        with writing(self._out / SCORES):
            (self._out / SCORES).unlink(missing_ok=True)

    def _line(self, sample_id: str, scores: Scores) -> str:
        return json.dumps({"image": sample_id, "file": self._files[sample_id], "scores": scores}) + "\n"


def write_record(out: Path, content: dict[str, Any]) -> None:
    """Writes ``decoded.json``, whole or not at all."""
    write_whole(out / RECORD, json.dumps({_MARK: _VERSION, **content}, indent=1, default=str) + "\n")


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


def _read(out: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((out / RECORD).read_text())
    except (OSError, ValueError):
        return None
    good = isinstance(record, dict) and _MARK in record and isinstance(record.get("files"), list)
    return record if good else None
