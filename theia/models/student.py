"""The student: a small ViT whose tokens are what a robot uses."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from theia.errors import ConfigError, ShapeError
from theia.models import deit
from theia.models.positions import PositionRule, resize_positions
from theia.models.scaler import keep_float32

PATCH = 16  # pixels along each side
MLP_RATIO = 4

Size = Literal["tiny", "small", "base"]
Registers = Literal[0, 1, 4, 8]

_SHAPES: dict[str, tuple[int, int, int]] = {  # width, depth, heads: DeiT
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}
_SCRATCH_EPS = 1e-12  # of the released models


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


class Student(nn.Module):
    """A DeiT-shaped vision transformer with register tokens.

    Every student starts alike, with or without registers: weights, position embedding and tokens from a
    normal distribution of standard deviation 0.02, biases zero. Training is at ``image_size``; images of any
    other size that is a multiple of the patch work too, with the position embedding resized.

    Args:
        size: Width, depth and heads of DeiT-Tiny, -Small or -Base.
        image_size: Pixels along each side of a training image.
        registers: Tokens beside the patches. The CLS token is the first of them, as nothing supervises it; 0
            removes it.
        weights: ``"scratch"``, ``"pretrained"`` (DeiT from timm's hub) or the path of a timm DeiT checkpoint.
            Pretrained weights bring their input normalisation and their layer-norm epsilon, 1e-6; from
            scratch it is mean and standard deviation 0.5, and 1e-12.
        load_weights: Whether to load them now; not for a student whose state a checkpoint is about to bring.
        width: Overrides the width of ``size``; for small experiments, as the next two.
        depth: Overrides the number of blocks.
        heads: Overrides the number of attention heads.
        positions: How the position embedding is resized; the published models have a rule of their own.

    Raises:
        ConfigError: If an option is out of its range, or the width is not a multiple of the heads.
        ShapeError: If ``image_size`` is not a multiple of the patch.
        WeightsError: If the weights cannot be had or do not fit.

    Source: Theia, section 3 and Table 3b; DeiT, Table 1.
    """

    pixel_mean: Tensor  # (3, 1, 1), of values in 0..1
    pixel_std: Tensor  # (3, 1, 1)

    def __init__(
        self,
        size: Size = "tiny",
        *,
        image_size: int = 224,
        registers: Registers = 1,
        weights: str = "scratch",
        load_weights: bool = True,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        positions: PositionRule = "size",
    ) -> None:
        super().__init__()
        if size not in _SHAPES:
            raise ConfigError(f"No student of size {size!r}. Choose one of: {', '.join(_SHAPES)}.")
        if registers not in get_args(Registers):
            raise ConfigError(f"A student cannot have {registers} registers. Choose 0 (no CLS), 1 (CLS), 4 or 8.")
        _check_image_size(image_size, image_size)
        overrides = zip((width, depth, heads), _SHAPES[size], strict=True)
        self.width, depth, heads = (default if given is None else given for given, default in overrides)
        if min(self.width, depth, heads) < 1 or self.width % heads:
            raise ConfigError(
                f"A student of width {self.width}, depth {depth} and {heads} heads cannot be built: all must "
                "be positive, and the width a multiple of the heads."
            )
        self.has_cls = registers > 0
        self.grid_hw = (image_size // PATCH, image_size // PATCH)

        scratch = weights == "scratch"
        self.vit = VisionTransformer(
            img_size=image_size,
            patch_size=PATCH,
            num_classes=0,
            global_pool="",  # all tokens; any pooling would move the final norm or need a CLS token
            embed_dim=self.width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=MLP_RATIO,
            class_token=self.has_cls,
            reg_tokens=max(registers - 1, 0),
            dynamic_img_size=True,
            weight_init="skip",
            norm_layer=partial(nn.LayerNorm, eps=_SCRATCH_EPS if scratch else deit.LAYER_NORM_EPS),
        )
        _initialise(self.vit)
        mean, std = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) if scratch else (deit.PIXEL_MEAN, deit.PIXEL_STD)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))
        self._size, self._weights, self._positions = size, weights, positions
        if load_weights:
            self.load_weights()

    def _apply(self, fn: Any, recurse: bool = True) -> "Student":
        keep_float32(self, ("pixel_mean", "pixel_std"), lambda: super(Student, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def load_weights(self) -> None:
        """Starts from the pretrained weights that the constructor was given; from scratch there is nothing to do.

        Raises:
            WeightsError: If they cannot be had or do not fit.
        """
        if self._weights != "scratch":
            pretrained = self._weights == "pretrained"
            deit.copy_into(self.vit, deit.fetch(self._size) if pretrained else deit.read(self._weights))

    def forward(self, images: Tensor) -> StudentTokens:
        """Tokens of a batch as it is stored, after the final layer norm.

        Args:
            images: RGB, uint8, shape ``(B, 3, H, W)``, both sides multiples of 16.

        Raises:
            ShapeError: If the images are of another shape or type.
        """
        if images.dtype != torch.uint8:
            raise ShapeError(
                f"Images of shape {tuple(images.shape)} and type {images.dtype}; a student takes uint8 (B, 3, H, W)."
            )
        return self.encode(images)

    def encode(self, images: Tensor) -> StudentTokens:
        """The same, of images that may be scaled already. Their range is for the caller to check.

        Args:
            images: RGB, shape ``(B, 3, H, W)``, both sides multiples of 16; uint8, or floating point from 0 to 1.

        Raises:
            ShapeError: If the images are of another shape.
        """
        tokens, grid = self._embed(images)
        for block in self.vit.blocks:
            tokens = block(tokens)
        return self._split(self.vit.norm(tokens), grid)

    def forward_intermediates(self, images: Tensor, indices: Iterable[int], norm: bool = False) -> list[StudentTokens]:
        """Tokens after some of the blocks.

        Args:
            images: See :meth:`encode`.
            indices: Blocks, from 0; negative ones count from the end.
            norm: Whether to apply the final layer norm to each.

        Returns:
            In the order of the indices, one for each.

        Raises:
            ShapeError: If the images are of another shape.
            ConfigError: If there is no such block.
        """
        wanted = [self._number(index) for index in indices]
        tokens, grid = self._embed(images)
        found = {}
        for number, block in enumerate(self.vit.blocks[: max(wanted, default=-1) + 1]):
            tokens = block(tokens)
            if number in wanted:
                found[number] = self._split(self.vit.norm(tokens) if norm else tokens, grid)
        return [found[number] for number in wanted]

    def _number(self, index: int) -> int:
        """The number of a block, counted from the first one."""
        depth = len(self.vit.blocks)
        try:
            number = operator.index(index)
        except TypeError:
            number = depth
        if not -depth <= number < depth:
            raise ConfigError(f"There is no block {index!r}; this student has {depth}, numbered from 0.")
        return number % depth

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What goes into the first block: ``(B, prefix + N, C)``, and the grid of the patches."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"Images of shape {tuple(images.shape)}; a student takes uint8 (B, 3, H, W).")
        height, width = images.shape[-2:]
        _check_image_size(height, width)
        vit = self.vit
        precision = vit.patch_embed.proj.weight.dtype
        # In float32 at least, whatever the precision of the weights: the statistics themselves lose bits in bfloat16.
        scaled = images.to(torch.promote_types(precision, torch.float32))
        if images.dtype == torch.uint8:
            scaled = scaled / 255
        pixels = (scaled - self.pixel_mean) / self.pixel_std
        patches = vit.patch_embed(pixels.to(precision))  # (B, rows, columns, C)
        grid = (height // PATCH, width // PATCH)
        prefix = [
            token.expand(images.shape[0], -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None
        ]
        tokens = torch.cat([*prefix, patches.flatten(1, 2)], dim=1)
        return tokens + self._positions_for(grid), grid

    def _positions_for(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding ``(1, prefix + N, C)``."""
        positions: Tensor = self.vit.pos_embed  # type: ignore[assignment]  # a parameter, or what torch.func puts in its place
        # An exported graph is for any size.
        if not torch.compiler.is_exporting() and grid == self.grid_hw:
            return positions
        prefix = self.vit.num_prefix_tokens
        trained = positions[0, prefix:].reshape(*self.grid_hw, -1)
        resized = resize_positions(trained, *grid, self._positions)
        return torch.cat([positions[:, :prefix], resized.flatten(0, 1)[None]], dim=1)

    def _split(self, tokens: Tensor, grid: tuple[int, int]) -> StudentTokens:
        prefix = self.vit.num_prefix_tokens
        return StudentTokens(
            cls=tokens[:, 0] if self.has_cls else None,
            registers=tokens[:, int(self.has_cls) : prefix],
            patches=tokens[:, prefix:],
            grid=grid,
        )


@torch.no_grad()
def _initialise(vit: nn.Module) -> None:
    """Sets every parameter, so that no variant of the student starts from anything of its own."""
    for name, parameter in vit.named_parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:  # scales of layer norms
            nn.init.ones_(parameter)


def _check_image_size(height: int, width: int) -> None:
    if height % PATCH == 0 and width % PATCH == 0 and min(height, width) > 0:
        return
    below = (height // PATCH, width // PATCH)
    above = (-(-height // PATCH), -(-width // PATCH))
    nearest = dict.fromkeys(f"{max(rows, 1) * PATCH}x{max(cols, 1) * PATCH}" for rows, cols in (below, above))
    raise ShapeError(
        f"Images of {height}x{width} pixels do not divide into patches of {PATCH}x{PATCH}. Resize them; the "
        f"nearest sizes: {', '.join(nearest)}."
    )
