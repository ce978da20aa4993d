"""What every backbone of a student has: tokens, a stride, blocks; and the options that choose one.

All backbones are models of timm, the paper's own ViT (:mod:`theia.models.vit`) and any other that gives spatial
features (:mod:`theia.models.timm_backbone`). Nothing outside these files knows timm's models, patches and strides.
"""

import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from theia.errors import ConfigError, ShapeError
from theia.models.positions import PositionRule

Registers = Literal[0, 1, 4, 8]

TIMM = "timm:"
THEIA_SHAPES: dict[str, tuple[int, int, int]] = {  # width, depth, heads: DeiT
    "theia_tiny": (192, 12, 3),
    "theia_small": (384, 12, 6),
    "theia_base": (768, 12, 12),
}
PATCHES = (16, 14)
"""Pixels along each side of a patch: of the paper's ViT, and of DINOv2's."""


@dataclass(frozen=True, kw_only=True)
class StudentOptions:
    """What decides which student is built. The command line, checkpoints and model cards take it from here.

    Attributes:
        backbone: Backbone of the student: theia_tiny, theia_small or theia_base, the paper's ViTs; or timm:NAME, any
            model of timm that gives spatial features.
        backbone_stage: For a backbone of timm, the stage, from 0, whose features are used, for instance the one of
            stride 16; the last by default.
        image_size: Height and width of the training images, in pixels.
        registers: Register tokens of a theia backbone, of which CLS is the first; 0 removes CLS too.
        weights: Start of the student: "scratch", "pretrained" (from timm's hub) or the path of a timm checkpoint.
        width: Overrides the width of a theia backbone, for small experiments.
        depth: Overrides the number of blocks of a theia backbone.
        heads: Overrides the number of attention heads of a theia backbone.
        positions: How the position embedding of a theia backbone is resized; the published models have their own rule.
    """

    backbone: str = "theia_tiny"
    backbone_stage: int | None = None
    image_size: int = 224
    registers: Registers = 1
    weights: str = "scratch"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    positions: PositionRule = "size"


@dataclass(frozen=True)
class StudentTokens:
    """What the student gives for a batch.

    Attributes:
        cls: CLS token, shape ``(B, C)``, or ``None`` for a student without one.
        registers: The other register tokens, shape ``(B, R, C)``; ``R`` may be 0.
        patches: Spatial tokens, row by row, shape ``(B, N, C)``.
        grid: Rows and columns of ``patches``, ``N = H * W``.
    """

    cls: Tensor | None
    registers: Tensor
    patches: Tensor
    grid: tuple[int, int]

    def as_map(self) -> Tensor:
        """The patch tokens as a feature map, shape ``(B, C, H, W)``: a view that lies channels last in memory."""
        return self.patches.reshape(len(self.patches), *self.grid, self.patches.shape[-1]).permute(0, 3, 1, 2)


