"""Copies batches to a CUDA device from page-locked memory, while the training step runs."""

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray

from theia.data.ring import HELD, RawBatch, Slot

logger = logging.getLogger(__name__)


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
