"""The paper's backbone: a DeiT-shaped vision transformer with register tokens, for any image size."""

from collections import OrderedDict
from functools import partial
from typing import Any, cast, get_args

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from theia.errors import ConfigError
from theia.models.backbone import (
    PATCHES,
    THEIA_SHAPES,
    Backbone,
    PositionRule,
    Registers,
    StudentOptions,
    check_divides,
)
from theia.models.weights import fetch_deit, load_deit, read_deit

_PATCH = PATCHES[0]
_MLP_RATIO = 4
_SCRATCH_EPS = 1e-12  # as in the published models
_SCRATCH_PIXELS = (0.5, 0.5, 0.5)  # mean and standard deviation
_DEIT_EPS = 1e-6


class ViT(VisionTransformer):
    """timm's vision transformer, with a choice of two rules for resizing positions, both the same in ONNX."""

    positions: PositionRule = "size"

    def forward_kept(self, x: Tensor, kept: Tensor) -> Tensor:
        """Gives what ``forward_features`` does for images of which only some patches are there.

        Args:
            x: Normalised images, shape ``(B, 3, H, W)``.
            kept: Numbers of the patches that are there, row by row, int64, shape ``(B, K)``.

        Returns:
            Tokens after the final norm: the prefix tokens, then the patches in that order, ``(B, prefix + K, C)``.
        """
        tokens = self._pos_embed(self.patch_embed(x))
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        there = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
        tokens = self.norm_pre(torch.cat([prefix, there], 1))
        for block in self.blocks:
            tokens = block(tokens)
        return cast(Tensor, self.norm(tokens))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Embeds positions and gives the input of the first block.

        Args:
            x: Embedded patches, shape ``(B, rows, columns, C)``.
        """
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        positions = self._positions_for((x.shape[1], x.shape[2]))
        patches = x.flatten(1, 2)
        if self.no_embed_class:
            tokens = torch.cat([*prefix, patches + positions], dim=1)
        else:
            tokens = torch.cat([*prefix, patches], dim=1) + positions
        return cast(Tensor, self.pos_drop(tokens))

    def _positions_for(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding ``(1, N, C)``, with the prefix tokens if they have positions."""
        positions: Tensor = self.pos_embed  # type: ignore[assignment]  # a parameter, or what torch.func puts in its place
        # An exported graph must work for any size.
        if not torch.compiler.is_exporting() and grid == self.patch_embed.grid_size:
            return positions
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        trained = positions[0, prefix:].reshape(*self.patch_embed.grid_size, -1)
        resized = resize_positions(trained, *grid, self.positions)
        return torch.cat([positions[:, :prefix], resized.flatten(0, 1)[None]], dim=1)


