"""Loads weights whole or not at all: every tensor is used and every parameter is set, or an error lists the exceptions.

Pretrained DeiT weights for the paper's backbone come from timm's hub or from a file.
"""

import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from theia.errors import WeightsError

logger = logging.getLogger(__name__)

_SHOWN = 8  # tensors in a message
_EXPORT_AGAIN = "Fetch or export the model again, so that its files belong together."
_HEAD = ("head.weight", "head.bias")  # the classifier, which a student does not need
_LOCAL_HINT = "A timm DeiT checkpoint on disk works too: weights=PATH (.safetensors or .pth)."
_OTHER_DEIT = (
    "Choose the student's size that they belong to, or give weights of a plain DeiT with patches of 16x16 pixels."
)


def load_strictly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    origin: str,
    names: Collection[str] | None = None,
    advice: str = _EXPORT_AGAIN,
) -> None:
    """Copies tensors into a module whose tensors have the same names and shapes.

    Args:
        module: Module whose parameters and persistent buffers are set.
        tensors: Tensors to copy, by name.
        origin: Name of the source of the tensors, for messages.
        names: Names that must be given; by default all names of the module.
        advice: Last sentence of the message, which tells the user what to do.

    Raises:
        WeightsError: If a tensor is missing or left over, has another shape or kind of number, or is not finite, or if
            a standard deviation is not positive.
    """
    own = module.state_dict()
    refuse_unless_equal(own.keys() if names is None else names, tensors.keys(), origin, advice)
    _refuse_if(
        [
            f"{name} has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            for name, tensor in tensors.items()
            if tensor.shape != own[name].shape
        ]
        or [
            f"{name} is {tensor.dtype}"
            for name, tensor in tensors.items()
            if tensor.is_floating_point() != own[name].is_floating_point()
        ]
        or [f"{name} is not finite" for name, tensor in tensors.items() if not tensor.isfinite().all()]
        or [
            f"{name} is not positive"
            for name, tensor in tensors.items()
            if name.endswith((".std", "_std")) and not (tensor > 0).all()
        ],
        origin,
        advice,
    )
    module.load_state_dict(dict(tensors), strict=False)


def refuse_unless_equal(
    expected: Collection[str], given: Collection[str], origin: str, advice: str = _EXPORT_AGAIN
) -> None:
    """Refuses weights whose tensors have other names than those of the model.

    Args:
        expected: Names of the model's tensors.
        given: Names of the tensors to load.
        origin: Name of their source, for the message.
        advice: Last sentence of the message, which tells the user what to do.

    Raises:
        WeightsError: If a name is missing or left over.
    """
    _refuse_if(
        [f"{name} is missing" for name in sorted(set(expected) - set(given))]
        + [f"{name} is left over" for name in sorted(set(given) - set(expected))],
        origin,
        advice,
    )


def _refuse_if(problems: list[str], origin: str, advice: str) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise WeightsError(f"The weights of {origin} do not fit: {'; '.join(problems[:_SHOWN])}{more}. {advice}")


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file, with a leading ``~`` replaced by the home folder.

    Raises:
        WeightsError: If there is no such file.
    """
    path = Path(os.path.expanduser(path))  # noqa: PTH111  (Path's own raises where there is no such user)
    if not path.is_file():
        raise WeightsError(f"No weights file {str(path)!r}. Give 'scratch', 'pretrained' or the path of a checkpoint.")
    return path


@dataclass(frozen=True)
class DeiTWeights:
    """Pretrained parameters of a DeiT under timm's names.

    Attributes:
        origin: Name of the source, for messages.
        parameters: Tensors by name, for one CLS token, no registers and a square grid of positions.
    """

    origin: str
    parameters: Mapping[str, Tensor]


def fetch_deit(size: str) -> DeiTWeights:
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
    return DeiTWeights(name, model.state_dict())


def read_deit(path: str | os.PathLike[str]) -> DeiTWeights:
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
    return DeiTWeights(str(path), parameters)


def load_deit(vit: VisionTransformer, weights: DeiTWeights, new: tuple[str, ...] = ()) -> None:
    """Copies pretrained weights into a student's transformer.

    Patch positions are resized to the student's grid where it differs (bicubic, antialiased). A student
    without CLS leaves out the CLS token and its position. DeiT has no registers, so registers and their positions
    keep their initial values, and so do layers of another width than DeiT's; the log names them.

    Args:
        vit: The student's transformer, initialised, without a classifier.
        weights: Pretrained weights to copy.
        new: What the names of the layers of another width begin with.

    Raises:
        WeightsError: See :func:`load_strictly`.
    """
    given = {name: tensor for name, tensor in weights.parameters.items() if name not in _HEAD}
    replaced = [name for name in given if name.startswith(new)]
    found = {part for part in new for name in replaced if name.startswith(part)}
    refuse_unless_equal(new, found, weights.origin, _OTHER_DEIT)
    given = {name: tensor for name, tensor in given.items() if not name.startswith(new)}
    names = {name for name in vit.state_dict() if name != "reg_token" and not name.startswith(new)}
    refuse_unless_equal(names | {"cls_token"}, given.keys(), weights.origin, _OTHER_DEIT)
    given["pos_embed"] = _positions(vit, given["pos_embed"], weights.origin)
    if vit.cls_token is None:
        del given["cls_token"]
    load_strictly(vit, given, weights.origin, names, _OTHER_DEIT)
    if vit.reg_token is not None:
        logger.info("%s has no registers: reg_token and its positions in pos_embed start new.", weights.origin)
    if new:
        layers = " and ".join(name.removesuffix(".") for name in new)
        logger.warning("In %s, %s are of another width: they start new.", weights.origin, layers)


def _positions(vit: VisionTransformer, given: Tensor, origin: str) -> Tensor:
    """The student's position embedding: CLS and patches from ``given``, registers from the student."""
    own = vit.get_parameter("pos_embed").detach()
    tokens = given.shape[1] if given.ndim == 3 else 0
    side = math.isqrt(max(tokens - 1, 0))
    if tokens != 1 + side * side or side == 0 or given.shape[2] != own.shape[2]:
        problem = f"pos_embed has shape {tuple(given.shape)}, not (1, 1 + side * side, {own.shape[2]})"
        _refuse_if([problem], origin, _OTHER_DEIT)
    rows, columns = vit.patch_embed.grid_size
    patches = resample_abs_pos_embed(given[:, 1:], [rows, columns], [side, side], num_prefix_tokens=0)
    has_cls = int(vit.cls_token is not None)
    registers = own[:, has_cls : own.shape[1] - rows * columns]
    return torch.cat([given[:, :has_cls], registers, patches], dim=1)
