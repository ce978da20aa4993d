"""Batches on their way to a CUDA device: page-locked memory, and copies that run beside the training step."""

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
    """Copies batches to a CUDA device, one ahead of the one in use, on a stream of its own.

    A copy waits, on the device, for the work queued before it, so it overwrites no batch that is still computed with;
    it runs while the next step computes. That step's work waits for the copy of its own batch, begun a step before. The
    host waits for neither.

    Args:
        slots: Slots of the host's ring. Their memory is page-locked here, so that the device can fetch it by itself.
            Worker processes must have been forked before, while no driver knew of this memory.
        device: A CUDA device.
    """

    def __init__(self, slots: Sequence[Slot], device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        locked = _page_lock([array for slot in slots for array in slot.arrays.values()], device)
        self._unlock = weakref.finalize(self, _page_unlock, locked)  # it also keeps the memory until then
        whole = {name: torch.from_numpy(array) for name, array in slots[0].arrays.items()}
        # HELD that may be in use, and the one that is being copied.
        self._targets = [
            {name: torch.empty_like(tensor, device=device) for name, tensor in whole.items()} for _ in range(HELD + 1)
        ]
        self._next = 0

    def ahead(self, batches: Iterable[RawBatch]) -> Iterator[RawBatch]:
        """The same batches on the device. Each stays valid until ``HELD`` more were taken.

        Args:
            batches: In slots of the host's ring.
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
        """Gives the memory back."""
        # An iteration cut short leaves a copy that nobody waited for. A device that failed has said so already.
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
        batch.slot.copied = copied  # the host's ring refills the slot after it
        return replace(batch, tensors={name: target[name][: len(batch.rows)] for name in batch.tensors}), copied

    def _ready(self, batch: RawBatch, copied: torch.cuda.Event) -> RawBatch:
        torch.cuda.current_stream(self._device).wait_event(copied)
        return batch


def _page_lock(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[NDArray[Any]]:
    """Page-locks all arrays or, where the system refuses one, none."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    locked: list[NDArray[Any]] = []
    try:
        for array in arrays:
            with torch.cuda.device(device):
                torch.cuda.check_error(runtime.cudaHostRegister(array.ctypes.data, array.nbytes, 0))
            locked.append(array)
    except RuntimeError as error:
        _page_unlock(locked)
        # CUDA keeps the error for whoever asks next, which would be an innocent kernel of the model.
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
        # Its status is not asked: after a device error it can only repeat that error.
        runtime.cudaHostUnregister(array.ctypes.data)
