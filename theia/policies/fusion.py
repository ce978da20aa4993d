"""How the tokens of three frames become one vector: maps through convolutions, or vectors with their differences."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from theia.errors import ConfigError
from theia.probing.frame_tokens import FrameTokens

HISTORY = 3  # number of frames that an action depends on
HIDDEN = 256  # channels of the convolutions, units of the hidden layers
_KERNELS = ((4, 1), (3, 0), (3, 0))  # and padding
_STRIDES = (2, 2, 1)
_STRIDES_OF_SMALL = (1, 2, 1)
_STRIDES_OF_SMALLEST = (1, 1, 1)

# Rows and columns that the convolutions need, with each choice of strides.
_LEAST_FULL, _LEAST_SMALL, _LEAST_ROWS = 14, 8, 6


def strides_for(grid: tuple[int, int]) -> tuple[int, int, int]:
    """Strides of the three convolutions.

    The paper's are 2, 2 and 1, which need 14x14 tokens. A smaller grid, such as one of averaged tokens, has been made
    coarse already: the first stride is left out from 8x8 on, the second too from 6x6 on.

    Raises:
        ConfigError: If the grid is smaller than 6x6.
    """
    if min(grid) >= _LEAST_FULL:
        return _STRIDES
    if min(grid) >= _LEAST_SMALL:
        return _STRIDES_OF_SMALL
    if min(grid) >= _LEAST_ROWS:
        return _STRIDES_OF_SMALLEST
    raise ConfigError(
        f"The convolutions of the policy need at least {_LEAST_ROWS}x{_LEAST_ROWS} tokens, and 14x14 for the paper's "
        f"strides; this encoder gives {grid[0]}x{grid[1]}. Take --features vector, or another encoder."
    )


class Convolutions(nn.Sequential):
    """Three convolutions, each with LayerNorm and ReLU, that make a vector of the stacked maps of three frames.

    Args:
        channels: Number of channels of the stacked maps.
        grid: Rows and columns of the maps.

    Attributes:
        outputs: Number of values that come out.

    Raises:
        ConfigError: If the grid is too small.

    Source: Theia, appendix on the policy heads; the norms are those of the authors' code.
    """

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        layers: list[nn.Module] = []
        rows, columns = grid
        for (kernel, padding), stride in zip(_KERNELS, strides_for(grid), strict=True):
            layers.append(nn.Conv2d(channels, HIDDEN, kernel, stride, padding))
            rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (rows, columns))
            layers += [nn.LayerNorm((HIDDEN, rows, columns)), nn.ReLU()]
            channels = HIDDEN
        super().__init__(*layers, nn.Flatten())
        self.outputs = HIDDEN * rows * columns


class Reduction(nn.Module):
    """Averages tokens to a coarser grid and keeps their first principal components; or leaves them as they are.

    Args:
        channels: Number of channels of the tokens.
        grid: Rows and columns that are kept.
        components: Number of principal components that are kept; ``None`` for all channels, as they are.

    Attributes:
        channels: Number of channels that are kept.
    """

    mean: Tensor  # (C,)
    projection: Tensor  # (C, components), divided by the deviations of the channels

    def __init__(self, channels: int, grid: tuple[int, int], components: int | None) -> None:
        super().__init__()
        self.grid, self.projects = grid, components is not None
        self.channels = min(components, channels) if components is not None else channels
        self.register_buffer("mean", torch.zeros(channels if self.projects else 0))
        self.register_buffer("projection", torch.zeros((channels, self.channels) if self.projects else (0, 0)))

    def fit(self, tokens: FrameTokens) -> None:
        """Takes mean, deviations and components from the tokens of the demonstrations."""
        if self.projects:
            self.mean.copy_(torch.from_numpy(tokens.mean))
            scaled = tokens.components(self.channels) / tokens.deviation[:, None].astype(np.float32)
            self.projection.copy_(torch.from_numpy(scaled))

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps of shape ``(B, channels, H, W)`` from tokens of shape ``(B, N, C)``, row by row."""
        if self.projects:
            patches = (patches - self.mean) @ self.projection
        maps = patches.transpose(1, 2).reshape(len(patches), -1, *grid)
        return maps if grid == self.grid else F.adaptive_avg_pool2d(maps, self.grid)


def fuse(vectors: Tensor) -> Tensor:
    """Fuses the vectors of three frames into their two differences and the last of them.

    Args:
        vectors: Shape ``(B, 3, C)``.

    Returns:
        Shape ``(B, 3 * C)``.
    """
    first, second, third = vectors[:, 0], vectors[:, 1], vectors[:, 2]
    return torch.cat([second - first, third - second, third], 1)
