"""Translators: shallow heads from the student's patch tokens to each teacher's normalised features."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from theia.errors import ConfigError, ShapeError
from theia.models.cpu_layers import TransposedConvolution

TranslatorKind = Literal["cnn", "linear"]
GridHW = tuple[int, int]


class Translator(nn.Module):
    """Maps patch tokens on the student's grid to a teacher's features on the teacher's grid.

    ``C`` is the student's width; every layer norm is joint over channels, rows and columns. The layers depend on the
    two grids:

    - 14x14 to 16x16 or 64x64, the grids of the published models: first a transposed convolution to 16x16 (``pad``),
      then the layers of the published models with their names and shapes (``adapter``).
    - Any other pair: layer norm, 3x3 convolution and ReLU on the student's grid; bilinear resize; layer norm,
      3x3 convolution, ReLU and layer norm on the teacher's grid; linear to the teacher's channels. If the
      grids are equal, these are the layers of the 16x16 head.
    - ``"linear"``: bilinear resize if the grids differ, then one linear layer: an ablation that shows the effect of
      the convolutions.

    A resize is antialiased when it shrinks, so that every student token counts.

    Args:
        width: Number of channels of a student token.
        student_grid_hw: Rows and columns of the student's patch tokens.
        channels: Number of channels of a teacher token.
        grid_hw: Rows and columns of the teacher's patch tokens.
        kind: Kind of translator, ``"cnn"`` or ``"linear"``.

    Raises:
        ConfigError: If the kind is unknown.

    Source: Theia, Table 4 and Table 6a; the order of layers is that of the published models.
    """

    def __init__(
        self, width: int, student_grid_hw: GridHW, channels: int, grid_hw: GridHW, kind: TranslatorKind = "cnn"
    ) -> None:
        super().__init__()
        self.student_grid_hw = student_grid_hw
        self.pad: nn.Module = nn.Identity()
        if kind == "linear":
            layers = [*_resize(student_grid_hw, grid_hw), _ToTokens()]
        elif kind != "cnn":
            raise ConfigError(f"No translator of kind {kind!r}. Choose one of: cnn, linear.")
        elif student_grid_hw == (14, 14) and grid_hw in ((16, 16), (64, 64)):
            self.pad = TransposedConvolution(width, width, 3)
            layers = _to_16x16(width) if grid_hw == (16, 16) else _to_64x64(width)
        else:
            layers = _to_any(width, student_grid_hw, grid_hw)
        self.adapter = nn.Sequential(*layers, nn.Linear(width, channels))
        self.to(memory_format=torch.channels_last)

    def forward(self, patches: Tensor, grid_hw: GridHW) -> Tensor:
        """Predicts a teacher's normalised features.

        Args:
            patches: The student's patch tokens, row by row, shape ``(B, N, C)``.
            grid_hw: Rows and columns of the patch tokens.

        Returns:
            Predicted features on the teacher's grid, row by row, shape ``(B, H * W, channels)``.

        Raises:
            ShapeError: If the tokens are not on the grid for which the translator was built.
        """
        prediction: Tensor = self.adapter(self._maps(patches, grid_hw))
        return prediction

    @property
    def last(self) -> nn.Linear:
        """The linear layer to the teacher's channels."""
        return cast(nn.Linear, self.adapter[-1])

    def before_last(self, patches: Tensor, grid_hw: GridHW) -> Tensor:
        """The input of :attr:`last`, shape ``(B, H * W, C)``; arguments and errors are those of :meth:`forward`."""
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


class _ToTokens(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        """Turns maps (B, C, H, W) into tokens (B, H * W, C)."""
        return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _channels_last(parameter: Tensor) -> nn.Parameter:
    """A parameter with the same values and shape (C, H, W), laid out in memory as (H, W, C)."""
    return nn.Parameter(parameter.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1))
