"""``theia.load``: loads an encoder from a folder, a checkpoint or the hub."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from theia.encoder import published
from theia.encoder.encoder import FLOATS, Encoder, check_pool
from theia.errors import CheckpointError, ConfigError, TheiaError, WeightsError
from theia.hub import known_to_answer
from theia.models import older
from theia.models.architecture import Architecture
from theia.models.checkpoint import read_checkpoint
from theia.models.scaler import POWER
from theia.models.weights import load_strictly

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "theia-encoder"
# Of all names in exported files, as in training checkpoints.
PREFIX = "distiller."

_SHOWN = 3  # paths in a message

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    compile: bool = False,
    revision: str | None = None,
) -> Encoder:
    """Loads a trained encoder.

    No code in the files is run. Every tensor must be used, and every parameter set.

    Args:
        source: A folder that ``theia export`` wrote (or its ``config.json`` or ``model.safetensors``), a training
            checkpoint (``.ckpt``), a folder of a published model, or its id on the Hugging Face hub, such as
            ``theaiinstitute/theia-base-patch16-224-cdiv``. ``~`` is the home folder.
        device: Device of the encoder.
        dtype: Type of the parameters: torch's float16, bfloat16, float32 or float64; float32 by default.
        compile: Whether to compile the student at its first use, and again for each new batch size.
        revision: Branch, tag or commit on the hub; a local folder has none.

    Returns:
        The encoder, in evaluation mode. Its student is trainable, its translators are frozen; see :class:`Encoder`.

    Raises:
        WeightsError: If there is no model, the hub cannot be reached, or files are damaged, of another kind, or do not
            belong together. The message names a model that lies nearby.
        CheckpointError: If a file is not a training checkpoint, or cannot be read.
        ConfigError: If there is no such device, or parameters cannot have this type.
    """
    path = local_path(source)
    _check_place(device, dtype)
    if revision is not None and path.exists():
        raise WeightsError(f"{path} is local and has no revision {revision!r}. Leave it out, or give an id on the hub.")
    if path.is_file():
        encoder = _from_checkpoint(path)
    elif path.is_dir():
        encoder = _from_folder(path, str(path))
    elif isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix != ".ckpt":
        try:
            folder = _fetch(source, revision)
        except WeightsError as error:
            # A path such as RUN/exported looks like an id, too.
            raise WeightsError(f"{error} {_nearby(path)}".strip()) from error
        encoder = _from_folder(folder, source)
    else:
        raise WeightsError(
            f"There is no file or folder {str(path)!r}, and it is not an id on the hub (OWNER/NAME). "
            + (_nearby(path) or "Give a folder that 'theia export' wrote, a checkpoint of 'theia fit', or an id.")
        )
    encoder.to(device=device, dtype=dtype)
    if compile:
        encoder.compile()
    return encoder


def local_path(source: str | os.PathLike[str]) -> Path:
    """The path of a model, if it is on this machine; a file of an exported folder stands for the folder.

    Args:
        source: Folder, file or id, as for :func:`load`.

    Raises:
        WeightsError: If it is empty or not a path.
    """
    given = os.fspath(source) if isinstance(source, str | os.PathLike) else source
    if not isinstance(given, str) or not given.strip():
        raise WeightsError(
            f"{source!r} names no model. Give a folder that 'theia export' wrote, a checkpoint of 'theia fit', or an "
            "id on the hub."
        )
    path = Path(os.path.expanduser(given))  # noqa: PTH111  (Path's own raises where there is no such user)
    return path.parent if path.name in (CONFIG, WEIGHTS) and path.is_file() else path


def set_aside(folder: Path) -> Path:
    """Where an export puts the folder that it is about to replace, until the new one has its name."""
    return folder.with_name(f".{folder.name}.old")


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder.

    Raises:
        WeightsError: If it is missing or not a JSON object. The message names a model that lies nearby.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise WeightsError(
            f"There is no {CONFIG} in {folder}, so it holds no model. "
            + (_nearby(folder) or "'theia export' writes folders that do.")
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror or error}). Mend that, or copy the model."
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}). Fetch or export the model again.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds no JSON object. Fetch or export the model again.")
    return config


def _nearby(path: Path) -> str:
    """Advice where a path holds no model: those in it, set aside from it, or near it; empty if there are none."""
    around = [path.parent]
    if path.parent.name in ("onnx", "timm", "checkpoints"):
        around += [path.parent.parent, path.parent.parent.parent]
    aside = [set_aside(path)] if path.name else []
    for place in (path, *aside, *around):
        found = [model for model in _models_in(place) if model != path]
        if found:
            return f"Give one nearby: {' or '.join(str(model) for model in found[:_SHOWN])}."
    return ""


def _models_in(folder: Path) -> list[Path]:
    """Models in a folder or a run's folder: exported ones, then checkpoints, the best and the last one first."""
    usual = [folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    others = sorted(folder.glob("*.ckpt")) + sorted(folder.glob("checkpoints/*.ckpt"))
    exported = [place for place in (folder, folder / "exported") if (place / CONFIG).is_file()]
    return list(dict.fromkeys(exported + [path for path in usual if path.is_file()] + others))


def _check_place(device: str | torch.device, dtype: torch.dtype | None) -> None:
    """Checks device and type before anything is loaded."""
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(
            f"Parameters cannot be of type {dtype!r}. Give torch.float32, torch.bfloat16 or torch.float16."
        )
    try:
        torch.empty(0, device=device)
    # Each kind of device has its own ways to say that there is none.
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"The encoder cannot be put on device {device!r}: {reason}. Give 'cpu' or another device."
        ) from error


