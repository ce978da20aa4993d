"""h5py and torch's ``DataLoader``: one file, one sample a chunk, default collation, two workers.

One sample a chunk is the layout that random access reads least for.
"""

from pathlib import Path

import h5py
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.throughput.data import ROW, Samples

WORKERS = 2

Sample = dict[str, Tensor | int]


def write(folder: Path, samples: Samples) -> None:
    """Writes all columns to one file."""
    folder.mkdir()
    with h5py.File(folder / "samples.h5", "w") as file:
        for name, column in samples.columns.items():
            file.create_dataset(name, data=column, chunks=(1, *column.shape[1:]))


def loader(folder: Path, batch_size: int) -> "DataLoader[Sample]":
    """Shuffled batches of what :func:`write` wrote."""
    return DataLoader(
        _Rows(folder / "samples.h5"),
        batch_size,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )


class _Rows(Dataset[Sample]):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: dict[str, h5py.Dataset] = {}
        with h5py.File(path) as file:
            self._length = min(len(column) for column in file.values())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Sample:
        if not self._columns:
            # HDF5 handles do not survive a fork; every worker opens its own.
            self._columns = dict(h5py.File(self._path).items())
        return {ROW: row} | {name: torch.from_numpy(column[row]) for name, column in self._columns.items()}
