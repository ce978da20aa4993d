"""Decides which process reads which sample at which step. A run resumes at the state of its training sampler."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from theia.errors import ConfigError
from theia.store.schema import image_id

Rows = npt.NDArray[np.int64]

# The choice of rows must not depend on a run's seed, or runs on "the same 10 %" would not be comparable.
_SPLIT_SEED = 0
_SIZES, _TEACHERS = 1, 2  # tell what is drawn for a step from what others draw with the same numbers


def hold_out(rows: int, share: float, ids: Sequence[str] | None = None) -> tuple[Rows, Rows]:
    """Divides one split in two, in the same way for every seed of a run.

    Args:
        rows: Number of samples in the split.
        share: Share of samples to hold out, in ``(0, 1)``; at least one sample is held out.
        ids: Their ids, if some samples are views of others. Then whole images are held out, as they are: their views
            are in neither part.

    Returns:
        Sorted row numbers to train on, and sorted row numbers to hold out.
    """
    images = np.arange(rows) if ids is None else unaltered(ids)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    held = max(1, round(share * len(images)))
    held_out = np.sort(images[order[:held]])
    if ids is None:
        return np.sort(order[held:]), held_out
    return np.setdiff1d(np.arange(rows), with_views(ids, held_out)), held_out


def unaltered(ids: Sequence[str]) -> Rows:
    """Sorted row numbers of the samples that are images as they are, and no views of others."""
    return np.array([row for row, sample in enumerate(ids) if image_id(sample) == sample], np.int64)


def with_views(ids: Sequence[str], images: Rows) -> Rows:
    """Sorted row numbers of some images and of all their views.

    Args:
        ids: Ids of all samples.
        images: Row numbers of the images.
    """
    chosen = {ids[row] for row in images}
    return np.array([row for row, sample in enumerate(ids) if image_id(sample) in chosen], np.int64)


def fixed_fraction(rows: Rows, fraction: float) -> Rows:
    """Keeps a share of rows, the same rows for every seed; a smaller share is contained in a larger one.

    Args:
        rows: Row numbers to choose from.
        fraction: Share of rows to keep, in ``(0, 1]``; at least one row is kept.

    Returns:
        Sorted row numbers that are kept.
    """
    kept = max(1, round(fraction * len(rows)))
    return np.sort(np.random.default_rng(_SPLIT_SEED).permutation(rows)[:kept])


def repeated(rows: Rows, times: float, share: Callable[[Rows, float], Rows] = fixed_fraction) -> Rows:
    """Repeats rows, the same ones for every seed.

    Args:
        rows: Row numbers.
        times: How often each is to be there; of 2.5, half of them are there three times.
        share: Function that keeps a share of rows.
    """
    whole = int(times)
    more = share(rows, times - whole) if times > whole and len(rows) else rows[:0]
    return np.concatenate([np.repeat(rows, whole), more])


def check_drawn(teachers: Sequence[str], count: int | None) -> None:
    """Checks the number of teachers that each step draws.

    Args:
        teachers: Names of all teachers.
        count: Number of teachers to draw; ``None`` for all.

    Raises:
        ConfigError: If there are not so many.
    """
    if count is not None and count > len(teachers):
        raise ConfigError(
            f"data.teachers_per_step is {count}, but there are {len(teachers)} teachers: {', '.join(teachers)}. Give "
            "at most that many, or leave it out."
        )


def teachers_of_step(teachers: Sequence[str], count: int, seed: int, step: int) -> list[str]:
    """Draws the teachers of a step. The draw depends on nothing but names, seed and step.

    Teachers are taken from rounds, in each of which every teacher stands once in a random order, so that all are drawn
    equally often. Where a step takes its teachers from two rounds, the second one begins with others than those of the
    first.

    Args:
        teachers: Names of all teachers, in any order.
        count: Number of teachers to draw, from 1 to all.
        seed: Seed of the draws.
        step: Number of the step over all epochs, from 0.

    Returns:
        Different names, sorted.

    Source: PRISM trains with one teacher in each step.
    """
    names = sorted(teachers)
    rounds = count // math.gcd(count, len(names))  # after which a round and a step end together
    block, within = divmod(step * count, rounds * len(names))
    random = np.random.default_rng([seed, block, _TEACHERS])
    drawn: list[str] = []
    for _ in range(rounds):
        begun = drawn[len(drawn) - len(drawn) % count :]
        drawn += sorted(random.permutation(names).tolist(), key=begun.__contains__)
    return sorted(drawn[within : within + count])


class TrainingSampler:
    """Shuffled global batches, divided among the processes. Call :meth:`set_epoch` before each epoch but the first.

    The order depends only on seed and epoch. Global step ``s`` of an epoch uses samples
    ``[s * batch_size, (s + 1) * batch_size)`` of that order, whatever the number of processes and workers. Process
    ``r`` takes the ``r``-th piece. The last, incomplete batch of an epoch is left out.

    Args:
        rows: Row numbers to draw from.
        batch_size: Global batch: samples per step over all processes.
        seed: Seed for the order of the samples.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        image_sizes: Heights and widths in pixels of which each global step takes one; none if all steps are alike.
        teachers: Names of the teachers whose features are read.
        teachers_per_step: Number of those that each global step takes; all by default.

    Raises:
        ConfigError: If the batch cannot be divided evenly, or there are fewer samples than one batch, or fewer teachers
            than a step is to take.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        image_sizes: Sequence[int] = (),
        teachers: Sequence[str] = (),
        teachers_per_step: int | None = None,
    ) -> None:
        check_drawn(teachers, teachers_per_step)
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
        self.image_sizes = list(image_sizes)
        self.teachers = list(teachers)
        self.teachers_per_step = teachers_per_step
        self.epoch = 0
        self.consumed = 0  # samples of this epoch used by global steps, over all processes

    def __len__(self) -> int:
        """Number of global steps in an epoch."""
        return len(self.rows) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Moves to an epoch; Lightning calls it before each one."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.consumed = 0

    def __iter__(self) -> Iterator[Rows]:
        """Gives this process's rows for each remaining step of the epoch."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        for step in range(self.step, len(self)):
            start = step * self.batch_size + self.rank * self.largest
            yield order[start : start + self.largest]

    @property
    def step(self) -> int:
        """Number of the next global step in this epoch, from 0."""
        return self.consumed // self.batch_size

    def left_out(self, step: int) -> list[str]:
        """Teachers whose features a step of this epoch does without; the same ones in all processes.

        Args:
            step: Number of the step in the epoch.
        """
        if self.teachers_per_step is None:
            return []
        drawn = teachers_of_step(self.teachers, self.teachers_per_step, self.seed, self.epoch * len(self) + step)
        return [name for name in self.teachers if name not in drawn]

    @property
    def image_size(self) -> int | None:
        """Height and width of the student's images in the next step; ``None`` if all steps are alike.

        The same in all processes: seed, epoch and number of the step decide it.

        Source: EUPE and C-RADIOv4 draw the student's resolution for each step.
        """
        if not self.image_sizes:
            return None
        return int(np.random.default_rng([self.seed, self.epoch, self.step, _SIZES]).choice(self.image_sizes))

    def advance(self) -> None:
        """Notes that one global step has been taken."""
        self.consumed += self.batch_size

    @property
    def _order(self) -> dict[str, int]:
        return {"seed": self.seed, "rows": len(self.rows), "batch_size": self.batch_size}

    def state_dict(self) -> dict[str, Any]:
        """Epoch, samples used in it, and the values that decide the order, as plain numbers."""
        drawn: dict[str, Any] = {"image_sizes": self.image_sizes} if self.image_sizes else {}
        if self.teachers_per_step is not None:
            drawn["teachers_per_step"] = self.teachers_per_step
        return {"epoch": self.epoch, "consumed": self.consumed} | self._order | drawn

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the position of a state; the number of processes may have changed since.

        Raises:
            ConfigError: If the order would differ because the data, the seed or the global batch differ; or if the
                sizes of the images or the teachers of a step would.
        """
        then = {name: state[name] for name in self._order}
        if then != self._order:
            raise ConfigError(
                f"The checkpoint's run drew its samples with {then}, this one with {self._order}: their order would "
                "change in mid-run. Resume with the same store, data.seed, data.batch_size and data.fraction."
            )
        if state.get("image_sizes", []) != self.image_sizes:
            raise ConfigError(
                f"The checkpoint's run drew the sizes of its images from {state.get('image_sizes', [])}, this one from "
                f"{self.image_sizes}. Resume with the same data.image_sizes."
            )
        if state.get("teachers_per_step") != self.teachers_per_step:
            raise ConfigError(
                f"The checkpoint's run drew {state.get('teachers_per_step', 'all')} of its teachers for each step, "
                f"this one draws {self.teachers_per_step or 'all'}. Resume with the same data.teachers_per_step."
            )
        self.epoch = state["epoch"]
        self.consumed = state["consumed"]


class EvaluationSampler:
    """Every row once, in order, divided among the processes without padding.

    Each process has the same number of batches, as a process that finishes early would leave the others waiting in a
    collective operation.

    Args:
        rows: Row numbers to read.
        batch_size: Samples per batch and process; a batch has one more if fewer samples than processes are left over.
        rank: Number of this process, from 0.
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
        """Number of batches of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Rows]:
        """Gives this process's rows for each batch."""
        return iter(self.batches)