class Backbone(nn.Module, ABC):
    """Normalised pixels in, tokens out: one of timm's models with one face.

    Args:
        model: The model, whose ``forward_features`` gives tokens ``(B, prefix + N, C)`` or maps.

    Attributes:
        model: The model.
        image_hw: Height and width of a training image, in pixels.
        stride: Pixels along each side of a spatial token.
        width: Channels of a token.
        prefix: Tokens before the spatial ones.
        has_cls: Whether the first of them is a CLS token.
        mean: Mean of each colour, of values from 0 to 1, that the pixels are normalised with.
        std: Standard deviation of each colour.
        any_size: Whether images of other sizes than that of training can be taken.
        any_size_exported: Whether a graph made of the model can take them.
    """

    model: Any
    image_hw: tuple[int, int]
    stride: int
    width: int
    prefix: int
    has_cls: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    any_size: bool
    any_size_exported: bool

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._never: frozenset[str] = frozenset()  # names of parameters that spatial tokens do not depend on
        # Of transformers alone; only they give their intermediates as tokens.
        options = inspect.signature(self.model.forward_intermediates).parameters if self._has_intermediates else {}
        self._is_transformer = "return_prefix_tokens" in options

    @abstractmethod
    def load_weights(self, weights: str) -> None:
        """Takes pretrained weights.

        Args:
            weights: ``"pretrained"``, for those of timm's hub, or the path of a checkpoint of timm's model.

        Raises:
            WeightsError: If they cannot be had or do not fit.
        """

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of spatial tokens of a training image."""
        return self.image_hw[0] // self.stride, self.image_hw[1] // self.stride

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    def blocks(self) -> list[nn.Module]:
        """Blocks of a transformer, stages of another model, in the order in which they are passed."""
        if self._is_transformer:
            return list(self.model.blocks)
        return [self.model.get_submodule(stage["module"]) for stage in self._stages]

    def unfreeze(self, last_n_blocks: int | None = None) -> None:
        """Lets a training change the parameters that spatial tokens depend on.

        Args:
            last_n_blocks: Only so many of :meth:`blocks`, from the end, and what follows them, such as the final norm.
                All parameters by default.
        """
        # timm's models hold their layers in the order in which they are passed.
        parameters = list(self.named_parameters())
        first = 0
        if last_n_blocks is not None:
            blocks = self.blocks()
            places = {id(parameter): place for place, (_, parameter) in enumerate(parameters)}
            kept = blocks[: len(blocks) - last_n_blocks]
            first = (
                1 + max(places[id(parameter)] for parameter in kept[-1].parameters())
                if kept
                else min(places[id(parameter)] for parameter in blocks[0].parameters())
            )
        for name, parameter in parameters[first:]:
            parameter.requires_grad_(name not in self._never)

    def check_size(self, height: int, width: int) -> None:
        """Refuses images that the backbone cannot take.

        Args:
            height: Height of the images, in pixels.
            width: Width of them.

        Raises:
            ShapeError: Names the nearest sizes.
        """
        if not self.any_size and (height, width) != self.image_hw:
            size = "{}x{}".format(*self.image_hw)
            raise ShapeError(f"Images of {height}x{width} pixels; this backbone takes {size} alone. Resize them.")
        check_divides(height, width, self.stride)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The size nearest to one in pixels that the backbone takes.

        Args:
            height: Height of an image, in pixels.
            width: Width of it.
        """
        if not self.any_size:
            return self.image_hw
        rows, columns = (max(1, int(side / self.stride + 0.5)) for side in (height, width))
        return rows * self.stride, columns * self.stride

    def tokens(self, pixels: Tensor) -> StudentTokens:
        """Tokens after the last layer.

        Args:
            pixels: Normalised images, shape ``(B, 3, H, W)``, of a size that :meth:`check_size` lets pass.
        """
        return self._split(self.model.forward_features(pixels), pixels)

    def intermediates(self, pixels: Tensor, indices: Iterable[int], norm: bool = False) -> list[StudentTokens]:
        """Tokens after some of the blocks.

        Args:
            pixels: See :meth:`tokens`.
            indices: Blocks, from 0; negative ones count from the end.
            norm: Whether to apply the final norm to each, where the model has one for them.

        Returns:
            In the order of the indices, one for each.

        Raises:
            ConfigError: If there is no such block, or the model does not give any.
        """
        wanted = [self._number(index) for index in indices]
        if not wanted:
            return []
        options: dict[str, Any] = {"norm": norm, "stop_early": True, "intermediates_only": True}
        if self._is_transformer:
            options |= {"output_fmt": "NLC", "return_prefix_tokens": True}
        order = sorted(set(wanted))
        found = {}
        for number, features in zip(
            order, self.model.forward_intermediates(pixels, indices=order, **options), strict=True
        ):
            if isinstance(features, tuple):  # spatial tokens and prefix, where there is one
                found[number] = self._of_tokens(features[1], features[0], pixels)
            elif self._is_transformer:
                found[number] = self._of_tokens(features[:, :0], features, pixels)
            else:
                found[number] = of_map(features.permute(0, 2, 3, 1))
        return [found[number] for number in wanted]

    @property
    def _has_intermediates(self) -> bool:
        return hasattr(self.model, "forward_intermediates") and hasattr(self.model, "feature_info")

    @property
    def _stages(self) -> list[dict[str, Any]]:
        return list(self.model.feature_info) if self._has_intermediates else []

    def _number(self, index: int) -> int:
        """The number of a block, counted from the first one."""
        depth = len(self.blocks())
        try:
            number = operator.index(index)
        except TypeError:
            number = depth
        if not -depth <= number < depth:
            raise ConfigError(f"There is no block {index!r}; this student has {depth}, numbered from 0.")
        return number % depth

    def _split(self, features: Tensor, pixels: Tensor) -> StudentTokens:
        if features.ndim == 4:
            channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            return of_map(features if channels_last else features.permute(0, 2, 3, 1))
        return self._of_tokens(features[:, : self.prefix], features[:, self.prefix :], pixels)

    def _of_tokens(self, prefix: Tensor, patches: Tensor, pixels: Tensor) -> StudentTokens:
        return StudentTokens(
            cls=prefix[:, 0] if self.has_cls else None,
            registers=prefix[:, int(self.has_cls) :],
            patches=patches,
            grid=(pixels.shape[2] // self.stride, pixels.shape[3] // self.stride),
        )


def check_divides(height: int, width: int, patch: int) -> None:
    """Refuses a size that does not divide into patches.

    Args:
        height: Height of an image, in pixels.
        width: Width of it.
        patch: Pixels along each side of a patch.

    Raises:
        ShapeError: Names the nearest sizes.
    """
    if height % patch == 0 and width % patch == 0 and min(height, width) > 0:
        return
    below = (height // patch, width // patch)
    above = (-(-height // patch), -(-width // patch))
    nearest = dict.fromkeys(f"{max(rows, 1) * patch}x{max(cols, 1) * patch}" for rows, cols in (below, above))
    raise ShapeError(
        f"Images of {height}x{width} pixels do not divide into patches of {patch}x{patch}. Resize them; the "
        f"nearest sizes: {', '.join(nearest)}."
    )


def of_map(maps: Tensor) -> StudentTokens:
    """Tokens of feature maps ``(B, H, W, C)``."""
    patches = maps.flatten(1, 2)
    return StudentTokens(None, patches[:, :0], patches, (maps.shape[1], maps.shape[2]))
