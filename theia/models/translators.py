"""Translators: shallow heads from the student's patch tokens to each teacher's normalised features."""

from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from theia.errors import ConfigError, ShapeError
from theia.models import cpu_layers
from theia.models.cpu_layers import TransposedConvolution

TranslatorKind = Literal["cnn", "linear", "mlp", "ladder", "transformer"]
GridHW = tuple[int, int]

_HEAD_WIDTH = 64  # channels of an attention head in the paper's students
_LAYER_SCALE = 1e-4


class Translator(nn.Module):
    """Maps patch tokens on the student's grid to a teacher's features on the teacher's grid.

    ``C`` is the student's width. The layers of the kind ``"cnn"`` depend on the two grids; each of its layer norms is
    joint over channels, rows and columns:

    - 14x14 to 16x16 or 64x64, the grids of the published models: first a transposed convolution to 16x16 (``pad``),
      then the layers of the published models with their names and shapes (``adapter``).
    - Any other pair: layer norm, 3x3 convolution and ReLU on the student's grid; bilinear resize; layer norm,
      3x3 convolution, ReLU and layer norm on the teacher's grid; linear to the teacher's channels. If the
      grids are equal, these are the layers of the 16x16 head.

    The other kinds have a bilinear resize where the grids differ:

    - ``"linear"``: resize, then one linear layer: an ablation that shows the effect of the convolutions.
    - ``"mlp"``: resize, then for each token linear, layer norm, GELU and linear, ``C`` channels in between.
    - ``"ladder"``: the sum over all blocks of the student of two-layer MLPs on the block's tokens, with GELU and ``C``
      channels in between, ``4 * C`` for the last block; then resize.
    - ``"transformer"``: one pre-norm transformer block on the patch tokens, with heads of at least 64 channels and
      LayerScale 1e-4; resize, then one linear layer.

    A resize is antialiased when it shrinks, so that every student token counts.

    Args:
        width: Number of channels of a student token.
        student_grid_hw: Rows and columns of the student's patch tokens.
        channels: Number of channels of a teacher token.
        grid_hw: Rows and columns of the teacher's patch tokens.
        kind: Kind of translator.
        blocks: Number of blocks whose tokens a ladder is given.

    Raises:
        ConfigError: If the kind is unknown.

    Source: ``cnn`` and ``linear`` are of Theia, Table 4 and Table 6a, with the order of layers of the published models;
    ``mlp`` of RADIO (Ranzinger et al., 2024) and EUPE; ``ladder`` of UNIC (Sariyildiz et al., 2024), whose 768 and 3072
    channels are ``C`` and ``4 * C`` of its ViT-B; ``transformer`` of DUNE (Sariyildiz et al., 2025).
    """

    def __init__(
        self,
        width: int,
        student_grid_hw: GridHW,
        channels: int,
        grid_hw: GridHW,
        kind: TranslatorKind = "cnn",
        blocks: int = 1,
    ) -> None:
        super().__init__()
        self.student_grid_hw = student_grid_hw
        self.pad: nn.Module = nn.Identity()
        self.resize: nn.Module = nn.Identity()  # of a ladder, which gives few channels and has many inside
        hidden = width
        resize = _resize(student_grid_hw, grid_hw)
        layers: list[nn.Module]
        if kind == "linear":
            layers = [*resize, _ToTokens()]
        elif kind == "mlp":
            layers = [*resize, _ToTokens(), nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()]
        elif kind == "ladder":
            ladder = _Ladder(width, blocks)
            hidden, layers = ladder.channels, [_ToTokens(), ladder]
            self.resize = nn.Sequential(_ToMaps(student_grid_hw), *resize, _ToTokens())
        elif kind == "transformer":
            block = Block(width, _heads(width), qkv_bias=True, init_values=_LAYER_SCALE)
            cpu_layers.adapt(block)
            layers = [_ToTokens(), block, _ToMaps(student_grid_hw), *resize, _ToTokens()]
        elif kind != "cnn":
            raise ConfigError(f"No translator of kind {kind!r}. Choose one of: {', '.join(get_args(TranslatorKind))}.")
        elif student_grid_hw == (14, 14) and grid_hw in ((16, 16), (64, 64)):
            self.pad = TransposedConvolution(width, width, 3)
            layers = _to_16x16(width) if grid_hw == (16, 16) else _to_64x64(width)
        else:
            layers = _to_any(width, student_grid_hw, grid_hw)
        self.adapter = nn.Sequential(*layers, nn.Linear(hidden, channels))
        self.to(memory_format=torch.channels_last)

    def forward(self, patches: Tensor, grid_hw: GridHW) -> Tensor:
        """Predicts a teacher's normalised features.

        Args:
            patches: The student's patch tokens, row by row, shape ``(B, N, C)``; for a ladder, those of its blocks side
                by side, ``(B, N, blocks * C)``.
            grid_hw: Rows and columns of the patch tokens.

        Returns:
            Predicted features on the teacher's grid, row by row, shape ``(B, H * W, channels)``.

        Raises:
            ShapeError: If the tokens are not on the grid for which the translator was built.
        """
        prediction: Tensor = self.resize(self.adapter(self._maps(patches, grid_hw)))
        return prediction

    @property
    def last(self) -> nn.Linear:
        """The linear layer to the teacher's channels."""
        return cast(nn.Linear, self.adapter[-1])

    def before_last(self, patches: Tensor, grid_hw: GridHW) -> Tensor:
        """The input of :attr:`last`, shape ``(B, H * W, C)``; arguments and errors are those of :meth:`forward`.

        Of a ladder, it is on the student's grid and has the channels of all hidden layers.
        """
        tokens: Tensor = self.adapter[:-1](self._maps(patches, grid_hw))
        return tokens

    def _maps(self, patches: Tensor, grid_hw: GridHW) -> Tensor:
        """Turns tokens ``(B, N, C)`` into the input of the adapter."""
        height, width = grid_hw
        if grid_hw != self.student_grid_hw or patches.shape[1] != height * width:
            raise ShapeError(
                f"A translator for a grid of {self.student_grid_hw[0]}x{self.student_grid_hw[1]} student "
                f"tokens was given {patches.shape[1]} tokens on {height}x{width}. Use images of the "
                "student's training size."
            )
        # A view in the memory order of the tokens: channels last, like all maps in this file.
        maps: Tensor = self.pad(patches.reshape(len(patches), height, width, patches.shape[-1]).permute(0, 3, 1, 2))
        return maps


