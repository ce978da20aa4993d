"""One function per format: each writes into a folder that is not yet in place."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from theia.encoder import published
from theia.encoder.encoder import Encoder
from theia.encoder.load import CONFIG, MODEL_TYPE, PREFIX, WEIGHTS
from theia.errors import ConfigError, ExportError
from theia.export import card, onnx
from theia.models.architecture import Architecture
from theia.models.backbone import THEIA_SHAPES
from theia.types import Json
from theia.version import __version__

_TIMM_CLASSES = 1000


@dataclass(frozen=True)
class Exported:
    """A model to export, with what its folder says about it.

    Attributes:
        encoder: Encoder on the CPU, in float32.
        architecture: Architecture of the encoder.
        record: Record of its training, as for :func:`theia.export.card.text`.
        formats: Names of all formats that the folder will hold.
        int8: Whether there is an int8 ONNX graph, too.
    """

    encoder: Encoder
    architecture: Architecture
    record: Mapping[str, Any]
    formats: tuple[str, ...] = ()
    int8: bool = False


def write_safetensors(model: Exported, folder: Path) -> list[str]:
    """``config.json``, ``model.safetensors`` and a model card: what ``theia.load`` and ``AutoModel`` read."""
    config: dict[str, Json] = {
        "model_type": MODEL_TYPE,
        "architectures": ["TheiaModel"],
        "theia_version": __version__,
        "architecture": model.architecture.as_dict(),
        "pool": model.encoder.pool,
        "record": dict(model.record),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {PREFIX + name: tensor for name, tensor in model.encoder.distiller.state_dict().items()}
    _save(tensors, folder / WEIGHTS)
    formats = {name: _DESCRIPTIONS[name](model) for name in dict.fromkeys(model.formats) if name in _DESCRIPTIONS}
    (folder / "README.md").write_text(
        card.text(model.encoder, model.architecture, model.record, formats), encoding="utf-8"
    )
    return [f"{CONFIG}, {WEIGHTS}, README.md"]


def write_authors(model: Exported, folder: Path) -> list[str]:
    """The published layout, in a folder of its own."""
    target = folder / "authors"
    target.mkdir()
    config = published.write_config(model.architecture, model.encoder.pool)
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    parameters = {name: parameter.detach() for name, parameter in model.encoder.distiller.named_parameters()}
    _save(published.to_theirs(parameters), target / WEIGHTS)
    return [f"authors/{CONFIG}, authors/{WEIGHTS}"]


def write_timm(model: Exported, folder: Path) -> list[str]:
    """Weights of the student that ``timm.create_model(NAME, checkpoint_path=FILE)`` loads strictly.

    timm's model has a classifier, which is filled with zeros as the student has none, and another layer-norm epsilon.

    Raises:
        ExportError: If timm has no such model.
    """
    name = _timm_name(model.architecture)
    width = model.encoder.width
    tensors = {
        **model.encoder.distiller.student.backbone.model.state_dict(),
        "head.weight": torch.zeros(_TIMM_CLASSES, width),
        "head.bias": torch.zeros(_TIMM_CLASSES),
    }
    (folder / "timm").mkdir()
    path = folder / "timm" / f"{name}.safetensors"
    _save(tensors, path)
    theirs: Any = timm.create_model(name, checkpoint_path=str(path)).eval()
    images = torch.from_numpy(onnx.photographs(224, 224)).permute(0, 3, 1, 2)
    student = model.encoder.distiller.student
    with torch.inference_mode():
        pixels = (images.float() / 255 - student.pixel_mean) / student.pixel_std
        difference = float((theirs.forward_features(pixels)[:, 1:] - student.encode(images).patches).abs().max())
    return [
        f"timm/{path.name}: {_pixels(model)}; features differ by up to {difference:.1e}, as timm's layer norms have "
        "another epsilon"
    ]


def write_onnx(model: Exported, folder: Path) -> list[str]:
    """A graph for any batch and size, and a report of how well it agrees with the encoder.

    Raises:
        ConfigError: If packages are missing.
        ExportError: If the graph does not agree with the encoder.
    """
    found = onnx.export(model.encoder, folder / "onnx", model.int8)
    report = {"least_cosine_allowed": {onnx.MODEL: onnx.LEAST_COSINE, onnx.INT8_MODEL: onnx.LEAST_INT8_COSINE}, **found}
    (folder / "onnx" / "parity.json").write_text(json.dumps(report, indent=2) + "\n")
    return [
        f"onnx/{name}: on photographs of {size} differs by up to {values['largest_difference']:.1e}, least cosine "
        f"{values['least_cosine']:.7f}"
        for name, sizes in found.items()
        for size, values in sizes.items()
    ]


def check(model: Exported, formats: list[str]) -> None:
    """Checks that every format can be written, before anything is written.

    Raises:
        ConfigError: If a format is unknown, or a package is missing for it.
        ExportError: If a format cannot hold this model.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(f"There is no format {(unknown or [''])[0]!r}. Choose from: {', '.join(FORMATS)}.")
    if model.int8 and "onnx" not in formats:
        raise ConfigError("--int8 is about ONNX. Add it: --formats safetensors,onnx.")
    if "onnx" in formats:
        onnx.check_installed()
    if "timm" in formats:
        _timm_name(model.architecture)
    if "authors" in formats:
        published.write_config(model.architecture, model.encoder.pool)


def _timm_name(architecture: Architecture) -> str:
    a = architecture
    changed = any((a.width, a.depth, a.heads, a.lift, a.wide_last))
    if a.backbone not in THEIA_SHAPES or (a.image_size, a.registers) != (224, 1) or changed:
        raise ExportError(
            "timm has no model for this student: only DeiT-Tiny, -Small and -Base of 224 pixels with a CLS token. "
            "Leave out the format 'timm'."
        )
    return f"deit_{a.backbone.removeprefix('theia_')}_patch16_224"


def _pixels(model: Exported) -> str:
    student = model.encoder.distiller.student
    mean, std = (
        [round(float(value), 4) for value in values.flatten()] for values in (student.pixel_mean, student.pixel_std)
    )
    return f"pixels with mean {mean} and deviation {std}"


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Others read these files: plain memory order, whatever is fastest here. Python writes them, as the library's own
    # writer raises an error of its own on a full disk, and lets nobody but the owner read the file.
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"}))


def _describe_onnx(_: Exported) -> str:
    return (
        "`onnx/`: graphs for ONNX Runtime and OpenVINO, `images` uint8 (B, H, W, 3) in, features out; how well they "
        "agree with the model is in `onnx/parity.json`"
    )


def _describe_timm(model: Exported) -> str:
    name = _timm_name(model.architecture)
    return (
        f'`timm/`: `timm.create_model("{name}", checkpoint_path="timm/{name}.safetensors")`; normalise {_pixels(model)}'
        ", which is not timm's default for that name"
    )


def _describe_authors(_: Exported) -> str:
    return "`authors/`: the layout of the published Theia models"


_DESCRIPTIONS: dict[str, Callable[[Exported], str]] = {
    "onnx": _describe_onnx,
    "timm": _describe_timm,
    "authors": _describe_authors,
}

FORMATS: dict[str, Callable[[Exported, Path], list[str]]] = {
    "safetensors": write_safetensors,
    "hf": write_safetensors,
    "onnx": write_onnx,
    "timm": write_timm,
    "authors": write_authors,
}
"""Writers by the names of ``--formats``; ``hf`` is another name for ``safetensors``, which ``AutoModel`` reads."""
