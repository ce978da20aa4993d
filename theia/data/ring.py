"""The memory for batches: slots that the training process shares with its reading workers."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from theia.data.sampler import Rows
from theia.store.reader import Split, shared_array

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


@dataclass(frozen=True)
class RawBatch:
    """A batch in a filled slot.

    Attributes:
        slot: Slot that the batch was read into.
        rows: Row numbers of the samples, shape ``(B,)``.
        tensors: Tensors by field name, of shape ``(B, ...)``: views of the slot, or copies on a device.
    """

    slot: Slot
    rows: Rows
    tensors: dict[str, torch.Tensor]


class Ring:
    """Slots that are filled in turn.

    A slot is filled again only after ``HELD`` more batches were taken *and* the copy of its batch to a device is done.
    The number of slots ensures the first, :meth:`claim` the second.

    Args:
        split: Split whose samples the slots will hold.
        batch_size: Number of samples in the largest batch.
        ahead: Number of batches that are read ahead of the one in use.
    """

    def __init__(self, split: Split, batch_size: int, ahead: int) -> None:
        self.slots = [Slot(split.allocate(batch_size)) for _ in range(ahead + HELD)]
        self._labels = split.labels
        if self._labels is not None:
            for slot in self.slots:
                slot.arrays[LABELS] = shared_array((batch_size,), self._labels.dtype)
        self._next = 0  # continues across epochs, as the last batch of one epoch is still valid when the next begins

    def claim(self) -> int:
        """Waits until the next slot may be filled again, and gives its number."""
        number = self._next
        self._next = (number + 1) % len(self.slots)
        slot = self.slots[number]
        if slot.copied is not None:
            slot.copied.synchronize()
            slot.copied = None
        return number

    def batch(self, number: int, rows: Rows) -> RawBatch:
        """The batch in a slot.

        Args:
            number: Number of the slot.
            rows: Row numbers of the samples in the slot.
        """
        slot = self.slots[number]
        if self._labels is not None:
            slot.arrays[LABELS][: len(rows)] = self._labels[rows]
        return RawBatch(slot, rows, {name: torch.from_numpy(array[: len(rows)]) for name, array in slot.arrays.items()})
