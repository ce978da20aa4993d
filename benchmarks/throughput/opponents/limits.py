"""What no loader can beat: the kernel's copies of the same bytes, with next to no Python around them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.throughput.data import ROW, Batch, Samples

# As many batches in turn as the loader has slots with one worker, so that caches help all contenders alike.
RING = 4

Rows = NDArray[np.int64]
Buffers = dict[str, NDArray[Any]]


class Preadv:
    """Raw ``os.preadv`` of rows at their offsets in the files of a store. All files stay open.

    Args:
        store: Folder of the store.
        samples: Samples that the store holds.
        ring: Buffers of one batch each, by column.
    """

    def __init__(self, store: Path, samples: Samples, ring: Sequence[Buffers]) -> None:
        self._ring = ring
        self._places: dict[str, list[tuple[int, int]]] = {}
        self._descriptors: list[int] = []
        for name in samples.columns:
            self._places[name] = []
            for path in sorted((store / "train" / name).glob("*.h5")):
                with h5py.File(path) as file:
                    rows, first = len(file["data"]), file["data"].id.get_offset()
                descriptor = os.open(path, os.O_RDONLY)
                self._descriptors.append(descriptor)
                size = samples.columns[name][0].nbytes
                self._places[name] += [(descriptor, first + row * size) for row in range(rows)]
        # Where each row of a batch goes, cut beforehand.
        self._targets = [
            {name: [memoryview(row).cast("B") for row in buffer] for name, buffer in buffers.items()}
            for buffers in ring
        ]

    def epoch(self, batches: Sequence[Rows]) -> Iterator[Batch]:
        """Reads samples in a given order."""
        for number, rows in enumerate(batches):
            slot = number % len(self._ring)
            order = rows.tolist()
            for name, places in self._places.items():
                for row, target in zip(order, self._targets[slot][name], strict=True):
                    descriptor, offset = places[row]
                    os.preadv(descriptor, (target,), offset)
            yield as_batch(rows, self._ring[slot])

    def close(self) -> None:
        """Closes the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def copies(samples: Samples, ring: Sequence[Buffers], batches: Sequence[Rows]) -> Iterator[Batch]:
    """Copies rows of arrays in memory in a given order.

    Args:
        samples: Samples to copy.
        ring: Buffers of one batch each, by column.
        batches: Rows of each batch.
    """
    for number, rows in enumerate(batches):
        buffers = ring[number % len(ring)]
        for name, column in samples.columns.items():
            target = buffers[name]
            for position, row in enumerate(rows.tolist()):
                np.copyto(target[position], column[row])
        yield as_batch(rows, buffers)


def as_batch(rows: Rows, buffers: Buffers) -> Batch:
    """The batch that a training process would get."""
    return {ROW: torch.from_numpy(rows)} | {name: torch.from_numpy(buffer) for name, buffer in buffers.items()}
