"""Writes a model in several formats into one folder, which is there whole or not at all."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from theia.encoder.encoder import Encoder, one_or_several
from theia.encoder.load import CONFIG, MODEL_TYPE, WEIGHTS, load, local_path, read_config, set_aside
from theia.encoder.published import POSITIONS as PUBLISHED_POSITIONS
from theia.errors import ExportError, WeightsError
from theia.export.formats import FORMATS, Exported, check
from theia.utils.arguments import comma_list
from theia.utils.files import publish, sync, writing

# Files that nothing but an export puts into a folder that has no config of ours.
_MARKS = re.compile(rf"onnx/parity\.json|authors/{CONFIG}|timm/deit_\w+_patch16_224\.safetensors")
# All that an export may put into a folder; a folder with anything else is not ours to replace.
_OURS = re.compile(rf"{_MARKS.pattern}|{CONFIG}|{WEIGHTS}|README\.md|onnx/encoder(\.int8)?\.onnx|authors/{WEIGHTS}")


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    formats: str | Iterable[str],
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    int8: bool = False,
) -> list[str]:
    """Loads a model and writes it in the given formats.

    Whatever happens at any time, a kill or a full disk included, there is the old folder or the new one, whole, and it
    survives a loss of power. Only a kill between the two renames that replace a folder leaves the old one under another
    name, ``.NAME.old``: :func:`theia.load` names it, and the next export puts it back.

    Args:
        source: Model to export, as for :func:`theia.load`.
        out: Folder to create.
        formats: Names from :data:`theia.export.formats.FORMATS`, one by one or in one text with commas.
        record: Record of the training, as for :func:`theia.export.card.text`; by default the one in the source.
        overwrite: Whether to replace a folder that an earlier export wrote.
        int8: Whether to write an int8 ONNX graph, too.

    Returns:
        Descriptions of what was written, one line each.

    Raises:
        WeightsError: See :func:`theia.load`.
        CheckpointError: See :func:`theia.load`.
        ConfigError: If a format is unknown, or a package for it is missing.
        ExportError: If a format cannot hold the model, a graph gives other features, or the folder cannot be written,
            for instance on a full disk.
    """
    names = comma_list(",".join(str(name) for name in one_or_several(formats)))
    out = Path(os.path.expanduser(out)).resolve()  # noqa: PTH111  (Path's own raises where there is no such user)
    with writing(out, ExportError):
        _restore(out)
        _check_free(out, overwrite)
    encoder = load(source)
    model = Exported(encoder, encoder.architecture, record or record_of(source, encoder), tuple(names), int8)
    check(model, names)
    with writing(out, ExportError):
        out.parent.mkdir(parents=True, exist_ok=True)
        with part_beside(out) as part:
            writers = dict.fromkeys(FORMATS[name] for name in names)
            lines = [line for write in writers for line in write(model, part)]
            for path in [*part.rglob("*"), part]:
                sync(path)
            # Again: what was put there meanwhile is not ours to replace.
            _check_free(out, overwrite)
            _put_in_place(part, out)
    return lines


def record_of(source: str | os.PathLike[str], encoder: Encoder) -> Mapping[str, Any]:
    """The record in a model's config. A published model has none, so its record only says where it comes from.

    Args:
        source: Model, as for :func:`theia.load`.
        encoder: The same, loaded.
    """
    folder = local_path(source)
    if folder.is_file():
        return {}
    record: Mapping[str, Any] = read_config(folder).get("record", {}) if folder.is_dir() else {}
    if not record and encoder.architecture.positions == PUBLISHED_POSITIONS:
        return {"origin": folder.resolve().name if folder.is_dir() else str(source)}
    return record


def _check_free(out: Path, overwrite: bool) -> None:
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ExportError(f"{path} is a file. Choose a folder with --out.")
    if not out.exists():
        return
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir())
    if not any(out.iterdir()):
        return
    other = [name for name in found if not _OURS.fullmatch(name)]
    if other or not _is_export(out, found):
        other = other or found
        raise ExportError(f"{out} holds something else: {', '.join(other[:3])}. Choose another folder with --out.")
    if not overwrite:
        raise ExportError(
            f"{out} holds a model already. Replace it with --overwrite, or choose another folder with --out."
        )


def _is_export(folder: Path, found: list[str]) -> bool:
    if CONFIG not in found:
        return any(map(_MARKS.fullmatch, found))
    try:
        return read_config(folder).get("model_type") == MODEL_TYPE
    except WeightsError:
        return False


@contextmanager
def part_beside(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out``, of this export alone; it is gone afterwards, or has become ``out``.

    Raises:
        ExportError: If another export is writing ``out``.
    """
    part = out.with_name(f".{out.name}.part")
    part.mkdir(exist_ok=True)
    descriptor = os.open(part, os.O_RDONLY)
    try:
        # Held as long as this process lives, and no longer: what a killed export left may be cleared away.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_open(descriptor, part):
            raise BlockingIOError
        for path in part.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield part
        finally:
            # Once this one has become ``out``, another export may have begun under its name.
            if _is_open(descriptor, part):
                shutil.rmtree(part, ignore_errors=True)
    except BlockingIOError as error:
        raise ExportError(
            f"Another export is writing {out}. Wait for it, or choose another folder with --out."
        ) from error
    finally:
        os.close(descriptor)


def _is_open(descriptor: int, path: Path) -> bool:
    return path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino


def _put_in_place(part: Path, out: Path) -> None:
    if out.exists():
        _remove_old(out)
        out.rename(set_aside(out))
    try:
        publish(part, out)
    finally:
        _restore(out)
    _remove_old(out)


def _restore(out: Path) -> None:
    """An export that was killed between two renames left the folder that it was to replace under another name."""
    old = set_aside(out)
    if old.exists() and not out.exists():
        publish(old, out)


def _remove_old(out: Path) -> None:
    """Removes the folder that was replaced. It loses its name first: half of it must never be put back."""
    old, gone = set_aside(out), out.with_name(f".{out.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    if old.exists():
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
