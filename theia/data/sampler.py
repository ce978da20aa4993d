"""Who reads which sample at which step. The state of the training sampler is the point at which a run resumes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from theia.errors import ConfigError

Rows = npt.NDArray[np.int64]

# Which rows are held out or kept must not change with a run's seed, or runs on "the same 10 %" would not be comparable.
_SPLIT_SEED = 0


def hold_out(rows: int, share: float) -> tuple[Rows, Rows]:
    """Cuts one split in two, the same way for every seed.

    Args:
        rows: Samples in the split.
        share: Share of the second part, in ``(0, 1)``; at least one sample.

    Returns:
        Sorted row numbers to train on, and to hold out.
    """
    order = np.random.default_rng(_SPLIT_SEED).permutation(rows)
    held = max(1, round(share * rows))
    return np.sort(order[held:]), np.sort(order[:held])


def fixed_fraction(rows: Rows, fraction: float) -> Rows:
    """A fixed part of some rows, the same for every seed; a smaller fraction is contained in a larger one.

    Args:
        rows: Row numbers.
        fraction: Share to keep, in ``(0, 1]``; at least one row.

    Returns:
        Sorted row numbers.
    """
    kept = max(1, round(fraction * len(rows)))
    return np.sort(np.random.default_rng(_SPLIT_SEED).permutation(rows)[:kept])


class TrainingSampler:
    """Shuffled global batches, cut among the processes. Call :meth:`set_epoch` before each epoch but the first.

    The order is a function of seed and epoch alone. Global step ``s`` of an epoch sees samples
    ``[s * batch_size, (s + 1) * batch_size)`` of that order, however many processes share them and however many workers
    read them; process ``r`` takes the ``r``-th piece. The last, incomplete batch of an epoch is left out.

    Args:
        rows: Row numbers to draw from.
        batch_size: Global batch: samples per step over all processes.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ConfigError: If the batch cannot be cut evenly, or there are fewer samples than one batch.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size % world_size:
            raise ConfigError(
                f"The global batch of {batch_size} cannot be shared evenly by {world_size} processes. "
                "Set data.batch_size to a multiple of their number."
            )
        if len(rows) < batch_size:
            raise ConfigError(
                f"The training split has {len(rows)} samples, fewer than one global batch of {batch_size}. "
                "Lower data.batch_size or extract more images."
            )
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.largest = batch_size // world_size  # samples per batch of this process
        self.epoch = 0
        self.consumed = 0  # samples of this epoch that global steps have taken, over all processes

    def __len__(self) -> int:
        """Global steps in an epoch."""
        return len(self.rows) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Moves to an epoch; Lightning calls it before each one."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.consumed = 0

    def __iter__(self) -> Iterator[Rows]:
        """This process's rows of each remaining step of the epoch."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        for step in range(self.consumed // self.batch_size, len(self)):
            start = step * self.batch_size + self.rank * self.largest
            yield order[start : start + self.largest]

    def advance(self) -> None:
        """Notes that one global step has been taken."""
        self.consumed += self.batch_size

    @property
    def _order(self) -> dict[str, int]:
        return {"seed": self.seed, "rows": len(self.rows), "batch_size": self.batch_size}

    def state_dict(self) -> dict[str, Any]:
        """Epoch and samples consumed in it, with what decides the order. Plain numbers."""
        return {"epoch": self.epoch, "consumed": self.consumed} | self._order

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a state was taken; the number of processes may have changed since.

        Raises:
            ConfigError: If the order would be another: other data, another seed or another global batch.
        """
        then = {name: state[name] for name in self._order}
        if then != self._order:
            raise ConfigError(
                f"The checkpoint's run drew its samples with {then}, this one with {self._order}: their order would "
                "change in mid-run. Resume with the same store, data.seed, data.batch_size and data.fraction."
            )
        self.epoch = state["epoch"]
        self.consumed = state["consumed"]


class EvaluationSampler:
    """Every row once, in order, shared by the processes without padding, in equally many batches for each of them.

    Equally many, because a process that runs out early leaves the others waiting in a collective.

    Args:
        rows: Row numbers to read.
        batch_size: Samples per batch and process; one more where the last ones are fewer than the processes.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ConfigError: If there are fewer samples than processes.
    """

    def __init__(self, rows: Rows, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if len(rows) < world_size:
            raise ConfigError(
                f"There are {len(rows)} samples to evaluate for {world_size} processes. Use fewer processes."
            )
        steps = min(-(-len(rows) // (batch_size * world_size)), len(rows) // world_size)
        self.batches = np.array_split(rows, steps * world_size)[rank::world_size]
        self.largest = max(len(batch) for batch in self.batches)

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Rows]:
        """This process's rows of each batch."""
        return iter(self.batches)
