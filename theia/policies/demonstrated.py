"""What a policy is fitted to: the steps of demonstrations, what they show, and the batches that they are given in."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theia.policies.action_heads import Head
from theia.policies.fusion import HISTORY
from theia.policies.sight import Sight
from theia.probing.frame_tokens import FrameTokens

# Gives pictures by the rows of their frames, uint8, shape (n, 3, S, S).
PicturesOf = Callable[[NDArray[np.int64]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Demonstrations:
    """Demonstrations of one task, frame by frame.

    Attributes:
        tokens: Tokens of a frozen encoder; ``None`` where the policy sees no picture, or the encoder is trained too.
        known: What is known beside the pictures, shape ``(frames, K)``.
        actions: What was done, shape ``(frames, A)``.
        rows: Rows of the frames that each step's action depends on, shape ``(frames, 3)``.
        ends: Row after the last frame of each step's episode, shape ``(frames,)``.
        pictures: Gives pictures, for an encoder that is trained with the policy.
    """

    tokens: FrameTokens | None
    known: NDArray[np.float32]
    actions: NDArray[np.float32]
    rows: NDArray[np.int64]
    ends: NDArray[np.int64]
    pictures: PicturesOf | None = None

    @staticmethod
    def of(
        tokens: FrameTokens | None,
        known: NDArray[np.float32],
        actions: NDArray[np.float32],
        lengths: Sequence[int],
        pictures: PicturesOf | None = None,
    ) -> "Demonstrations":
        """Makes them from what was recorded.

        Args:
            tokens: See :class:`Demonstrations`.
            known: See there.
            actions: See there.
            lengths: Number of frames of each demonstration.
            pictures: See :class:`Demonstrations`.
        """
        ends = np.repeat(np.cumsum(lengths), lengths)
        return Demonstrations(tokens, known, actions, history(lengths), ends, pictures)

    def __len__(self) -> int:
        return len(self.actions)

    def batch(self, head: Head, places: NDArray[np.int64], device: torch.device) -> tuple[Tensor | None, Tensor]:
        """What a head is given for some steps. The tokens of three frames are put together here, and nowhere kept."""
        known = torch.from_numpy(self.known[places]).to(device)
        if self.tokens is None:
            return None, known
        rows = self.rows[places]
        patches = torch.from_numpy(self.tokens.tokens[rows.ravel()]).to(device).float()
        maps = head.look(patches, self.tokens.grid)
        return maps.reshape(*rows.shape, *maps.shape[1:]), known

    def wanted(self, head: Head, places: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The actions that a head should predict for some steps, shape ``(B, k, A)``, and which of them count.

        After the end of an episode, its last action is repeated, and does not count.
        """
        if head.chunk == 1:
            return torch.from_numpy(self.actions[places][:, None]).to(device), None
        rows = places[:, None] + np.arange(head.chunk)
        ends = self.ends[places][:, None]
        actions = torch.from_numpy(self.actions[np.minimum(rows, ends - 1)]).to(device)
        return actions, torch.from_numpy(rows < ends).to(device)


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


@torch.no_grad()
def tokens_in_memory(
    sight: Sight, pictures: Iterable[NDArray[np.uint8]], count: int, device: torch.device
) -> FrameTokens:
    """Tokens of demonstrations that fit into memory, in half precision.

    Args:
        sight: The encoder.
        pictures: Batches of pictures, uint8, shape ``(B, 3, S, S)``.
        count: Number of pictures in all.
        device: Device of the encoder.

    Returns:
        The tokens, without statistics: for a head that takes them as they are.
    """
    kept, grid, start = np.zeros((0, 0, 0), np.float16), (0, 0), 0
    for batch in pictures:
        found = sight(torch.from_numpy(batch).to(device))
        if not start:
            # Once, whole: a list of batches would need the memory twice when it is put together.
            kept, grid = np.empty((count, *found.patches.shape[1:]), np.float16), found.grid
        kept[start : start + len(batch)] = found.patches.cpu().numpy()
        start += len(batch)
    return plain_tokens(kept, grid)


def plain_tokens(tokens: NDArray[np.float16], grid: tuple[int, int]) -> FrameTokens:
    """Tokens without statistics, for a head that takes them as they are.

    Args:
        tokens: Shape ``(frames, N, C)``.
        grid: Their rows and columns.
    """
    channels = tokens.shape[2]
    return FrameTokens(tokens, grid, np.zeros(channels), np.ones(channels), np.eye(channels))


def batches(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Divides steps into batches. A single one that is left over joins the last: a batch norm needs two."""
    stops = list(range(batch_size, len(order), batch_size))
    if stops and len(order) - stops[-1] == 1:
        stops.pop()
    return np.split(order, stops)


def updates_per_epoch(steps: int, batch_size: int) -> int:
    """Number of batches that :func:`batches` makes of so many steps."""
    return max(1, -(-steps // batch_size) - (steps % batch_size == 1))
