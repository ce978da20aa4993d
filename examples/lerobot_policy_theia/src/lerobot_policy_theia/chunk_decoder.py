"""Patch tokens and state to a chunk of actions: plain PyTorch, it knows neither LeRobot nor Theia."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ChunkDecoder(nn.Module):
    """A transformer decoder: one query for each action of the chunk looks at all tokens of all cameras and the state.

    Args:
        channels: ``C`` of the feature maps.
        cameras: How many maps.
        state: Values of the robot's state; 0 for none.
        actions: Values of an action.
        chunk: Actions at once.
        dim: Channels of the decoder, a multiple of 4 and of ``heads``.
        heads: Of its attention.
        layers: Of it.
        dropout: In it.
    """

    def __init__(
        self,
        *,
        channels: int,
        cameras: int,
        state: int,
        actions: int,
        chunk: int,
        dim: int,
        heads: int,
        layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.tokens = nn.Linear(channels, dim)
        self.cameras = nn.Parameter(0.02 * torch.randn(cameras, dim))
        self.state = nn.Linear(state, dim) if state else None
        self.queries = nn.Parameter(torch.randn(chunk, dim))
        layer = nn.TransformerDecoderLayer(dim, heads, 4 * dim, dropout, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(dim))
        self.actions = nn.Linear(dim, actions)

    def forward(self, maps: Sequence[Tensor], state: Tensor | None = None) -> Tensor:
        """Normalised actions, shape ``(B, chunk, A)``.

        Args:
            maps: Of each camera, shape ``(B, C, rows, columns)``.
            state: Shape ``(B, S)``, if there is one.
        """
        memory = []
        for features, camera in zip(maps, self.cameras, strict=True):
            tokens = self.tokens(features.flatten(2).transpose(1, 2))
            memory.append(tokens + grid_positions(features.shape[-2:], tokens) + camera)
        if self.state is not None:
            memory.append(self.state(state)[:, None])
        seen = torch.cat(memory, dim=1)
        chunk: Tensor = self.actions(self.decoder(self.queries.expand(len(seen), -1, -1), seen))
        return chunk


def grid_positions(grid: Sequence[int], like: Tensor) -> Tensor:
    """Where each token is: sines and cosines of its row and column.

    Args:
        grid: Rows and columns.
        like: Any tensor of the last dimension, type and device wanted.

    Returns:
        Shape ``(rows * columns, dim)``.
    """
    quarter = like.shape[-1] // 4
    # From a wave over the grid's length to one over two tokens.
    waves = torch.logspace(0, 1, quarter, base=max(grid) / 2, device=like.device) * torch.pi / max(grid)
    rows, columns = (torch.arange(side, device=like.device)[:, None] * waves for side in grid)
    down = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, grid[1], -1)
    across = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(grid[0], -1, -1)
    return torch.cat([down, across], dim=2).flatten(0, 1).to(like.dtype)
