"""Batches of a feature store: read by workers straight into shared slots, and copied to the device ahead of time."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from theia.data.ring import LABELS, RawBatch, Ring, Slot
from theia.data.sampler import EvaluationSampler, Rows, TrainingSampler
from theia.data.transfer import DeviceCopies
from theia.data.workers import Workers
from theia.errors import ConfigError
from theia.store.reader import Split
from theia.store.schema import IMAGE
from theia.types import FeatureBatch

# Batches that a worker may fill ahead of the one in use.
_PREFETCH = 2


class FeatureLoader:
    """Iterates over one split of a feature store.

    A batch is a view of a slot of a ring: it stays valid until ``ring.HELD`` more batches were taken. Copy what must
    live longer. One iteration at a time: a second one ends the first. With ``state_dict`` and ``load_state_dict`` it is
    what Lightning calls a stateful loader.

    Args:
        split: Opened split of a store.
        sampler: Which rows, in which order.
        workers: Reading processes; 0 reads in this process. They start with the first batch.
        device: CUDA device to copy batches to, one batch ahead; by default they stay in host memory.
    """

    def __init__(
        self,
        split: Split,
        sampler: TrainingSampler | EvaluationSampler,
        workers: int,
        device: torch.device | None = None,
    ) -> None:
        self.split = split
        self.sampler = sampler  # Lightning calls sampler.set_epoch
        self.batch_sampler = None  # Lightning asks anything that has a sampler for it
        self._device = device
        self._ahead = workers * _PREFETCH
        self._ring = Ring(split, sampler.largest, self._ahead)
        slots = self._ring.slots
        self._workers = Workers(lambda slot, rows: _read(split, rows, slots[slot]), workers, str(split.folder))
        self._copies: DeviceCopies | None = None
        self._iterations = 0

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever a resumed one begins."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Batches from the sampler's position on.

        Raises:
            StoreError: If a shard changed or vanished since the store was opened.
            WorkerError: If a worker died, of lack of memory for instance.
        """
        # A generator, so that the order is settled by the first batch asked for: Lightning makes the iterator first and
        # sets the epoch afterwards.
        batches = self._in_memory()
        if self._device is not None:
            batches = self._on_device(batches, self._device)
        for batch in batches:
            if isinstance(self.sampler, TrainingSampler):
                self.sampler.advance()
            yield _features(batch, self.split)

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

    def close(self) -> None:
        """Ends the workers, the iteration and its memory on a device. Another iteration starts them again."""
        self._iterations += 1
        self._workers.close()
        if self._copies is not None:
            self._copies.close()
            self._copies = None

    def _in_memory(self) -> Iterator[RawBatch]:
        self._workers.start()
        self._iterations += 1
        iteration = self._iterations
        asked = 0
        for rows in self.sampler:
            self._check_current(iteration)
            self._workers.ask(self._ring.claim(), rows)
            asked += 1
            if asked > self._ahead:
                asked -= 1
                yield self._ring.batch(*self._workers.take())
        for _ in range(asked):
            self._check_current(iteration)
            yield self._ring.batch(*self._workers.take())

    def _check_current(self, iteration: int) -> None:
        # It would take the other's batches.
        if iteration != self._iterations:
            raise ConfigError(
                "This iteration over a FeatureLoader was ended by a second one, or by close(). Make a loader for each."
            )

    def _on_device(self, batches: Iterator[RawBatch], device: torch.device) -> Iterator[RawBatch]:
        self._workers.start()  # a fork comes before any page-locking
        if self._copies is None:
            self._copies = DeviceCopies(self._ring.slots, device)
        return self._copies.ahead(batches)


def _read(split: Split, rows: Rows, slot: Slot) -> None:
    split.read_into(rows, {name: slot.arrays[name] for name in split.fields})


def _features(batch: RawBatch, split: Split) -> FeatureBatch:
    tensors = batch.tensors
    return FeatureBatch(
        images=tensors[IMAGE],
        patches={name: tensors[name] for name in split.teachers},
        scales=_suffixed(tensors, "/scale"),
        cls=_suffixed(tensors, "/cls"),
        labels=tensors.get(LABELS),
        rows=torch.from_numpy(batch.rows),
    )


def _suffixed(tensors: Mapping[str, torch.Tensor], suffix: str) -> dict[str, torch.Tensor]:
    return {name.removesuffix(suffix): tensor for name, tensor in tensors.items() if name.endswith(suffix)}
