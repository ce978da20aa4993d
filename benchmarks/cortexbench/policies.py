"""The paper's two policy heads, on what an encoder gives for three frames, and the controls that see less or more."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from theia.errors import ConfigError
from theia.probing.frame_tokens import FrameTokens

HISTORY = 3  # number of frames that an action depends on
HIDDEN = 256  # channels of the convolutions, units of the hidden layers
_HIDDEN_LAYERS = 3
_LAST_SCALE = 0.01
_KERNELS = ((4, 1), (3, 0), (3, 0))  # and padding
_STRIDES = (2, 2, 1)
_STRIDES_OF_SMALL = (1, 2, 1)
_STRIDES_OF_SMALLEST = (1, 1, 1)

# Rows and columns that the convolutions need, with each choice of strides.
LEAST_FULL, LEAST_SMALL, LEAST_ROWS = 14, 8, 6


def history(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Rows of the frames that each step's action depends on: the last but one, the last, and this one.

    Args:
        lengths: Number of frames of each episode; episodes lie one after another.

    Returns:
        Rows, shape ``(frames, 3)``. The first frame of an episode stands for those before it.
    """
    starts = np.cumsum([0, *lengths])
    rows = [
        np.maximum(np.arange(start, stop)[:, None] + np.arange(1 - HISTORY, 1), start)
        for start, stop in itertools.pairwise(starts)
    ]
    return np.concatenate(rows)


def strides_for(grid: tuple[int, int]) -> tuple[int, int, int]:
    """Strides of the three convolutions.

    The paper's are 2, 2 and 1, which need 14x14 tokens. A smaller grid, such as one of averaged tokens, has been made
    coarse already: the first stride is left out from 8x8 on, the second too from 6x6 on.

    Raises:
        ConfigError: If the grid is smaller than 6x6.
    """
    if min(grid) >= LEAST_FULL:
        return _STRIDES
    if min(grid) >= LEAST_SMALL:
        return _STRIDES_OF_SMALL
    if min(grid) >= LEAST_ROWS:
        return _STRIDES_OF_SMALLEST
    raise ConfigError(
        f"The convolutions of the policy need at least {LEAST_ROWS}x{LEAST_ROWS} tokens, and 14x14 for the paper's "
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


class Policy(nn.Module):
    """From what is known of three frames to an action.

    A vector is fused as ``[e1 - e0, e2 - e1, e2]`` and goes through the MLP; maps are stacked in channels and go
    through the convolutions before. The MLP begins with a batch norm and has three hidden layers of 256; its last
    layer is scaled by 0.01.

    Args:
        channels: Number of channels of the encoder's tokens; 0 for a control that sees no picture.
        grid: Rows and columns of the tokens; 1x1 for a vector.
        known: Number of values that are known beside the pictures: proprioception, or the simulator's whole state.
        actions: Number of values of an action.
        components: Number of principal components of the tokens that are used; ``None`` for the tokens as they are.

    Attributes:
        options: The arguments, from which the same policy can be built again.

    Raises:
        ConfigError: If the grid is too small for the convolutions.

    Source: Theia, appendix on CortexBench.
    """

    def __init__(
        self, channels: int, grid: tuple[int, int], known: int, actions: int, components: int | None = None
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "channels": channels, "grid": tuple(grid), "known": known, "actions": actions, "components": components,
        }  # fmt: skip
        self.is_spatial = channels > 0 and grid != (1, 1)
        self.reduction = Reduction(channels, grid, components if channels else None)
        self.convolutions: Convolutions | None = None
        outputs = HISTORY * self.reduction.channels
        if self.is_spatial:
            self.convolutions = Convolutions(outputs, grid)
            outputs = self.convolutions.outputs
        inputs = outputs + known
        layers: list[nn.Module] = [nn.BatchNorm1d(inputs)]
        for _ in range(_HIDDEN_LAYERS):
            layers += [nn.Linear(inputs, HIDDEN), nn.ReLU()]
            inputs = HIDDEN
        last = nn.Linear(inputs, actions)
        with torch.no_grad():
            last.weight.mul_(_LAST_SCALE)
            last.bias.mul_(_LAST_SCALE)
        self.mlp = nn.Sequential(*layers, last)

    @property
    def sees(self) -> bool:
        """Whether the policy is given pictures."""
        return self.reduction.channels > 0

    def look(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the policy keeps of a frame.

        Args:
            patches: Tokens of the encoder, shape ``(B, N, C)``.
            grid: Their rows and columns.

        Returns:
            Maps, shape ``(B, channels, H, W)``.
        """
        maps: Tensor = self.reduction(patches, grid)
        return maps

    def forward(self, frames: Tensor | None, known: Tensor) -> Tensor:
        """Actions, shape ``(B, A)``.

        Args:
            frames: What :meth:`look` gave for the last but one frame, the last one, and this one, shape
                ``(B, 3, channels, H, W)``; ``None`` for a control that sees no picture.
            known: Proprioception or state, shape ``(B, K)``.
        """
        if frames is not None and self.convolutions is not None:
            known = torch.cat([self.convolutions(frames.flatten(1, 2)), known], 1)
        elif frames is not None:
            known = torch.cat([fuse(frames.flatten(2)), known], 1)
        actions: Tensor = self.mlp(known)
        return actions


def fuse(vectors: Tensor) -> Tensor:
    """Fuses the vectors of three frames into their two differences and the last of them.

    Args:
        vectors: Shape ``(B, 3, C)``.

    Returns:
        Shape ``(B, 3 * C)``.
    """
    first, second, third = vectors[:, 0], vectors[:, 1], vectors[:, 2]
    return torch.cat([second - first, third - second, third], 1)
