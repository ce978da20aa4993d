"""One shard on disk: h5py validates its structure, its values are read at their byte offsets."""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from theia.errors import StoreError
from theia.store.files import reading, unreadable
from theia.store.schema import Field

# One JSON text holds what a file says about itself: HDF5 is slow with many attributes. The schema can be read alone.
SCHEMA = "schema"
DESCRIPTION = "description"

KEY = "key"
CRC32 = "crc32"

# Datasets whose rows the checksum of a sample covers, in its order.
CHECKED = ("data", "scale", "cls", "label")


@dataclass(frozen=True)
class Dataset:
    """Where an array lies in a file.

    Attributes:
        offset: First byte; 0 for an empty array, which has no place.
        field: Type of a row and its shape.
        rows: Length of the first axis.
    """

    offset: int
    field: Field
    rows: int


@dataclass(frozen=True)
class Shard:
    """The structure of one file.

    Attributes:
        path: The file.
        attributes: What it says about itself: schema, set, spec and so on.
        datasets: By name.
    """

    path: Path
    attributes: Mapping[str, Any]
    datasets: Mapping[str, Dataset]

    @property
    def rows(self) -> int:
        """Samples in the file."""
        return self.datasets[KEY].rows

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows of one dataset.

        Args:
            name: Name of the dataset.
            start: First row.
            stop: Row after the last; all that follow by default.

        Raises:
            StoreError: If the file ends before them or cannot be read.
        """
        dataset = self.datasets[name]
        stop = dataset.rows if stop is None else min(stop, dataset.rows)
        values = np.empty((max(stop - start, 0), *dataset.field.shape), dataset.field.dtype)
        if not values.nbytes:
            return values
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            read = _read_whole(file.fileno(), values, dataset.offset + start * dataset.field.row_bytes)
        if read != values.nbytes:
            raise StoreError(damaged(self.path, "it ends too early"))
        return values

    def keys(self) -> list[str]:
        """Sample ids."""
        return decode(self.read(KEY))

    def row_crc32(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Checksums of the samples as their bytes are now, to be compared with dataset ``crc32``."""
        return row_crc32([self.read(name, start, stop) for name in CHECKED if name in self.datasets])


def read_shard(path: Path) -> Shard:
    """Reads the structure of a file, and validates it as HDF5.

    Raises:
        StoreError: If it is missing, truncated, or not a shard.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            attributes = {SCHEMA: int(file.attrs[SCHEMA]), **json.loads(file.attrs[DESCRIPTION])}
            datasets = {name: locate(h5py.h5d.open(file.id, name.encode())) for name in file}
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} is missing. Run the theia extract that made it again; to drop a teacher instead, delete its "
            "folder and run any theia extract of that split."
        ) from error
    # A damaged structure surfaces in h5py as any of these.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        # What the system refuses has a number; what HDF5 does not understand has none.
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from error
        raise StoreError(damaged(path, str(error))) from error
    if KEY not in datasets:
        raise StoreError(damaged(path, "it is no shard of a feature store"))
    return Shard(path, attributes, datasets)


def damaged(path: Path | str, reason: str) -> str:
    """Message about a file that must be made anew."""
    return f"{path} is damaged ({reason}). Delete it and run the theia extract that made it again."


def row_crc32(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint32]:
    """crc32 of each sample over its bytes in all columns, one after the other."""
    sums = [0] * len(columns[0])
    for column in columns:
        view = as_bytes(np.ascontiguousarray(column))
        size = len(view) // max(len(column), 1)
        sums = [zlib.crc32(view[row * size : (row + 1) * size], total) for row, total in enumerate(sums)]
    return np.array(sums, np.uint32)


def as_bytes(values: NDArray[Any]) -> memoryview:
    """The bytes of a C-contiguous array, not copied."""
    return values.reshape(-1).view(np.uint8).data


def file_sha256(path: Path) -> str:
    """Digest of a whole file.

    Raises:
        UnreadableFileError: If it cannot be read.
    """
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode(texts: Sequence[str]) -> NDArray[np.bytes_]:
    """Texts as fixed-width UTF-8; file names that are not UTF-8 survive."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    # numpy has no strings of width 0.
    return np.array(encoded, f"S{max(map(len, encoded), default=0) or 1}")


def decode(texts: NDArray[np.bytes_]) -> list[str]:
    """Inverse of :func:`encode`, for a one-dimensional array."""
    return [text.decode("utf-8", "surrogateescape") for text in texts.tolist()]


def locate(dataset: h5py.h5d.DatasetID) -> Dataset:
    """Where a dataset lies in its file.

    Raises:
        ValueError: If it is not contiguous.
    """
    rows, *shape = dataset.shape
    offset = dataset.get_offset()
    # h5py's string types carry metadata that numpy's do not.
    field = Field(np.dtype(dataset.dtype.str), tuple(shape))
    if offset is None and rows * field.row_bytes:
        raise ValueError("a dataset is not contiguous")
    return Dataset(offset or 0, field, rows)


def _read_whole(file: int, values: NDArray[Any], offset: int) -> int:
    view = as_bytes(values)
    done = 0
    while done < len(view) and (count := os.preadv(file, (view[done:],), offset + done)):
        done += count
    return done
