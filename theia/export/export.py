"""Writes a model in some formats, as one folder that is there whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from theia.encoder.load import CONFIG, MODEL_TYPE, WEIGHTS, load, read_config
from theia.errors import ExportError, WeightsError
from theia.export.formats import FORMATS, Exported, check

# All that an export may put into a folder; a folder with anything else is not ours to replace.
_OURS = {CONFIG, WEIGHTS, "README.md", "onnx", "timm", "authors"}


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
        record: What is known of its training; see :func:`theia.export.card.write`. By default what the source itself
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
    _check_free(out, overwrite)
    encoder = load(source)
    if record is None:
        folder = Path(source)
        record = read_config(folder).get("record", {}) if folder.is_dir() else {}
    model = Exported(encoder, encoder.architecture, record, int8)
    check(model, formats)
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
        part.mkdir()
        writers = dict.fromkeys(FORMATS[name] for name in formats)
        lines = [line for write in writers for line in write(model, part)]
        _sync(part)
        _put_in_place(part, out)
    except OSError as error:
        raise ExportError(
            f"{out} cannot be written ({error.strerror or error}). Choose another folder with --out."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return lines


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out} is a file. Choose a folder with --out.")
    found = {path.name for path in out.iterdir()}
    if not found:
        return
    if found - _OURS or not _is_export(out):
        other = sorted(found - _OURS) or sorted(found)
        raise ExportError(f"{out} holds something else: {', '.join(other[:3])}. Choose another folder with --out.")
    if not overwrite:
        raise ExportError(
            f"{out} holds a model already. Replace it with --overwrite true, or choose another folder with --out."
        )


def _is_export(folder: Path) -> bool:
    if not (folder / CONFIG).exists():
        return any((folder / name).is_dir() for name in ("onnx", "timm", "authors"))
    try:
        return read_config(folder).get("model_type") == MODEL_TYPE
    except WeightsError:
        return False


def _put_in_place(part: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
