"""The student: a backbone that takes images as they are stored and gives the tokens that a robot uses."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from theia.errors import ConfigError, ShapeError
from theia.models import older
from theia.models.backbone import THEIA_SHAPES, TIMM, Backbone, StudentOptions, StudentTokens
from theia.models.scaler import keep_float32
from theia.models.timm_backbone import TimmBackbone
from theia.models.vit import TheiaBackbone


class Student(nn.Module):
    """A backbone together with the normalisation of its input pixels, and perhaps a lift.

    A lift is a linear layer on every token, behind a layer norm unless the backbone ends with one, as most vision
    transformers do. It gives the tokens more channels than the backbone has, so that these need not hold all that the
    teachers know of a place.

    Training uses one image size. Images of another size work too if their sides are multiples of the backbone's stride
    and the backbone takes other sizes.

    Args:
        options: Choice of the backbone and its options; by default theia_tiny from scratch.
        load_weights: Whether to load pretrained weights now; needless if a checkpoint is loaded afterwards.

    Raises:
        ConfigError: If there is no such backbone, or an option is out of its range.
        ShapeError: If the backbone does not take this image size.
        WeightsError: If the weights cannot be fetched or read, or do not fit.

    Source: the lift is the wider end of tiny students in arXiv 2511.15572.
    """

    pixel_mean: Tensor  # (3, 1, 1), for pixels from 0 to 1
    pixel_std: Tensor  # (3, 1, 1)

    def __init__(self, options: StudentOptions | None = None, *, load_weights: bool = True) -> None:
        super().__init__()
        options = options or StudentOptions()
        self.backbone = build_backbone(options)
        self.lift = None if options.lift is None else _lift(self.backbone, options.lift)
        self.register_buffer("pixel_mean", torch.tensor(self.backbone.mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(self.backbone.std).view(3, 1, 1))
        self._weights = options.weights
        self.register_load_state_dict_pre_hook(_rename_older)  # type: ignore[no-untyped-call]
        if load_weights:
            self.load_weights()

    @property
    def width(self) -> int:
        """Number of channels ``C`` of a token."""
        return self.backbone.width if self.lift is None else cast(nn.Linear, self.lift.linear).out_features

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the patch tokens of a training image."""
        return self.backbone.grid_hw

    @property
    def has_cls(self) -> bool:
        """Whether there is a CLS token."""
        return self.backbone.has_cls

    def _apply(self, fn: Any, recurse: bool = True) -> "Student":
        keep_float32(self, ("pixel_mean", "pixel_std"), lambda: super(Student, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def load_weights(self) -> None:
        """Loads the pretrained weights that the options name; does nothing for "scratch".

        Raises:
            WeightsError: If the weights cannot be fetched or read, or do not fit.
        """
        if self._weights != "scratch":
            self.backbone.load_weights(self._weights)

    def unfreeze(self, last_n_blocks: int | None = None) -> None:
        """Makes the parameters that spatial tokens depend on trainable; see :meth:`Backbone.unfreeze`."""
        self.backbone.unfreeze(last_n_blocks)
        if self.lift is not None:
            self.lift.requires_grad_()

    def forward(self, images: Tensor) -> StudentTokens:
        """Tokens after the last layer, for images as they are stored.

        Args:
            images: RGB images of a size that the backbone takes, uint8, shape ``(B, 3, H, W)``.

        Raises:
            ShapeError: If the images have the wrong shape or type.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(
                f"Images of shape {tuple(images.shape)} and type {images.dtype}; a student takes uint8 (B, 3, H, W)."
            )
        return self.encode(images)

    def forward_kept(self, images: Tensor, kept: Tensor) -> StudentTokens:
        """Tokens after the last layer, where only some patches of an image are there.

        Args:
            images: RGB images of the training size, uint8, shape ``(B, 3, H, W)``.
            kept: Numbers of the patches that are there, row by row, int64, shape ``(B, K)``.

        Returns:
            The tokens; ``patches`` are those that are there, in that order, shape ``(B, K, C)``.
        """
        return self._lifted(self.backbone.tokens_of_kept(self._pixels(images), kept))

    def encode(self, images: Tensor) -> StudentTokens:
        """Tokens after the last layer, for images that may be scaled to 0..1 already. The caller checks their range.

        Args:
            images: RGB images of a size that the backbone takes, shape ``(B, 3, H, W)``; uint8, or floating point
                from 0 to 1.

        Raises:
            ShapeError: If the images have the wrong shape.
        """
        return self._lifted(self.backbone.tokens(self._pixels(images)))

    def forward_intermediates(self, images: Tensor, indices: Iterable[int], norm: bool = False) -> list[StudentTokens]:
        """Tokens after some of the blocks, with the channels of the block: before a lift if there is one.

        Args:
            images: RGB images, as for :meth:`encode`.
            indices: Block numbers, counted from 0; negative numbers count from the end.
            norm: Whether to apply the final norm to each result.

        Returns:
            One result for each index, in the order of the indices.

        Raises:
            ShapeError: If the images have the wrong shape.
            ConfigError: If there is no such block, or the norm is asked for of blocks before a wide last one.
        """
        return self.backbone.intermediates(self._pixels(images), indices, norm)

    def _lifted(self, tokens: StudentTokens) -> StudentTokens:
        if self.lift is None:
            return tokens
        cls = None if tokens.cls is None else self.lift(tokens.cls)
        return StudentTokens(cls, self.lift(tokens.registers), self.lift(tokens.patches), tokens.grid)

    def _pixels(self, images: Tensor) -> Tensor:
        """Normalised pixels in the type of the parameters."""
        self.backbone.check_size(*images.shape[-2:])
        precision = self.backbone.dtype
        # At least float32, whatever the precision of the weights: mean and std would lose bits in bfloat16.
        scaled = images.to(torch.promote_types(precision, torch.float32))
        if images.dtype == torch.uint8:
            scaled = scaled / 255
        return ((scaled - self.pixel_mean) / self.pixel_std).to(precision)


def _lift(backbone: Backbone, channels: int) -> nn.Sequential:
    # Some of timm's transformers have their norm behind the pooling.
    last = getattr(backbone.model, "norm", None) if backbone.is_transformer else None
    norm = nn.LayerNorm(backbone.width) if last is None or isinstance(last, nn.Identity) else nn.Identity()
    linear = nn.Linear(backbone.width, channels)
    nn.init.trunc_normal_(linear.weight, std=0.02)  # as all of a student's linear layers
    nn.init.zeros_(linear.bias)
    return nn.Sequential(OrderedDict(norm=norm, linear=linear))


def build_backbone(options: StudentOptions) -> Backbone:
    """Builds the backbone of a student, without pretrained weights.

    Args:
        options: Choice of the backbone and its options.

    Raises:
        ConfigError: If there is no such backbone, or an option is out of its range or does not apply to it.
        ShapeError: If the image size does not divide into the backbone's patches.
    """
    if options.backbone in THEIA_SHAPES:
        return TheiaBackbone(options)
    if options.backbone.startswith(TIMM):
        return TimmBackbone.build(options)
    instead = f" timm:{options.backbone} is one." if timm.is_model(options.backbone) else ""
    raise ConfigError(
        f"No backbone named {options.backbone!r}. Choose one of: {', '.join(THEIA_SHAPES)}, or timm:NAME, a model of "
        f"timm.{instead}"
    )


def _rename_older(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Renames older parameters in a state that is loaded directly into a module, as policies with a student do."""
    for name in [name for name in state if name.startswith(prefix + older.VIT)]:
        state[name.replace(prefix + older.VIT, prefix + older.BACKBONE, 1)] = state.pop(name)
