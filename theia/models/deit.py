"""Pretrained DeiT weights for the student, from timm's hub or a file, copied strictly into any variant."""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from theia.errors import WeightsError

logger = logging.getLogger(__name__)

# Every DeiT was trained with these values.
LAYER_NORM_EPS = 1e-6
PIXEL_MEAN = IMAGENET_DEFAULT_MEAN
PIXEL_STD = IMAGENET_DEFAULT_STD

_HEAD = ("head.weight", "head.bias")  # the classifier, which a student does not need
_LOCAL_HINT = "A timm DeiT checkpoint on disk works too: weights=PATH (.safetensors or .pth)."


@dataclass(frozen=True)
class PretrainedWeights:
    """Pretrained parameters of a DeiT under timm's names.

    Attributes:
        origin: Name of the source, for messages.
        parameters: Tensors by name, for one CLS token, no registers and a square grid of positions.
    """

    origin: str
    parameters: Mapping[str, Tensor]


def fetch(size: str) -> PretrainedWeights:
    """Weights of DeiT-Tiny, -Small or -Base at 224 pixels from timm's hub, or from its cache on this machine.

    Args:
        size: ``"tiny"``, ``"small"`` or ``"base"``.

    Raises:
        WeightsError: If the hub cannot be reached or its file cannot be read.
    """
    name = f"deit_{size}_patch16_224.fb_in1k"
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:
        # Between here and the hub are three libraries, each with its own exceptions.
        raise WeightsError(
            f"Cannot get the weights of {name!r} from timm's hub: {type(error).__name__}: {error}. {_LOCAL_HINT}"
        ) from error
    return PretrainedWeights(name, model.state_dict())


def read(path: str | os.PathLike[str]) -> PretrainedWeights:
    """Weights from a timm DeiT checkpoint.

    Args:
        path: A ``.safetensors`` or torch file. Torch files are read without executing what they may contain.

    Raises:
        WeightsError: If the file is missing or cannot be read.
    """
    path = existing_file(path)
    try:
        parameters = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        # A damaged file can raise any exception.
        raise WeightsError(
            f"Cannot read the weights in {str(path)!r}: {type(error).__name__}: {error}. Fetch the file again."
        ) from error
    return PretrainedWeights(str(path), parameters)


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file, with a leading ``~`` replaced by the home folder.

    Raises:
        WeightsError: If there is no such file.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111  (Path's own raises where there is no such user)
    if not path.is_file():
        raise WeightsError(f"No weights file {str(path)!r}. Give 'scratch', 'pretrained' or the path of a checkpoint.")
    return path


@torch.no_grad()
def copy_into(vit: VisionTransformer, weights: PretrainedWeights) -> None:
    """Copies pretrained weights into a student's transformer.

    Patch positions are resized to the student's grid where it differs (bicubic, antialiased). A student
    without CLS leaves out the CLS token and its position. DeiT has no registers, so registers and their positions
    keep their initial values, and the log names them. Every other parameter must be present in the right shape, and
    no tensor may be left over.

    Args:
        vit: The student's transformer, initialised, without a classifier.
        weights: Pretrained weights to copy.

    Raises:
        WeightsError: If a tensor is missing, left over, of another shape, or not finite.
    """
    given = {name: tensor for name, tensor in weights.parameters.items() if name not in _HEAD}
    wanted = dict(vit.named_parameters())
    fresh = {"reg_token"} & wanted.keys()
    expected = wanted.keys() - fresh | {"cls_token"}
    _refuse_if(
        weights.origin,
        [f"{name} is missing" for name in sorted(expected - given.keys())]
        + [f"{name} is left over" for name in sorted(given.keys() - expected)],
    )
    _refuse_if(
        weights.origin,
        [f"{name} is not finite" for name, tensor in given.items() if not tensor.isfinite().all()],
    )
    if "cls_token" not in wanted:
        given.pop("cls_token")
    given["pos_embed"] = _positions(vit, given["pos_embed"], weights.origin)
    _refuse_if(
        weights.origin,
        [
            f"{name} has shape {tuple(tensor.shape)}, the student {tuple(wanted[name].shape)}"
            for name, tensor in given.items()
            if tensor.shape != wanted[name].shape
        ],
    )
    for name, tensor in given.items():
        wanted[name].copy_(tensor)
    if fresh:
        logger.info("%s has no registers: reg_token and its positions in pos_embed start new.", weights.origin)


def _positions(vit: VisionTransformer, given: Tensor, origin: str) -> Tensor:
    """The student's position embedding: CLS and patches from ``given``, registers from the student."""
    own = vit.get_parameter("pos_embed")
    tokens = given.shape[1] if given.ndim == 3 else 0
    side = math.isqrt(max(tokens - 1, 0))
    if tokens != 1 + side * side or side == 0 or given.shape[2] != own.shape[2]:
        problem = f"pos_embed has shape {tuple(given.shape)}, not (1, 1 + side * side, {own.shape[2]})"
        _refuse_if(origin, [problem])
    rows, columns = vit.patch_embed.grid_size
    patches = resample_abs_pos_embed(given[:, 1:], [rows, columns], [side, side], num_prefix_tokens=0)
    has_cls = int(vit.cls_token is not None)
    registers = own[:, has_cls : own.shape[1] - rows * columns]
    return torch.cat([given[:, :has_cls], registers, patches], dim=1)


def _refuse_if(origin: str, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise WeightsError(
            f"The weights of {origin!r} do not fit this student: {problems[0]}{more}. Choose the student's "
            "size that they belong to, or weights of a plain DeiT with patches of 16."
        )
