"""The layout of the published models: their ``config.json`` and their names of the same parameters.

A published folder names its teachers by hub id and holds no statistics of their features. Its transformer has the names
of transformers' ViT, with separate queries, keys and values.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from theia.encoder.encoder import Pool
from theia.errors import ExportError, WeightsError
from theia.models.architecture import Architecture
from theia.models.backbone import THEIA_SHAPES, PositionRule
from theia.models.weights import refuse_unless_equal

_BACKBONE = re.compile(r"facebook/deit-(tiny|small|base)-patch16-224")
_POOLS: dict[str | None, Pool] = {None: "none", "mean_pooling": "mean", "max_pooling": "max", "cls": "cls"}

POSITIONS: PositionRule = "scale_factor"
"""Rule by which published models resize their position embedding; models trained here use another."""

# Names of teachers in published models, by our names. Other teachers have the same name in both.
HUB_IDS = {
    "clip": "openai/clip-vit-large-patch14",
    "dinov2": "facebook/dinov2-large",
    "vit": "google/vit-huge-patch14-224-in21k",
    "sam": "facebook/sam-vit-huge",
    "depth_anything": "LiheYoung/depth-anything-large-hf",
}

# Published names of the student's transformer, by timm's names.
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = [f"attention.attention.{part}" for part in ("query", "key", "value")]
_VIT = "student.backbone.model."
_THEIR_VIT = "backbone.model."
_THEIR_HEADS = "translator.translator_heads."


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` belongs to a published model."""
    return "backbone" in config and "target_feature_sizes" in config


def read_config(config: Mapping[str, Any], origin: str) -> tuple[Architecture, Pool]:
    """Architecture and default pooling of a published model.

    Args:
        config: Content of the model's ``config.json``.
        origin: Path or id of the model, for messages.

    Raises:
        WeightsError: If the config is incomplete, or the model is of a kind that was never released.
    """
    match = _BACKBONE.fullmatch(str(config["backbone"]))
    unusual = {
        name: config[name]
        for name, usual in {
            "num_reg_tokens": (0, None), "translator_type": ("lconv", None),
            "translator_hidden_size_factor": (1.0, None), "feature_neck": (False, None), "forward_neck": (False, None),
            "image_size": (224, None),
        }.items()
        if config.get(name) not in usual
    }  # fmt: skip
    pooled = config.get("feature_reduce_method")
    if match is None or unusual or pooled not in list(_POOLS):
        unusual |= {name: config.get(name) for name in ("backbone", "feature_reduce_method")}
        raise WeightsError(
            f"The model {origin} is of a kind that was never released: "
            f"{', '.join(f'{name} {value!r}' for name, value in unusual.items())}. "
            "Only those with facebook/deit-*-patch16-224 backbones, a CLS token and convolutional translators can be "
            "read."
        )
    teachers = {}
    for hub_id, (channels, rows, columns) in _feature_sizes(config, origin).items():
        if (rows, columns) not in ((16, 16), (64, 64)) or "." in hub_id:
            raise WeightsError(
                f"The config of {origin} has a teacher {hub_id!r} with a grid of {rows}x{columns}; published "
                "translators are for 16x16 and 64x64."
            )
        teachers[hub_id] = {"channels": channels, "grid_hw": [rows, columns], "has_cls": False}
    architecture = Architecture(teachers=teachers, backbone=f"theia_{match[1]}", positions=POSITIONS)
    return architecture, _POOLS[pooled]


def _feature_sizes(config: Mapping[str, Any], origin: str) -> dict[str, tuple[int, int, int]]:
    sizes = config["target_feature_sizes"]
    try:
        found = {name: (int(channels), int(rows), int(columns)) for name, (channels, rows, columns) in sizes.items()}
    except (AttributeError, TypeError, ValueError):
        found = {}
    if not found:
        raise WeightsError(
            f"The config of {origin} has target_feature_sizes {sizes!r}; it must be [channels, rows, columns] for each "
            "teacher. Fetch the model again."
        )
    return found


