"""Writes a model in some formats, as one folder that is there whole or not at all."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from theia.encoder.authors import POSITIONS as PUBLISHED_POSITIONS
from theia.encoder.encoder import Encoder
from theia.encoder.load import CONFIG, MODEL_TYPE, WEIGHTS, load, read_config
from theia.errors import ExportError, WeightsError
from theia.export.formats import FORMATS, Exported, check

# All that an export may put into a folder; a folder with anything else is not ours to replace.
_OURS = re.compile(
    rf"{CONFIG}|{WEIGHTS}|README\.md|onnx/(encoder(\.int8)?\.onnx|parity\.json)|timm/deit_\w+_patch16_224\.safetensors|"
    rf"authors/({CONFIG}|{WEIGHTS})"
)


def export(
    source: str | Path,
    out: Path,
    formats: list[str],
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    int8: bool = False,
) -> list[str]:
    """Loads a model and writes it.

    Args:
        source: What :func:`theia.load` takes.
        out: Folder to make.
        formats: Of :data:`theia.export.formats.FORMATS`.
        record: What is known of its training; see :func:`theia.export.card.text`. By default what the source itself
            says.
        overwrite: Replace a folder that an export wrote before.
        int8: Also write ONNX in int8.

    Returns:
        What was written, a line each.

    Raises:
        WeightsError: See :func:`theia.load`.
        CheckpointError: Likewise.
        ConfigError: If a format is unknown, or a package for it is missing.
        ExportError: If a format cannot hold the model, a graph does not agree with it, or the folder cannot be written.
    """
    out = out.resolve()
    _restore(out)
    _check_free(out, overwrite)
    encoder = load(source)
    model = Exported(encoder, encoder.architecture, record or _record_of(source, encoder), tuple(formats), int8)
    check(model, formats)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _part(out) as part:
            writers = dict.fromkeys(FORMATS[name] for name in formats)
            lines = [line for write in writers for line in write(model, part)]
            _sync(part)
            _put_in_place(part, out)
    except OSError as error:
        raise ExportError(
            f"{out} cannot be written ({error.strerror or error}). Choose another folder with --out."
        ) from error
    return lines


def _record_of(source: str | Path, encoder: Encoder) -> Mapping[str, Any]:
    """What a model says of itself; a published one says nothing, so that where it comes from is all there is to say."""
    folder = Path(source)
    if folder.is_file():
        return {}
    record: Mapping[str, Any] = read_config(folder).get("record", {}) if folder.is_dir() else {}
    if not record and encoder.architecture.positions == PUBLISHED_POSITIONS:
        return {"origin": folder.resolve().name if folder.is_dir() else str(source)}
    return record


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out} is a file. Choose a folder with --out.")
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
        return bool({"onnx/parity.json", f"authors/{CONFIG}"} & set(found)) or any("timm/" in name for name in found)
    try:
        return read_config(folder).get("model_type") == MODEL_TYPE
    except WeightsError:
        return False


@contextmanager
def _part(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out``, of this export alone; it is gone afterwards, or has become ``out``."""
    part = out.with_name(f".{out.name}.part")
    part.mkdir(exist_ok=True)
    descriptor = os.open(part, os.O_RDONLY)
    try:
        # Held as long as this process lives, and no longer: what a killed export left may be cleared away.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not part.exists() or os.fstat(descriptor).st_ino != part.stat().st_ino:
            raise BlockingIOError
        for path in part.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except BlockingIOError as error:
        raise ExportError(
            f"Another export is writing {out}. Wait for it, or choose another folder with --out."
        ) from error
    finally:
        os.close(descriptor)


def _put_in_place(part: Path, out: Path) -> None:
    old = _old(out)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _restore(out: Path) -> None:
    """An export that was killed between two renames left the folder that it was to replace under another name."""
    old = _old(out)
    if old.exists() and not out.exists():
        old.rename(out)


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def _sync(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
