"""The memory for batches: slots shared with the reading workers, and copies on a CUDA device while a step runs."""

import logging
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from theia.data.sampler import Rows
from theia.store.components import Basis
from theia.store.reader import allocate, shared_array
from theia.store.schema import Field

logger = logging.getLogger(__name__)

# A batch stays valid until this many more were taken, so the batch in use and the one before it are valid.
HELD = 2
# Key of the labels, in addition to the names of a split's fields.
LABELS = "labels"


class Event(Protocol):
    """An event that can be waited for, such as a ``torch.cuda.Event``."""

    def synchronize(self) -> None:
        """Waits until the event has happened."""


@dataclass
class Slot:
    """Memory for one batch.

    Attributes:
        arrays: Arrays by field name, each of shape ``(largest batch, *field.shape)``.
        copied: Event at the end of the last copy from this slot to a device, or ``None`` if there is no such copy.
    """

    arrays: dict[str, NDArray[Any]]
    copied: Event | None = None

    def arrays_without(self, teachers: Collection[str]) -> dict[str, NDArray[Any]]:
        """The arrays by field name, but not those of some teachers."""
        return {name: array for name, array in self.arrays.items() if name.partition("/")[0] not in teachers}


@dataclass(frozen=True)
class RawBatch:
    """A batch in a filled slot.

    Attributes:
        slot: Slot that the batch was read into.
        rows: Row numbers of the samples, shape ``(B,)``.
        tensors: Tensors by field name, of shape ``(B, ...)``: views of the slot, or copies on a device.
        without: Names of the teachers whose features were not read.
    """

    slot: Slot
    rows: Rows
    tensors: dict[str, torch.Tensor]
    without: Sequence[str] = ()


class Samples(Protocol):
    """What a loader reads by row number. A :class:`theia.store.reader.Split` is one."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """Type and shape of one row of each field: ``"image"``, ``NAME``, ``NAME/scale``, ``NAME/cls``."""

    @property
    def teachers(self) -> Collection[str]:
        """Names of the teachers whose features are among the fields."""

    @property
    def bases(self) -> Mapping[str, Basis]:
        """Bases of the teachers of which components are stored, by name."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class index of every row, or ``None``."""

    @property
    def folder(self) -> object:
        """Place of the samples, for messages."""


class Ring:
    """Slots that are filled in turn.

    A slot is filled again only after ``HELD`` more batches were taken *and* the copy of its batch to a device is done.
    The number of slots ensures the first, :meth:`claim` the second.

    Args:
        samples: Samples that the slots will hold.
        batch_size: Number of samples in the largest batch.
        ahead: Number of batches that are read ahead of the one in use.
    """

    def __init__(self, samples: Samples, batch_size: int, ahead: int) -> None:
        self.slots = [Slot(allocate(samples.fields, batch_size)) for _ in range(ahead + HELD)]
        self._labels = samples.labels
        if self._labels is not None:
            for slot in self.slots:
                slot.arrays[LABELS] = shared_array((batch_size,), self._labels.dtype)
        self._next = 0  # continues across epochs, as the last batch of one epoch is still valid when the next begins

    @property
    def bytes(self) -> int:
        """Memory of all slots."""
        return sum(array.nbytes for slot in self.slots for array in slot.arrays.values())

    def claim(self) -> int:
        """Waits until the next slot may be filled again, and gives its number."""
        number = self._next
        self._next = (number + 1) % len(self.slots)
        slot = self.slots[number]
        if slot.copied is not None:
            slot.copied.synchronize()
            slot.copied = None
        return number

    def batch(self, number: int, rows: Rows, without: Sequence[str] = ()) -> RawBatch:
        """The batch in a slot.

        Args:
            number: Number of the slot.
            rows: Row numbers of the samples in the slot.
            without: Names of the teachers whose features were not read.
        """
        slot = self.slots[number]
        if self._labels is not None:
            slot.arrays[LABELS][: len(rows)] = self._labels[rows]
        arrays = slot.arrays_without(without)
        tensors = {name: torch.from_numpy(array[: len(rows)]) for name, array in arrays.items()}
        return RawBatch(slot, rows, tensors, without)


class DeviceCopies:
    """Copies batches to a CUDA device, one batch ahead of the one in use, on a separate stream.

    A copy waits on the device for the work queued before it, so it never overwrites a batch that is still in use. It
    runs while the next step computes, and each step waits on the device for the copy of its own batch, which began one
    step earlier. The host waits for neither.

    Args:
        slots: Slots of the host's ring. Their memory is page-locked here, so that the device can read it by itself.
            Worker processes must be forked before, while the driver does not know of this memory.
        device: CUDA device to copy to.
    """

    def __init__(self, slots: Sequence[Slot], device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        locked = _page_lock([array for slot in slots for array in slot.arrays.values()], device)
        self._unlock = weakref.finalize(self, _page_unlock, locked)  # this also keeps the memory alive until then
        whole = {name: torch.from_numpy(array) for name, array in slots[0].arrays.items()}
        # HELD batches may be in use while one more is being copied.
        self._targets = [
            {name: torch.empty_like(tensor, device=device) for name, tensor in whole.items()} for _ in range(HELD + 1)
        ]
        self._next = 0

    def ahead(self, batches: Iterable[RawBatch]) -> Iterator[RawBatch]:
        """Gives the same batches on the device. Each stays valid until ``HELD`` more were taken.

        Args:
            batches: Batches in slots of the host's ring.
        """
        started: tuple[RawBatch, torch.cuda.Event] | None = None
        for batch in batches:
            following = self._start(batch)
            if started is not None:
                yield self._ready(*started)
            started = following
        if started is not None:
            yield self._ready(*started)

    def close(self) -> None:
        """Frees the memory on the device and unlocks the memory of the host."""
        # An iteration that was cut short leaves a copy to wait for. A failed device has reported its error already.
        with suppress(RuntimeError):
            self._stream.synchronize()
        self._targets = []
        self._unlock()

    def _start(self, batch: RawBatch) -> tuple[RawBatch, torch.cuda.Event]:
        target = self._targets[self._next]
        self._next = (self._next + 1) % len(self._targets)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, tensor in batch.tensors.items():
                target[name][: len(tensor)].copy_(tensor, non_blocking=True)
        copied = self._stream.record_event()
        batch.slot.copied = copied  # the host's ring refills the slot only after this event
        return replace(batch, tensors={name: target[name][: len(batch.rows)] for name in batch.tensors}), copied

    def _ready(self, batch: RawBatch, copied: torch.cuda.Event) -> RawBatch:
        torch.cuda.current_stream(self._device).wait_event(copied)
        return batch


def _page_lock(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[NDArray[Any]]:
    """Page-locks all arrays, or none if the system refuses one."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    locked: list[NDArray[Any]] = []
    try:
        for array in arrays:
            with torch.cuda.device(device):
                torch.cuda.check_error(runtime.cudaHostRegister(array.ctypes.data, array.nbytes, 0))
            locked.append(array)
    except RuntimeError as error:
        _page_unlock(locked)
        # CUDA keeps the error for the next call that checks, which would be an unrelated kernel of the model.
        with suppress(RuntimeError):
            torch.zeros(1, device=device)
        logger.warning(
            "Memory for batches cannot be page-locked (%s): copies to %s will be slower. A container may need a higher "
            "limit on memory.", error, device,
        )  # fmt: skip
        return []
    return locked


def _page_unlock(arrays: Sequence[NDArray[Any]]) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for array in arrays:
        # The returned status is ignored: after a device error it only repeats that error.
        runtime.cudaHostUnregister(array.ctypes.data)