def _from_checkpoint(path: Path) -> Encoder:
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_nearby(path)}".strip()) from error
    options = checkpoint["hyper_parameters"]
    encoder = _build(options, "none", str(path))
    encoder.distiller.use_normalizer(options.get("normalizer", "std"), options.get("normalizer_exponent", POWER))
    tensors = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith(PREFIX)}
    load_strictly(encoder.distiller, _without_prefix(tensors), str(path))
    encoder.distiller.fold()
    return encoder


def _from_folder(folder: Path, origin: str) -> Encoder:
    config = read_config(folder)
    tensors = _read_tensors(folder, origin)
    if published.is_config(config):
        encoder = Encoder(*published.read_config(config, origin))
        names = [name for name, _ in encoder.distiller.named_parameters()]
        # The rest are constants of all published models, and statistics, which they do not have.
        load_strictly(encoder.distiller, published.from_theirs(tensors, names, origin), origin, names)
    elif config.get("model_type") == MODEL_TYPE:
        encoder = _build_ours(config, origin)
        load_strictly(encoder.distiller, _without_prefix(tensors), origin)
    else:
        raise WeightsError(
            f"The model {origin} is of another family (model_type {config.get('model_type')!r}). Give a folder that "
            "'theia export' wrote, or a published Theia model."
        )
    return encoder


def _build_ours(config: dict[str, Any], origin: str) -> Encoder:
    options = config.get("architecture")
    if not isinstance(options, dict):
        raise WeightsError(f"The {CONFIG} of {origin} has no architecture. Export the model again.")
    options = older.options(options)
    unknown = set(options) - {field.name for field in fields(Architecture)}
    if unknown:
        raise WeightsError(
            f"The architecture of {origin} has options that this version does not know: {', '.join(sorted(unknown))}. "
            f"It was written by theia {config.get('theia_version')}; install that, or export the model again."
        )
    return _build(options, config.get("pool", "none"), origin)


def _build(options: dict[str, Any], pool: str, origin: str) -> Encoder:
    try:
        return Encoder(Architecture.of(options), check_pool(pool))
    # A file may hold anything, and building from it may fail anywhere.
    except (TheiaError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"The architecture of {origin} is incomplete or wrong: {error} Export the model again."
        ) from error


def _read_tensors(folder: Path, origin: str) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise WeightsError(f"The model {origin} has no {WEIGHTS}. Fetch or export it again.")
    try:
        return older.tensors(load_file(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read ({error}): it is cut short, damaged or of another kind. Fetch or export it again."
        ) from error


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _fetch(repository: str, revision: str | None) -> Path:
    # Not at the top: it takes long to import, and a local model does not need it.
    from huggingface_hub import hf_hub_download

    with known_to_answer(repository):
        try:
            paths = [hf_hub_download(repository, name, revision=revision) for name in (CONFIG, WEIGHTS)]
        except Exception as error:
            # Between here and the hub are several libraries, each with its own exceptions.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WeightsError(
                f"There is no local folder {repository!r}, and it cannot be loaded from the Hugging Face hub either: "
                f"{type(error).__name__}: {reason} Without a network, give a local folder that holds {CONFIG} and "
                f"{WEIGHTS}."
            ) from error
    return Path(paths[0]).parent