class TheiaBackbone(Backbone):
    """The paper's backbone: a DeiT-shaped vision transformer with register tokens.

    The initialisation is the same with or without registers: weights, position embedding and tokens come from a normal
    distribution with standard deviation 0.02, and biases are zero. The CLS token is the first of the registers, as
    nothing supervises it. With pretrained (DeiT) weights, pixels are normalised as for DeiT and the layer-norm epsilon
    is 1e-6; from scratch, pixels are normalised with mean and standard deviation 0.5 and the epsilon is 1e-12.

    A wide last block has a width of its own: before it, a linear layer takes every token there, and its heads are as
    wide as those of the other blocks, so that it has more of them. The final norm and the tokens have its width.

    Args:
        options: Choice of the backbone and its options.

    Raises:
        ConfigError: If an option is out of its range, or a width is not a multiple of the number of heads, or of the
            width of a head.
        ShapeError: If the image size is not a multiple of the patch size.

    Source: Theia, section 3 and Table 3b; DeiT, Table 1; the wide last block is the wider end in arXiv 2511.15572.
    """

    def __init__(self, options: StudentOptions) -> None:
        registers, size = options.registers, options.image_size
        if registers not in get_args(Registers):
            raise ConfigError(f"A student cannot have {registers} registers. Choose 0 (no CLS), 1 (CLS), 4 or 8.")
        if options.backbone_stage is not None:
            raise ConfigError(
                f"{options.backbone} has no stages: backbone_stage is for backbones of timm. Leave it out."
            )
        check_divides(size, size, _PATCH)
        overrides = zip((options.width, options.depth, options.heads), THEIA_SHAPES[options.backbone], strict=True)
        width, depth, heads = (default if given is None else given for given, default in overrides)
        if min(width, depth, heads) < 1 or width % heads:
            raise ConfigError(
                f"A student of width {width}, depth {depth} and {heads} heads cannot be built: all must "
                "be positive, and the width a multiple of the heads."
            )
        wide, head = options.wide_last, width // heads
        if wide is not None and options.lift is not None:
            raise ConfigError("wide_last and lift both widen the end of a student. Leave out one of the two.")
        if wide is not None and (wide < 1 or wide % head):
            raise ConfigError(
                f"The last block cannot have {wide} channels: its heads have {head}, as in the other blocks. Give "
                f"wide_last a multiple of {head}."
            )
        scratch = options.weights == "scratch"
        norm: Any = partial(nn.LayerNorm, eps=_SCRATCH_EPS if scratch else _DEIT_EPS)
        vit = ViT(
            img_size=size,
            patch_size=_PATCH,
            num_classes=0,
            global_pool="",  # all tokens; any pooling would move the final norm or need a CLS token
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=_MLP_RATIO,
            class_token=registers > 0,
            reg_tokens=max(registers - 1, 0),
            dynamic_img_size=True,
            weight_init="skip",
            norm_layer=norm,
        )
        if wide is not None:
            block = Block(wide, wide // head, _MLP_RATIO, qkv_bias=True, norm_layer=norm)
            vit.blocks[-1] = nn.Sequential(OrderedDict(widen=nn.Linear(width, wide), block=block))
            vit.norm = norm(wide)
        vit.positions = options.positions
        _initialise(vit)
        super().__init__(vit)
        self.name = options.backbone
        self.image_hw, self.stride, self.width = (size, size), _PATCH, wide or width
        self.has_wide_last = wide is not None
        self.prefix, self.has_cls = registers, registers > 0
        self.mean = _SCRATCH_PIXELS if scratch else IMAGENET_DEFAULT_MEAN
        self.std = _SCRATCH_PIXELS if scratch else IMAGENET_DEFAULT_STD
        self.any_size = self.any_size_exported = True

    def load_weights(self, weights: str) -> None:
        """See :meth:`Backbone.load_weights`."""
        size = self.name.removeprefix("theia_")
        new = (f"blocks.{len(self.blocks()) - 1}.", "norm.") if self.has_wide_last else ()
        load_deit(self.model, fetch_deit(size) if weights == "pretrained" else read_deit(weights), new)


@torch.no_grad()
def _initialise(vit: nn.Module) -> None:
    """Sets every parameter by the same rules, so that all variants of the student start in the same way."""
    for name, parameter in vit.named_parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:  # scales of layer norms
            nn.init.ones_(parameter)


def resize_positions(grid: Tensor, rows: int, columns: int, rule: PositionRule) -> Tensor:
    """Resizes the position embedding of the patches.

    Bicubic interpolation is linear in each axis, so two products with small matrices give the same result as
    ``torch.nn.functional.interpolate``. Only the products give it in ONNX too: for ``interpolate``, the exporter uses
    another cubic kernel where it antialiases, and fixes the scale factor.

    Args:
        grid: Position embedding in the training size, shape ``(H, W, C)``.
        rows: Number of rows to resize to.
        columns: Number of columns to resize to.
        rule: Rule that decides the coordinates and the cubic kernel.

    Returns:
        Resized position embedding, shape ``(rows, columns, C)``.
    """
    matrix = _antialiased if rule == "size" else _by_scale_factor
    axes = [(rows, grid.shape[0]), (columns, grid.shape[1])]
    vertical, horizontal = (matrix(wanted, trained, grid) for wanted, trained in axes)
    if rule == "scale_factor":
        # This rule would move every position even where the size stays the same. There is no Python branch here because
        # an exported graph must decide by itself.
        same = torch.stack([_arange(wanted, grid).add(1).max() == trained for wanted, trained in axes]).all()
        vertical, horizontal = (torch.where(same, _eye(one), one) for one in (vertical, horizontal))
    return torch.einsum("rh,hwc,kw->rkc", vertical, grid.float(), horizontal).to(grid.dtype)


def _antialiased(wanted: int, trained: int, like: Tensor) -> Tensor:
    """Weights ``(wanted, trained)`` of Keys' cubic (a = -0.5), as wide as the step between two wanted points."""
    step = trained / wanted
    centre = (_arange(wanted, like) + 0.5) * step
    width = torch.clamp(torch.ones_like(centre[:1]) * step, min=1)
    distance = (_arange(trained, like)[None] + 0.5 - centre[:, None]) / width
    weights = _cubic(distance, -0.5)
    return weights / weights.sum(1, keepdim=True)


def _by_scale_factor(wanted: int, trained: int, like: Tensor) -> Tensor:
    """Weights ``(wanted, trained)`` of a cubic with a = -0.75 and four taps; taps beyond the edge count at the edge."""
    place = (_arange(wanted, like) + 0.5) / ((wanted + 0.1) / trained) - 0.5
    below = place.floor()
    weights = torch.zeros((), device=like.device)
    for tap in (-1, 0, 1, 2):
        source = (below + tap).clamp(0, trained - 1)
        hit = (source[:, None] == _arange(trained, like)[None]).float()
        weights = weights + hit * _cubic(below + tap - place, -0.75)[:, None]
    return weights


def _eye(like: Tensor) -> Tensor:
    rows, columns = (_arange(count, like) for count in like.shape)
    return (rows[:, None] == columns[None]).float()


def _arange(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.float32)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel, zero from a distance of 2.

    Source: Keys, Cubic convolution interpolation for digital image processing (1981), eq. (15).
    """
    x = distance.abs()
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, inner, torch.where(x < 2, outer, 0.0))
