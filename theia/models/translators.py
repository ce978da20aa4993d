"""Translators: shallow heads from the student's patch tokens to each teacher's normalised features."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from theia.errors import ConfigError, ShapeError

TranslatorKind = Literal["cnn", "linear"]
GridHW = tuple[int, int]


class Translator(nn.Module):
    """Maps patch tokens on the student's grid to a teacher's features on the teacher's grid.

    ``C`` is the student's width; every layer norm is joint over channels, rows and columns. Which layers
    follow each other depends on the two grids:

    - 14x14 to 16x16 and to 64x64, the grids of the published models: a transposed convolution to 16x16 first
      (``pad``), then their layers, under their names and in their shapes (``adapter``).
    - Any other pair: layer norm, 3x3 convolution and ReLU on the student's grid; bilinear resize; layer norm,
      3x3 convolution, ReLU and layer norm on the teacher's grid; linear to the teacher's channels. Where both
      grids are equal these are the layers of the 16x16 head.
    - ``"linear"``: bilinear resize, where the grids differ, and one linear layer. It is the ablation that
      shows what the convolutions are for.

    A resize is antialiased when it shrinks, so that every student token counts.

    Args:
        width: Channels of a student token.
        student_grid_hw: Rows and columns of student tokens.
        channels: Channels of the teacher.
        grid_hw: Rows and columns of teacher tokens.
        kind: ``"cnn"`` or ``"linear"``.

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
            self.pad = nn.ConvTranspose2d(width, width, 3)
            layers = _to_16x16(width) if grid_hw == (16, 16) else _to_64x64(width)
        else:
            layers = _to_any(width, student_grid_hw, grid_hw)
        self.adapter = nn.Sequential(*layers, nn.Linear(width, channels))

    def forward(self, patches: Tensor, grid_hw: GridHW) -> Tensor:
        """Predicts a teacher's normalised features.

        Args:
            patches: Student tokens, row by row, shape ``(B, N, C)``.
            grid_hw: Their rows and columns.

        Returns:
            Shape ``(B, H * W, channels)`` on the teacher's grid, row by row.

        Raises:
            ShapeError: If the tokens are not on the grid for which the translator was built.
        """
        height, width = grid_hw
        if grid_hw != self.student_grid_hw or patches.shape[1] != height * width:
            raise ShapeError(
                f"A translator for a grid of {self.student_grid_hw[0]}x{self.student_grid_hw[1]} student "
                f"tokens was given {patches.shape[1]} tokens on {height}x{width}. Use images of the "
                "student's training size."
            )
        maps = patches.transpose(1, 2).reshape(len(patches), -1, height, width)
        prediction: Tensor = self.adapter(self.pad(maps))
        return prediction


def _to_16x16(width: int) -> list[nn.Module]:
    return [
        nn.LayerNorm([width, 16, 16]),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.LayerNorm([width, 16, 16]),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.LayerNorm([width, 16, 16]),
        _ToTokens(),
    ]


def _to_64x64(width: int) -> list[nn.Module]:
    return [
        nn.LayerNorm([width, 16, 16]),
        nn.ConvTranspose2d(width, width, 3, stride=2, padding=1),  # 31x31
        nn.ReLU(),
        nn.LayerNorm([width, 31, 31]),
        nn.ConvTranspose2d(width, width, 3, stride=2, output_padding=1),  # 64x64
        nn.ReLU(),
        nn.LayerNorm([width, 64, 64]),
        _ToTokens(),
    ]


def _to_any(width: int, student_grid_hw: GridHW, grid_hw: GridHW) -> list[nn.Module]:
    return [
        nn.LayerNorm([width, *student_grid_hw]),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        *_resize(student_grid_hw, grid_hw),
        nn.LayerNorm([width, *grid_hw]),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.LayerNorm([width, *grid_hw]),
        _ToTokens(),
    ]


def _resize(source_hw: GridHW, target_hw: GridHW) -> list[nn.Module]:
    shrinks = target_hw[0] < source_hw[0] or target_hw[1] < source_hw[1]
    return [] if source_hw == target_hw else [_Resize(target_hw, antialias=shrinks)]


class _Resize(nn.Module):
    def __init__(self, size_hw: GridHW, antialias: bool) -> None:
        super().__init__()
        self.size_hw = size_hw
        self.antialias = antialias

    def forward(self, maps: Tensor) -> Tensor:
        # in float32: antialiasing in bfloat16 is not there on every device, and a layer norm or linear comes
        # next
        resized = F.interpolate(maps.float(), self.size_hw, mode="bilinear", antialias=self.antialias)
        return resized.to(maps.dtype)


class _ToTokens(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H * W, C)."""
        return maps.flatten(2).transpose(1, 2)
