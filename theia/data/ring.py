"""The memory that batches pass through: slots that the training process shares with its reading workers."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from theia.data.sampler import Rows
from theia.store.reader import Split, shared_array

# A batch stays valid until so many more were taken: there are the one in use, and the one before it.
HELD = 2
# Key of the labels, beside those of a split's fields.
LABELS = "labels"


class Event(Protocol):
    """What can be waited for, such as a ``torch.cuda.Event``."""

    def synchronize(self) -> None:
        """Returns when it has happened."""


@dataclass
class Slot:
    """Memory of one batch.

    Attributes:
        arrays: By field name, shape ``(largest batch, *field.shape)``.
        copied: End of the last copy from here to a device, if there was one.
    """

    arrays: dict[str, NDArray[Any]]
    copied: Event | None = None


@dataclass(frozen=True)
class RawBatch:
    """A filled slot.

    Attributes:
        slot: Where it was read into.
        rows: Its samples.
        tensors: By field name, cut to the batch; views of the slot, or their copies on a device.
    """

    slot: Slot
    rows: Rows
    tensors: dict[str, torch.Tensor]


class Ring:
    """Slots that are filled in turn.

    What keeps a batch whole: its slot is filled again only after ``HELD`` more batches were taken *and* the copy of it
    to a device has ended. The number of slots sees to the first, :meth:`claim` to the second.

    Args:
        split: What the slots will hold.
        batch_size: Samples of the largest batch.
        ahead: How many batches are read ahead of the one in use.
    """

    def __init__(self, split: Split, batch_size: int, ahead: int) -> None:
        self.slots = [Slot(split.allocate(batch_size)) for _ in range(ahead + HELD)]
        self._labels = split.labels
        if self._labels is not None:
            for slot in self.slots:
                slot.arrays[LABELS] = shared_array((batch_size,), self._labels.dtype)
        self._next = 0  # goes on over epochs: the last batch of one is still held when the next begins

    def claim(self) -> int:
        """Number of the next slot, once it may be filled again."""
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
            rows: Samples that were read into it.
        """
        slot = self.slots[number]
        if self._labels is not None:
            slot.arrays[LABELS][: len(rows)] = self._labels[rows]
        return RawBatch(slot, rows, {name: torch.from_numpy(array[: len(rows)]) for name, array in slot.arrays.items()})
