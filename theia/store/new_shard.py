"""A shard while it is written: h5py makes its structure, the values go straight to their byte offsets.

Every dataset is contiguous, so that a row is a range of bytes: it is written with ``pwrite``, several times faster than
through h5py; a full disk is a plain OSError, and no HDF5 handle is open while a teacher computes.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from theia.errors import StoreError
from theia.store.files import writing
from theia.store.schema import Field, canonical_json
from theia.store.shard import (
    CHECKED,
    CRC32,
    DESCRIPTION,
    KEY,
    SCHEMA,
    Dataset,
    as_bytes,
    encode,
    file_sha256,
    locate,
    row_crc32,
)
from theia.types import Json
from theia.utils.files import publish, temporary_path

_ALIGNMENT = 4096


class NewShard:
    """A shard that is being written under a temporary name; it gets its own name when it is whole.

    As a context manager: leaving it without :meth:`commit` removes the temporary file.

    Args:
        path: Its final name.
        keys: Sample ids.
        datasets: Types and row shapes of the datasets by name, and their rows.
        attributes: What the file says about itself.

    Raises:
        StoreError: If the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[str],
        datasets: Mapping[str, tuple[int, Field]],
        attributes: Mapping[str, Json],
    ) -> None:
        self.path = path
        self._temporary = temporary_path(path)
        encoded = encode(keys)
        datasets = {**datasets, KEY: (len(keys), Field(encoded.dtype, ()))}
        structure = _Structure()
        self._datasets = structure.describe(datasets, attributes)
        self._file = -1
        try:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            for offset, piece in structure.pieces.items():
                self._write_bytes(memoryview(piece), offset)
            with writing(path):
                os.ftruncate(self._file, structure.size)
            self.write(KEY, encoded)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> "NewShard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, name: str, values: NDArray[Any], start: int = 0) -> None:
        """Writes rows of one dataset.

        Args:
            name: Name of the dataset.
            values: Rows, of the dataset's own type and shape.
            start: First row.

        Raises:
            StoreError: If they do not fit, or the disk is full.
        """
        dataset = self._datasets[name]
        field = dataset.field
        if values.dtype != field.dtype or values.shape[1:] != field.shape or start + len(values) > dataset.rows:
            raise StoreError(
                f"{self.path}: rows {start} to {start + len(values)} of {values.shape[1:]} {values.dtype} do not fit "
                f"into /{name}, {dataset.rows} rows of {field.shape} {field.dtype}."
            )
        self._write_bytes(as_bytes(np.ascontiguousarray(values)), dataset.offset + start * field.row_bytes)

    def write_samples(self, columns: Mapping[str, NDArray[Any]], start: int = 0) -> None:
        """Writes everything about some samples, and their checksums.

        Args:
            columns: Rows by dataset name.
            start: First row.
        """
        for name, values in columns.items():
            self.write(name, values, start)
        self.write(CRC32, row_crc32([columns[name] for name in CHECKED if name in columns]), start)

    def sync(self) -> tuple[int, str]:
        """Brings the file to disk.

        Returns:
            Its size in bytes and its sha256.
        """
        with writing(self.path):
            os.fsync(self._file)
            return self._temporary.stat().st_size, file_sha256(self._temporary)

    def commit(self) -> None:
        """Gives the synced file its final name."""
        with writing(self.path):
            publish(self._temporary, self.path)

    def _write_bytes(self, view: memoryview, offset: int) -> None:
        with writing(self.path):
            while view:
                written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written

    def _discard(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._temporary.unlink(missing_ok=True)


class _Structure(io.RawIOBase):
    """A file in which h5py lays out a shard without its values.

    HDF5 that fails to write cannot close its file any more, and gives the space back only when the process ends: so
    it writes to memory, and what it wrote is brought to disk by us.

    Attributes:
        pieces: What was written, by offset.
        size: Length of the file.
    """

    def __init__(self) -> None:
        self.pieces: dict[int, bytes] = {}
        self.size = 0
        self._position = 0

    def describe(self, datasets: Mapping[str, tuple[int, Field]], attributes: Mapping[str, Json]) -> dict[str, Dataset]:
        """Lays out datasets and attributes."""
        alignment = {"alignment_threshold": 1, "alignment_interval": _ALIGNMENT}
        with h5py.File(self, "w", track_order=False, **alignment) as file:
            described = dict(attributes)
            file.attrs[SCHEMA] = described.pop(SCHEMA)
            file.attrs[DESCRIPTION] = canonical_json(described)
            return {name: _allocate(file, name, rows, field) for name, (rows, field) in datasets.items()}

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (self.size if whence == os.SEEK_END else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, content: Any) -> int:
        # In the order of writing: where pieces overlap, the last one counts.
        self.pieces.pop(self._position, None)
        self.pieces[self._position] = bytes(content)
        self._position += len(content)
        self.size = max(self.size, self._position)
        return len(content)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size


def _allocate(file: h5py.File, name: str, rows: int, field: Field) -> Dataset:
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # The same features make the same bytes, whenever they are written.
    plan.set_obj_track_times(False)
    dtype = field.dtype
    if dtype.kind == "S":
        dtype = h5py.string_dtype("utf-8", dtype.itemsize)
    kind = h5py.h5t.py_create(dtype, logical=True)
    space = h5py.h5s.create_simple((rows, *field.shape))
    return locate(h5py.h5d.create(file.id, name.encode(), kind, space, plan))