def on_grid(patches: Tensor, grid_hw: GridHW, wanted_hw: GridHW) -> Tensor:
    """Brings patch tokens to another grid, bilinearly, and antialiased if it shrinks.

    Args:
        patches: Patch tokens, row by row, shape ``(B, N, C)``.
        grid_hw: Their rows and columns.
        wanted_hw: Rows and columns to bring them to.

    Returns:
        Patch tokens on the wanted grid; the same tensor if they are on it already.
    """
    if grid_hw == wanted_hw:
        return patches
    maps = patches.reshape(len(patches), *grid_hw, -1).permute(0, 3, 1, 2)
    return _resized(maps, wanted_hw, _shrinks(grid_hw, wanted_hw)).permute(0, 2, 3, 1).flatten(1, 2)


class _JointNorm(nn.LayerNorm):
    """A layer norm over channels, rows and columns of maps ``(B, C, H, W)`` in channels-last memory order.

    Weight and bias have the shape (C, H, W), as in the published models, and the memory order of the maps.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__([channels, height, width])
        self.weight = _channels_last(self.weight)
        self.bias = _channels_last(self.bias)

    def forward(self, maps: Tensor) -> Tensor:
        order = maps.permute(0, 2, 3, 1)
        scale, shift = self.weight.permute(1, 2, 0), self.bias.permute(1, 2, 0)
        return F.layer_norm(order, order.shape[1:], scale, shift, self.eps).permute(0, 3, 1, 2)


def _to_16x16(width: int) -> list[nn.Module]:
    return [
        _JointNorm(width, 16, 16),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(inplace=True),
        _JointNorm(width, 16, 16),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(inplace=True),
        _JointNorm(width, 16, 16),
        _ToTokens(),
    ]


def _to_64x64(width: int) -> list[nn.Module]:
    return [
        _JointNorm(width, 16, 16),
        TransposedConvolution(width, width, 3, stride=2, padding=1),  # 31x31
        nn.ReLU(inplace=True),
        _JointNorm(width, 31, 31),
        TransposedConvolution(width, width, 3, stride=2, output_padding=1),  # 64x64
        nn.ReLU(inplace=True),
        _JointNorm(width, 64, 64),
        _ToTokens(),
    ]


def _to_any(width: int, student_grid_hw: GridHW, grid_hw: GridHW) -> list[nn.Module]:
    return [
        _JointNorm(width, *student_grid_hw),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(inplace=True),
        *_resize(student_grid_hw, grid_hw),
        _JointNorm(width, *grid_hw),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(inplace=True),
        _JointNorm(width, *grid_hw),
        _ToTokens(),
    ]


def _resize(source_hw: GridHW, target_hw: GridHW) -> list[nn.Module]:
    return [] if source_hw == target_hw else [_Resize(target_hw, antialias=_shrinks(source_hw, target_hw))]


def _shrinks(source_hw: GridHW, target_hw: GridHW) -> bool:
    return target_hw[0] < source_hw[0] or target_hw[1] < source_hw[1]


def _resized(maps: Tensor, size_hw: GridHW, antialias: bool) -> Tensor:
    # In float32: not every device can antialias in bfloat16, and a layer norm or linear layer comes next.
    return F.interpolate(maps.float(), size_hw, mode="bilinear", antialias=antialias).to(maps.dtype)


class _Resize(nn.Module):
    def __init__(self, size_hw: GridHW, antialias: bool) -> None:
        super().__init__()
        self.size_hw = size_hw
        self.antialias = antialias

    def forward(self, maps: Tensor) -> Tensor:
        return _resized(maps, self.size_hw, self.antialias)


class _Ladder(nn.Module):
    """The hidden layers of one MLP per block, side by side: the linear layer behind them adds up the MLPs' outputs."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.width = width
        hidden = [width] * (blocks - 1) + [4 * width]
        self.channels = sum(hidden)
        self.rungs = nn.ModuleList(nn.Linear(width, channels) for channels in hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turns tokens of all blocks (B, N, blocks * C) into (B, N, channels)."""
        parts = torch.split(tokens, self.width, -1)
        return F.gelu(torch.cat([rung(part) for rung, part in zip(self.rungs, parts, strict=True)], -1))


def _heads(width: int) -> int:
    """The most heads that divide the width and have at least 64 channels each; one for a narrower student."""
    return next(heads for heads in range(max(width // _HEAD_WIDTH, 1), 0, -1) if width % heads == 0)


class _ToMaps(nn.Module):
    def __init__(self, grid_hw: GridHW) -> None:
        super().__init__()
        self.grid_hw = grid_hw

    def forward(self, tokens: Tensor) -> Tensor:
        """Turns tokens (B, H * W, C) into maps (B, C, H, W), a view in channels-last memory order."""
        return tokens.reshape(len(tokens), *self.grid_hw, tokens.shape[-1]).permute(0, 3, 1, 2)


class _ToTokens(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        """Turns maps (B, C, H, W) into tokens (B, H * W, C)."""
        return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _channels_last(parameter: Tensor) -> nn.Parameter:
    """A parameter with the same values and shape (C, H, W), laid out in memory as (H, W, C)."""
    return nn.Parameter(parameter.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1))
