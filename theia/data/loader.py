"""Loads batches by row numbers: workers read into shared slots, and copies to the device run ahead."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from numpy.typing import NDArray

from theia.data.ring import LABELS, DeviceCopies, RawBatch, Ring, Samples, Slot
from theia.data.sampler import EvaluationSampler, Rows, TrainingSampler
from theia.data.workers import Request, Workers
from theia.errors import ConfigError
from theia.store.reader import Split
from theia.store.reads import AT_ONCE
from theia.store.schema import IMAGE
from theia.types import FeatureBatch

# Number of batches that each worker may fill ahead of the one in use.
_PREFETCH = 2

LARGE = "image/large"  # field of the same images at a larger size, for the student


# Reads rows, in an epoch, into a slot's arrays by field name.
Read = Callable[[Rows, Mapping[str, NDArray[Any]], int], None]


class FeatureLoader:
    """Iterates over one split of a feature store, or over other samples that can be read by row number.

    A batch is a view of a slot in a ring, valid until ``ring.HELD`` more batches were taken. Copy what must live
    longer. Only one iteration runs at a time: a second one ends the first. ``state_dict`` and ``load_state_dict``
    make this a stateful loader in Lightning's sense.

    Args:
        split: Opened split of a feature store, or other samples.
        sampler: Sampler that chooses the rows and their order.
        workers: Number of reading processes, which start with the first batch; 0 reads in this process.
        device: CUDA device to copy batches to, one batch ahead; by default batches stay in host memory.
        read: Function that the workers call to read samples that are not a split.
    """

    def __init__(
        self,
        split: Samples,
        sampler: TrainingSampler | EvaluationSampler,
        workers: int,
        device: torch.device | None = None,
        read: Read | None = None,
    ) -> None:
        self.split = split
        self.sampler = sampler  # Lightning calls sampler.set_epoch
        self.batch_sampler = None  # Lightning expects it on every object with a sampler
        self._device = device
        self._ahead = workers * _PREFETCH
        self._ring = Ring(split, sampler.largest, self._ahead)
        slots = self._ring.slots
        if read is None:
            # The training process reads by itself only where it must stay without threads, for instance to be forked.
            read = partial(_read, cast(Split, split), AT_ONCE if workers else 1)
        self._workers = Workers(partial(_fill, read, slots), workers, str(split.folder))
        self._copies: DeviceCopies | None = None
        self._iterations = 0

    def __len__(self) -> int:
        """Number of batches in a whole epoch, even if a resumed epoch begins later."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Gives batches from the sampler's position to the end of the epoch.

        Raises:
            StoreError: If a shard changed or vanished since the store was opened.
            ImageError: If samples are decoded from images, and one cannot be.
            WorkerError: If a worker died, for instance because memory ran out.
        """
        # A generator, so that the order is decided only when the first batch is taken: Lightning makes the iterator
        # first and sets the epoch afterwards.
        batches = self._in_memory()
        if self._device is not None:
            batches = self._on_device(batches, self._device)
        for batch in batches:
            size = None
            if isinstance(self.sampler, TrainingSampler):
                size = self.sampler.image_size
                self.sampler.advance()
            complete = self._complete(_features(batch, self.split), batch.without)
            yield complete if size is None else _resized(complete, batch.tensors, size)

    def state_dict(self) -> dict[str, Any]:
        """State of the sampler."""
        return self.sampler.state_dict() if isinstance(self.sampler, TrainingSampler) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the sample after the last one that the run of this state used.

        Raises:
            ConfigError: If this run would draw its samples in another order.
        """
        if isinstance(self.sampler, TrainingSampler):
            self.sampler.load_state_dict(state)

    def close(self) -> None:
        """Ends the workers and the iteration, and frees memory on the device. A new iteration starts them again."""
        self._iterations += 1
        self._workers.close()
        if self._copies is not None:
            self._copies.close()
            self._copies = None

    def _complete(self, batch: FeatureBatch, without: Sequence[str]) -> FeatureBatch:
        """Adds what is not among the samples, but not the features of some teachers."""
        return batch

    def _in_memory(self) -> Iterator[RawBatch]:
        self._workers.start()
        self._iterations += 1
        iteration = self._iterations
        asked = 0
        for request in self._requests():
            self._check_current(iteration)
            self._workers.ask(request._replace(slot=self._ring.claim()))
            asked += 1
            if asked > self._ahead:
                asked -= 1
                yield self._taken()
        for _ in range(asked):
            self._check_current(iteration)
            yield self._taken()

    def _requests(self) -> Iterator[Request]:
        """What is to be read, in an order that the sampler decides when the first is taken; without a slot yet."""
        sampler = self.sampler
        if not isinstance(sampler, TrainingSampler):
            yield from (Request(-1, rows) for rows in sampler)
            return
        for step, rows in enumerate(sampler, sampler.step):
            yield Request(-1, rows, sampler.epoch, sampler.left_out(step))

    def _taken(self) -> RawBatch:
        request = self._workers.take()
        return self._ring.batch(request.slot, request.rows, request.without)

    def _check_current(self, iteration: int) -> None:
        # An ended iteration would take batches of the current one.
        if iteration != self._iterations:
            raise ConfigError(
                "This iteration over a FeatureLoader was ended by a second one, or by close(). Make a loader for each."
            )

    def _on_device(self, batches: Iterator[RawBatch], device: torch.device) -> Iterator[RawBatch]:
        self._workers.start()  # workers must be forked before memory is page-locked
        if self._copies is None:
            self._copies = DeviceCopies(self._ring.slots, device)
        return self._copies.ahead(batches)


def _fill(read: Read, slots: Sequence[Slot], request: Request) -> None:
    read(request.rows, slots[request.slot].arrays_without(request.without), request.epoch)


def _read(split: Split, at_once: int, rows: Rows, arrays: Mapping[str, NDArray[Any]], _: int) -> None:
    split.read_into(rows, {name: arrays[name] for name in split.fields if name in arrays}, at_once)


def _features(batch: RawBatch, split: Samples) -> FeatureBatch:
    tensors = batch.tensors
    found = FeatureBatch(
        images=tensors[IMAGE],
        patches={name: tensors[name] for name in split.teachers if name in tensors},
        scales=_suffixed(tensors, "/scale"),
        cls=_suffixed(tensors, "/cls"),
        labels=tensors.get(LABELS),
        rows=torch.from_numpy(batch.rows),
    )
    for name, basis in split.bases.items():
        if name not in found.patches:
            continue
        stored, scale = found.patches[name], found.scales.pop(name, None)
        found.patches[name] = basis.restore(stored if scale is None else stored * scale[:, :1] + scale[:, 1:]).half()
    return found


def _resized(batch: FeatureBatch, tensors: Mapping[str, torch.Tensor], size: int) -> FeatureBatch:
    """The batch with images of another size, of larger ones if there are any."""
    if size == batch.images.shape[-1]:
        return batch

    from theia.models.backbone import resized  # imports timm, which reading processes do not need

    return replace(batch, images=resized(tensors.get(LARGE, tensors[IMAGE]), size))


def _suffixed(tensors: Mapping[str, torch.Tensor], suffix: str) -> dict[str, torch.Tensor]:
    return {name.removesuffix(suffix): tensor for name, tensor in tensors.items() if name.endswith(suffix)}