def write_config(architecture: Architecture, pool: Pool) -> dict[str, Any]:
    """The ``config.json`` of a model of ours in the published layout.

    Args:
        architecture: Architecture of the model.
        pool: Default pooling of the model.

    Raises:
        ExportError: If the published layout cannot hold the model.
    """
    _check_can_be_published(architecture)
    return {
        "architectures": ["TheiaModel"],
        "backbone": f"facebook/deit-{architecture.backbone.removeprefix('theia_')}-patch16-224",
        "feature_neck": False,
        "feature_neck_hidden_dim": 256,
        "feature_neck_nonlinearity": "relu",
        "feature_reduce_method": {ours: theirs for theirs, ours in _POOLS.items()}[pool],
        "forward_neck": False,
        "image_size": 224,
        "num_reg_tokens": 0,
        "pretrained": False,
        "target_feature_sizes": {
            HUB_IDS.get(name, name): [teacher["channels"], *teacher["grid_hw"]]
            for name, teacher in architecture.teachers.items()
        },
        "target_loss_weights": None,
        "torch_dtype": "float32",
        "translator_hidden_size_factor": 1.0,
        "translator_type": "lconv",
    }


def from_theirs(tensors: Mapping[str, Tensor], names: Iterable[str], origin: str) -> dict[str, Tensor]:
    """Tensors of a published file under our names.

    Args:
        tensors: All tensors of the published file, by name.
        names: Names of our parameters, without statistics.
        origin: Path or id of the file, for messages.

    Raises:
        WeightsError: If a tensor is missing or left over; the message lists them by their published names.
    """
    # Some published files have "_" in place of "/" in the names of heads.
    tensors = {_flat(name): tensor for name, tensor in tensors.items()}
    wanted = {name: [_flat(theirs) for theirs in _theirs(name)] for name in names}
    expected = {theirs for group in wanted.values() for theirs in group}
    refuse_unless_equal(expected, tensors.keys(), origin)
    return {
        name: tensors[group[0]] if len(group) == 1 else torch.cat([tensors[theirs] for theirs in group])
        for name, group in wanted.items()
    }


def to_theirs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their published names.

    Args:
        tensors: Parameters of a distiller, without statistics.
    """
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        group = _theirs(name)
        theirs |= zip(group, tensor.chunk(len(group)), strict=True)
    return theirs


def _theirs(name: str) -> list[str]:
    """The published names of one of our parameters: one, or three for queries, keys and values."""
    if name.startswith(_VIT):
        inner = name.removeprefix(_VIT)
        if inner in _EMBEDDINGS:
            return [_THEIR_VIT + _EMBEDDINGS[inner]]
        _, number, layer = inner.split(".", 2)
        layer, _, kind = layer.rpartition(".")
        layers = _QKV if layer == "attn.qkv" else [_BLOCK[layer]]
        return [f"{_THEIR_VIT}encoder.layer.{number}.{part}.{kind}" for part in layers]
    _, teacher, layer = name.split(".", 2)
    head = HUB_IDS.get(teacher, teacher).replace(".", "_")
    return [f"{_THEIR_HEADS}{head}.{layer.replace('pad.', 'pad.1.')}"]


def _flat(name: str) -> str:
    return name.replace("/", "_")


def _check_can_be_published(architecture: Architecture) -> None:
    a = architecture
    problems = []
    if a.backbone not in THEIA_SHAPES:
        problems.append(f"its student is {a.backbone}, not a DeiT-Tiny, -Small or -Base")
    elif (a.image_size, a.registers) != (224, 1) or any((a.width, a.depth, a.heads)):
        problems.append("its student is not a DeiT-Tiny, -Small or -Base of 224 pixels with a CLS token")
    if a.lift is not None:
        problems.append("its student has a lift")
    if a.wide_last is not None:
        problems.append("its student has a wide last block")
    if a.translator != "cnn" or a.distill_cls:
        problems.append("its translators are not those of the paper")
    if a.weights != "scratch":
        problems.append("its student started from DeiT and normalises images in another way")
    for name, teacher in a.teachers.items():
        if tuple(teacher["grid_hw"]) not in ((16, 16), (64, 64)):
            problems.append("teacher {!r} has a grid of {}x{}".format(name, *teacher["grid_hw"]))
    if problems:
        raise ExportError(
            f"The published layout cannot hold this model: {'; '.join(problems)}. Leave out the format 'authors'."
        )
