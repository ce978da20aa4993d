"""Batches through a ring of shared slots: workers read rows straight into them and pass slot numbers, not tensors."""

import mmap
import multiprocessing
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from theia.data.sampler import EvaluationSampler, Rows, TrainingSampler
from theia.errors import StoreError
from theia.store.schema import IMAGE, Field
from theia.store.split import Split
from theia.types import FeatureBatch

# Batches that a worker may fill ahead of the one being used.
_PREFETCH = 2
# Batches that stay valid after they were handed out: the one in use, and the one before it.
HELD = 2


class FeatureLoader:
    """Iterates over one split of a feature store.

    A batch is a view of a slot of the ring: it stays valid until ``HELD`` more batches have been taken. Copy what must
    live longer. With ``state_dict`` and ``load_state_dict`` it is what Lightning calls a stateful loader.

    Args:
        split: Opened split of a store.
        sampler: Which rows, in which order.
        workers: Reading processes; 0 reads in this process.
    """

    def __init__(self, split: Split, sampler: TrainingSampler | EvaluationSampler, workers: int) -> None:
        self.split = split
        self.sampler = sampler  # Lightning calls sampler.set_epoch
        self.batch_sampler = None  # Lightning asks anything that has a sampler for it
        slots = max(1, workers) * _PREFETCH + HELD
        self._ring = [_allocate(split.fields, sampler.largest) for _ in range(slots)]
        # The ring is anonymous shared memory, which only a fork inherits; unlike /dev/shm, containers do not limit it.
        parallel: dict[str, Any] = (
            {
                "num_workers": workers,
                "prefetch_factor": _PREFETCH,
                "persistent_workers": True,
                "multiprocessing_context": multiprocessing.get_context("fork"),
            }
            if workers
            else {}
        )
        self._reader: DataLoader[Any] = DataLoader(
            _SlotReader(split, self._ring),
            sampler=_Slots(sampler, slots),
            batch_size=None,
            collate_fn=_as_is,
            **parallel,
        )

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever a resumed one begins."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Batches from the sampler's position on.

        Raises:
            StoreError: If a shard changed or vanished since the store was opened.
        """
        # A generator, so that the order is settled by the first batch asked for: Lightning makes the iterator first and
        # sets the epoch afterwards.
        for item in self._reader:
            if isinstance(item, StoreError):
                raise item
            slot, rows = item
            if isinstance(self.sampler, TrainingSampler):
                self.sampler.advance()
            yield self._batch(self._ring[slot], rows)

    @property
    def _iterator(self) -> Any:
        # Under this name Lightning looks for worker processes to stop when a run ends or fails. Left to the garbage
        # collector, each takes the five seconds of a time-out.
        return self._reader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._reader._iterator = value

    def state_dict(self) -> dict[str, Any]:
        """State of the sampler."""
        return self.sampler.state_dict() if isinstance(self.sampler, TrainingSampler) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the sample after the last one that the state's run took.

        Raises:
            ConfigError: If this run would draw its samples in another order.
        """
        if isinstance(self.sampler, TrainingSampler):
            self.sampler.load_state_dict(state)

    def _batch(self, slot: Mapping[str, np.ndarray], rows: Rows) -> FeatureBatch:
        tensors = {field: torch.from_numpy(buffer[: len(rows)]) for field, buffer in slot.items()}
        labels = self.split.labels
        return FeatureBatch(
            images=tensors[IMAGE],
            patches={name: tensors[name] for name in self.split.teachers},
            scales=_suffixed(tensors, "/scale"),
            cls=_suffixed(tensors, "/cls"),
            labels=None if labels is None else torch.from_numpy(labels[rows]),
            rows=torch.from_numpy(rows),
        )


class _SlotReader(Dataset[Any]):
    def __init__(self, split: Split, ring: list[dict[str, np.ndarray]]) -> None:
        self.split = split
        self.ring = ring

    def __getitem__(self, item: tuple[int, Rows]) -> tuple[int, Rows] | StoreError:
        slot, rows = item
        try:
            self.split.read_into(rows, self.ring[slot])
        except StoreError as error:
            return error  # raised in the main process: a worker's own traceback would bury the message
        return item


class _Slots:
    """Numbers the sampler's batches with the slots that they go into, round and round.

    The reader runs at most ``workers * _PREFETCH`` batches ahead, so a slot comes up again only after ``HELD`` more
    batches were handed out.
    """

    def __init__(self, sampler: TrainingSampler | EvaluationSampler, slots: int) -> None:
        self.sampler = sampler
        self.slots = slots
        self._next = 0  # goes on over epochs: the last batch of one is still held when the next begins

    def __iter__(self) -> Iterator[tuple[int, Rows]]:
        for rows in self.sampler:
            yield self._next, rows
            self._next = (self._next + 1) % self.slots


def _allocate(fields: Mapping[str, Field], batch_size: int) -> dict[str, np.ndarray]:
    buffers = {}
    for name, field in fields.items():
        shape = (batch_size, *field.shape)
        size = int(np.prod(shape)) * field.dtype.itemsize
        buffers[name] = np.frombuffer(mmap.mmap(-1, size), field.dtype).reshape(shape)
    return buffers


def _suffixed(tensors: Mapping[str, torch.Tensor], suffix: str) -> dict[str, torch.Tensor]:
    return {name.removesuffix(suffix): tensor for name, tensor in tensors.items() if name.endswith(suffix)}


def _as_is(item: Any) -> Any:
    return item
