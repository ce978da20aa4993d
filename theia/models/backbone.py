"""The interface of every student backbone (tokens, stride, blocks), and the options that choose a backbone.

All backbones are timm models: the paper's ViT (:mod:`theia.models.vit`), or any other that gives spatial features
(:mod:`theia.models.timm_backbone`). Only these files deal with timm's models, patches and strides.
"""

import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from theia.errors import ConfigError, ShapeError
from theia.models import cpu_layers

Registers = Literal[0, 1, 4, 8]
# Rules for resizing a position embedding. "size", our rule and timm's: bicubic, antialiased, from corner to corner.
# "scale_factor", the rule of the published models: bicubic with scale factor (n + 0.1) / trained, not antialiased.
PositionRule = Literal["size", "scale_factor"]

TIMM = "timm:"
THEIA_SHAPES: dict[str, tuple[int, int, int]] = {  # width, depth and heads, as in DeiT
    "theia_tiny": (192, 12, 3),
    "theia_small": (384, 12, 6),
    "theia_base": (768, 12, 12),
}
PATCHES = (16, 14)
"""Side of a patch in pixels, for the paper's ViT and for DINOv2's ViT."""


@dataclass(frozen=True, kw_only=True)
class StudentOptions:
    """Options that decide which student is built. The command line, checkpoints and model cards take them from here.

    Attributes:
        backbone: Backbone of the student: theia_tiny, theia_small or theia_base (the paper's ViTs), or timm:NAME for
            any timm model that gives spatial features.
        backbone_stage: Stage of a timm backbone, counted from 0, whose features are used, for instance the stage with
            stride 16; the last by default.
        image_size: Height and width of the training images, in pixels.
        registers: Number of register tokens of a theia backbone. CLS is the first of them, so 0 removes CLS too.
        weights: Initial weights of the student: "scratch", "pretrained" (from timm's hub) or the path of a timm
            checkpoint.
        width: Width of a theia backbone in place of its usual one, for small experiments.
        depth: Number of blocks of a theia backbone in place of its usual one.
        heads: Number of attention heads of a theia backbone in place of its usual one.
        positions: Rule for resizing the position embedding of a theia backbone; the published models use their own.
        lift: Number of channels to which one more linear layer, which stays at inference, brings the tokens of a small
            student, for instance a teacher's; none by default.
        wide_last: Number of channels of the last block of a theia backbone and of the tokens, in place of the width of
            the other blocks; instead of a lift.
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
    lift: int | None = None
    wide_last: int | None = None


@dataclass(frozen=True)
class StudentTokens:
    """Tokens that the student gives for a batch of images.

    Attributes:
        cls: CLS token, shape ``(B, C)``, or ``None`` for a student without one.
        registers: The other register tokens, shape ``(B, R, C)``; ``R`` may be 0.
        patches: Spatial tokens, row by row, shape ``(B, N, C)``.
        grid: Rows ``H`` and columns ``W`` of the patch tokens, ``N = H * W``.
    """

    cls: Tensor | None
    registers: Tensor
    patches: Tensor
    grid: tuple[int, int]

    def as_map(self) -> Tensor:
        """The patch tokens as a feature map, shape ``(B, C, H, W)``: a view in channels-last memory order."""
        return self.patches.reshape(len(self.patches), *self.grid, self.patches.shape[-1]).permute(0, 3, 1, 2)


class Backbone(nn.Module, ABC):
    """A timm model behind one interface: it takes normalised pixels and gives tokens.

    Args:
        model: The timm model, whose ``forward_features`` gives tokens ``(B, prefix + N, C)`` or feature maps.

    Attributes:
        model: The timm model.
        image_hw: Height and width of a training image, in pixels.
        stride: Side in pixels of the image square behind one spatial token.
        width: Number of channels of a token.
        prefix: Number of tokens before the spatial tokens.
        has_cls: Whether the first prefix token is a CLS token.
        mean: Mean of each colour channel for normalising pixels, on a scale from 0 to 1.
        std: Standard deviation of each colour channel, on the same scale.
        any_size: Whether the model takes images of other sizes than the training size.
        any_size_exported: Whether an exported graph of the model takes images of other sizes.
        is_transformer: Whether the model has transformer blocks, whose tokens it can give.
        has_wide_last: Whether the last block, the final norm and the tokens have a width of their own.
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
    has_wide_last: bool = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        cpu_layers.adapt(model)
        self.model = model
        self._never: frozenset[str] = frozenset()  # names of parameters that spatial tokens do not depend on
        # Only transformers give intermediate features as tokens, and only they have this option.
        options = inspect.signature(self.model.forward_intermediates).parameters if self._has_intermediates else {}
        self.is_transformer = "return_prefix_tokens" in options

    @abstractmethod
    def load_weights(self, weights: str) -> None:
        """Loads pretrained weights.

        Args:
            weights: ``"pretrained"`` for the weights on timm's hub, or the path of a checkpoint of the timm model.

        Raises:
            WeightsError: If the weights cannot be fetched or read, or do not fit.
        """

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the spatial tokens of a training image."""
        return self.image_hw[0] // self.stride, self.image_hw[1] // self.stride

    @property
    def takes_some_patches(self) -> bool:
        """Whether :meth:`tokens_of_kept` works."""
        return hasattr(self.model, "forward_kept")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    def blocks(self) -> list[nn.Module]:
        """Blocks of a transformer, or stages of any other model, in the order of the forward pass."""
        if self.is_transformer:
            return list(self.model.blocks)
        return [self.model.get_submodule(stage["module"]) for stage in self._stages]

    def unfreeze(self, last_n_blocks: int | None = None) -> None:
        """Makes the parameters that spatial tokens depend on trainable.

        Args:
            last_n_blocks: Number of :meth:`blocks`, counted from the end, to make trainable together with the layers
                after them, such as the final norm. All parameters by default.
        """
        # timm's models hold their layers in the order of the forward pass.
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
            width: Width of the images, in pixels.

        Raises:
            ShapeError: If the size does not fit; the message names the nearest sizes.
        """
        if not self.any_size and (height, width) != self.image_hw:
            size = "{}x{}".format(*self.image_hw)
            raise ShapeError(f"Images of {height}x{width} pixels; this backbone takes {size} alone. Resize them.")
        check_divides(height, width, self.stride)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The size nearest to a given one that the backbone takes, height and width in pixels.

        Args:
            height: Height of an image, in pixels.
            width: Width of the image, in pixels.
        """
        if not self.any_size:
            return self.image_hw
        rows, columns = (max(1, int(side / self.stride + 0.5)) for side in (height, width))
        return rows * self.stride, columns * self.stride

    def tokens(self, pixels: Tensor) -> StudentTokens:
        """Tokens after the last layer.

        Args:
            pixels: Normalised images, shape ``(B, 3, H, W)``, of a size that :meth:`check_size` accepts.
        """
        return self._split(self.model.forward_features(pixels), pixels)

    def tokens_of_kept(self, pixels: Tensor, kept: Tensor) -> StudentTokens:
        """Tokens after the last layer, where only some patches of an image are there.

        Args:
            pixels: Normalised images, as for :meth:`tokens`.
            kept: Numbers of the patches that are there, row by row, int64, shape ``(B, K)``.

        Returns:
            The tokens; ``patches`` are those that are there, in that order, shape ``(B, K, C)``.
        """
        return self._split(self.model.forward_kept(pixels, kept), pixels)

    def intermediates(self, pixels: Tensor, indices: Iterable[int], norm: bool = False) -> list[StudentTokens]:
        """Tokens after some of the blocks.

        Args:
            pixels: Normalised images, as for :meth:`tokens`.
            indices: Block numbers, counted from 0; negative numbers count from the end.
            norm: Whether to apply the final norm to each result, where the model has a norm that fits.

        Returns:
            One result for each index, in the order of the indices.

        Raises:
            ConfigError: If there is no such block, the model gives no intermediate features, or the norm is asked for
                of blocks before a wide last one.
        """
        wanted = [self._number(index) for index in indices]
        if not wanted:
            return []
        if norm and self.has_wide_last and min(wanted) < len(self.blocks()) - 1:
            raise ConfigError(
                f"The final norm has the {self.width} channels of the wide last block and does not fit the others. Ask "
                "for their tokens without it."
            )
        if not hasattr(self.model, "forward_intermediates"):
            raise ConfigError(f"{type(self.model).__name__} gives no features of blocks. Ask for the last ones only.")
        options: dict[str, Any] = {"norm": norm, "stop_early": True, "intermediates_only": True}
        if self.is_transformer:
            options |= {"output_fmt": "NLC", "return_prefix_tokens": True}
        order = sorted(set(wanted))
        found = {}
        for number, features in zip(
            order, self.model.forward_intermediates(pixels, indices=order, **options), strict=True
        ):
            if isinstance(features, tuple):  # spatial tokens and prefix tokens, if the model has a prefix
                found[number] = self._of_tokens(features[1], features[0], pixels)
            elif self.is_transformer:
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
        """The number of a block, counted from 0 at the first block."""
        depth = len(self.blocks())
        try:
            number = operator.index(index)
        except TypeError:
            number = depth
        if not -depth <= number < depth:
            raise ConfigError(f"There is no block or stage {index!r}; this student has {depth}, numbered from 0.")
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
        width: Width of the image, in pixels.
        patch: Side of a patch, in pixels.

    Raises:
        ShapeError: If the size does not fit; the message names the nearest sizes.
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


def resized(images: Tensor, size: int | None) -> Tensor:
    """Resizes images as Pillow resizes those that are stored: bicubic, with antialiasing.

    Args:
        images: RGB images, uint8, shape ``(B, 3, H, W)``.
        size: Height and width of the result, in pixels; ``None`` leaves the images as they are.

    Returns:
        Images, uint8, shape ``(B, 3, size, size)``.
    """
    if size is None or images.shape[-2:] == (size, size):
        return images
    pixels = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)  # bicubic interpolation overshoots


def of_map(maps: Tensor) -> StudentTokens:
    """Tokens of feature maps ``(B, H, W, C)``."""
    patches = maps.flatten(1, 2)
    return StudentTokens(None, patches[:, :0], patches, (maps.shape[1], maps.shape[2]))
