"""One shard on disk. h5py lays out and validates its structure; values are read and written at their byte offsets."""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from theia.errors import StoreError
from theia.store.disk import reading, unreadable, writing
from theia.store.schema import Field, canonical_json
from theia.types import Json
from theia.utils import files
from theia.utils.files import publish, temporary_path

# A single JSON text holds all attributes of a file, since HDF5 is slow with many. The schema can be read alone.
SCHEMA = "schema"
DESCRIPTION = "description"

KEY = "key"
CRC32 = "crc32"

# Datasets whose rows the checksum of a sample covers, in the order in which it covers them.
CHECKED = ("data", "scale", "cls", "label")

_ALIGNMENT = 4096  # bytes
_READ_BYTES = 1 << 20
_FLUSHED_BYTES = 1 << 26  # are sent to the disk at a time


@dataclass(frozen=True)
class Dataset:
    """Where an array lies in a file.

    Attributes:
        offset: First byte of the array; 0 for an empty array, which has no place.
        field: Type and shape of one row.
        rows: Length of the first axis.
    """

    offset: int
    field: Field
    rows: int


@dataclass(frozen=True)
class Shard:
    """The structure of one file.

    Attributes:
        path: Path of the file.
        attributes: Attributes of the file: schema, set, spec and so on.
        datasets: Places of the datasets, by name.
    """

    path: Path
    attributes: Mapping[str, Any]
    datasets: Mapping[str, Dataset]

    @property
    def rows(self) -> int:
        """Number of samples in the file."""
        return self.datasets[KEY].rows

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Reads rows of one dataset.

        Args:
            name: Name of the dataset.
            start: First row.
            stop: Row after the last one; by default, all rows from ``start`` on are read.

        Raises:
            StoreError: If the file ends before these rows or cannot be read.
        """
        dataset = self.datasets[name]
        stop = dataset.rows if stop is None else min(stop, dataset.rows)
        values = np.empty((max(stop - start, 0), *dataset.field.shape), dataset.field.dtype)
        if not values.nbytes:
            return values
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            offset = dataset.offset + start * dataset.field.row_bytes
            read_whole(file.fileno(), as_bytes(values), offset, self.path)
        return values

    def keys(self) -> list[str]:
        """Reads the sample ids."""
        return decode(self.read(KEY))

    def row_crc32(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Checksums of the samples' present bytes, to be compared with dataset ``crc32``."""
        return row_crc32([self.read(name, start, stop) for name in CHECKED if name in self.datasets])


def read_shard(path: Path) -> Shard:
    """Reads the structure of a file, and validates it as HDF5.

    Raises:
        StoreError: If the file is missing, truncated, or not a shard.
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
    # h5py reports a damaged structure as any of these errors.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        # An error of the system has a number; an error of HDF5 about the content has none.
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from error
        raise StoreError(damaged(path, str(error))) from error
    if KEY not in datasets:
        raise StoreError(damaged(path, "it is no shard of a feature store"))
    return Shard(path, attributes, datasets)


def damaged(path: Path | str, reason: str) -> str:
    """Message about a damaged file that must be made anew."""
    return f"{path} is damaged ({reason}). Delete it and run the theia extract that made it again."


def row_crc32(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint32]:
    """Crc32 of each sample over its bytes in all columns, one column after the other."""
    sums = [0] * len(columns[0])
    for column in columns:
        view = as_bytes(np.ascontiguousarray(column))
        size = len(view) // max(len(column), 1)
        sums = [zlib.crc32(view[row * size : (row + 1) * size], total) for row, total in enumerate(sums)]
    return np.array(sums, np.uint32)


def as_bytes(values: NDArray[Any]) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return values.reshape(-1).view(np.uint8).data


def file_sha256(path: Path) -> str:
    """Sha256 digest of a whole file.

    Raises:
        UnreadableFileError: If the file cannot be read.
    """
    with reading(path):
        return files.file_sha256(path)


def encode(texts: Sequence[str]) -> NDArray[np.bytes_]:
    """Encodes texts as fixed-width UTF-8. File names that are not UTF-8 survive."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    # numpy has no strings of width 0.
    return np.array(encoded, f"S{max(map(len, encoded), default=0) or 1}")


def decode(texts: NDArray[np.bytes_]) -> list[str]:
    """Inverse of :func:`encode`, for a one-dimensional array."""
    return [text.decode("utf-8", "surrogateescape") for text in texts.tolist()]


def locate(dataset: h5py.h5d.DatasetID) -> Dataset:
    """Finds where a dataset lies in its file.

    Raises:
        ValueError: If the dataset is not contiguous.
    """
    rows, *shape = dataset.shape
    offset = dataset.get_offset()
    # h5py's string types carry metadata that numpy's do not.
    field = Field(np.dtype(dataset.dtype.str), tuple(shape))
    if offset is None and rows * field.row_bytes:
        raise ValueError("a dataset is not contiguous")
    return Dataset(offset or 0, field, rows)


def read_whole(file: int, target: memoryview, offset: int, path: Path | str) -> None:
    """Reads until a buffer is full.

    Args:
        file: Descriptor of the open file.
        target: Buffer to fill.
        offset: First byte to read.
        path: Path of the file, for the message.

    Raises:
        StoreError: If the file ends before the buffer is full.
        OSError: If the system refuses to read.
    """
    done = os.preadv(file, (target,), offset)
    # Network file systems may give less than was asked for.
    while done < len(target):
        more = os.preadv(file, (target[done:],), offset + done)
        if not more:
            raise StoreError(damaged(path, "it ends too early"))
        done += more


class NewShard:
    """A shard that is being written under a temporary name, and gets its final name when it is whole.

    If it is left as a context manager without :meth:`commit`, the temporary file is removed.

    HDF5 is used by one thread at a time, whatever it does. Here it only lays out the file: checksums and system calls
    run outside of Python's lock as well, so that helpers do them side by side. The digest of the file goes on in a
    thread of its own while the rows come in, in their order, and so nothing of them has to be read back. Another thread
    sends them to the disk meanwhile, so that little is left to sync at the end.

    Args:
        path: Final path of the shard.
        keys: Sample ids of the shard.
        datasets: Number of rows and field of each dataset, by name; ``data`` comes first.
        attributes: Attributes of the file.
        helpers: Threads that compute checksums and write; by default the calling thread does all of it.

    Raises:
        StoreError: If the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[str],
        datasets: Mapping[str, tuple[int, Field]],
        attributes: Mapping[str, Json],
        helpers: Executor | None = None,
    ) -> None:
        self.path = path
        self._helpers = helpers
        self._hasher = None if helpers is None else ThreadPoolExecutor(1, "handover-digest")
        self._flusher = ThreadPoolExecutor(1, "handover-flush")
        self._flush: Future[None] | None = None
        self._flushed = 0  # bytes of the file
        self._jobs: list[Future[None]] = []
        self._digest = hashlib.sha256()
        self._digested = 0  # bytes of the file
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
            self._digest_to(self._datasets["data"].offset)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> "NewShard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait(self._jobs)
        self._discard()

    def write(self, name: str, values: NDArray[Any], start: int = 0) -> None:
        """Writes rows of one dataset.

        Args:
            name: Name of the dataset.
            values: Rows to write, of the dataset's own type and shape.
            start: First row.

        Raises:
            StoreError: If the rows do not fit, or the disk is full.
        """
        self._check(name, values, start)
        dataset = self._datasets[name]
        self._write_bytes(as_bytes(np.ascontiguousarray(values)), dataset.offset + start * dataset.field.row_bytes)

    def _check(self, name: str, values: NDArray[Any], start: int) -> None:
        dataset = self._datasets[name]
        field = dataset.field
        if values.dtype != field.dtype or values.shape[1:] != field.shape or start + len(values) > dataset.rows:
            raise StoreError(
                f"{self.path}: rows {start} to {start + len(values)} of {values.shape[1:]} {values.dtype} do not fit "
                f"into /{name}, {dataset.rows} rows of {field.shape} {field.dtype}."
            )

    def write_samples(self, columns: Mapping[str, NDArray[Any]], start: int = 0) -> None:
        """Writes all columns of some samples, and the samples' checksums.

        With helpers it returns before they have done so; the values must not change until :meth:`settle`.

        Args:
            columns: Rows by dataset name.
            start: First row.

        Raises:
            StoreError: If the rows do not fit, or the disk is full. With helpers, the latter is raised later.
        """
        rows = {name: np.ascontiguousarray(values) for name, values in columns.items()}
        for name, values in rows.items():
            self._check(name, values, start)
        data = self._datasets["data"]
        follows = data.offset + start * data.field.row_bytes == self._digested
        if follows:
            self._digested += rows["data"].nbytes
        if self._helpers is None or self._hasher is None:
            self._write_rows(rows, start)
            if follows:
                self._digest.update(as_bytes(rows["data"]))
            return
        self._jobs.append(self._helpers.submit(self._write_rows, rows, start))
        if follows:
            self._jobs.append(self._hasher.submit(self._digest.update, as_bytes(rows["data"])))

    def settle(self) -> None:
        """Waits until the helpers have written all that was given to them.

        Raises:
            StoreError: If the disk is full.
        """
        wait(self._jobs)
        done, self._jobs = self._jobs, []
        for job in done:
            job.result()
        idle = self._flush is None or self._flush.done()
        if self._helpers is not None and idle and self._digested - self._flushed >= _FLUSHED_BYTES:
            self._finish_flush()
            self._flushed = self._digested
            self._flush = self._flusher.submit(os.fdatasync, self._file)

    def sync(self) -> tuple[int, str]:
        """Waits until the file is on the disk.

        Returns:
            Size of the file in bytes, and its sha256.
        """
        self.settle()
        self._finish_flush()
        with writing(self.path):
            os.fsync(self._file)
            size = os.fstat(self._file).st_size
        self._digest_to(size)
        return size, self._digest.hexdigest()

    def commit(self) -> None:
        """Gives the synced file its final name."""
        with writing(self.path):
            publish(self._temporary, self.path)

    def _write_rows(self, rows: Mapping[str, NDArray[Any]], start: int) -> None:
        for name, values in rows.items():
            self.write(name, values, start)
        self.write(CRC32, row_crc32([rows[name] for name in CHECKED if name in rows]), start)

    def _digest_to(self, stop: int) -> None:
        """Reads back what the digest has not seen yet: all but the rows of ``data``."""
        block = bytearray(min(_READ_BYTES, max(stop - self._digested, 0)))
        while self._digested < stop:
            view = memoryview(block)[: stop - self._digested]
            with writing(self.path):
                read_whole(self._file, view, self._digested, self.path)
            self._digest.update(view)
            self._digested += len(view)

    def _write_bytes(self, view: memoryview, offset: int) -> None:
        with writing(self.path):
            while view:
                written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written

    def _finish_flush(self) -> None:
        # The system reports an error of the disk once: to this call, and then not to the last sync.
        flush, self._flush = self._flush, None
        if flush is not None:
            with writing(self.path):
                flush.result()

    def _discard(self) -> None:
        self._flusher.shutdown()
        if self._hasher is not None:
            self._hasher.shutdown()
        if self._file >= 0:
            os.close(self._file)
        self._temporary.unlink(missing_ok=True)


class _Structure(io.RawIOBase):
    """A file in which h5py lays out a shard without its values.

    If HDF5 fails to write, it can no longer close its file, and gives the space back only when the process ends. So
    HDF5 writes to memory, and this module writes the pieces to disk.

    Attributes:
        pieces: Written bytes, by offset.
        size: Length of the file in bytes.
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
        # In the order in which they were written: where pieces overlap, the last one counts.
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
    # Without times in the file, the same features give the same bytes, whenever they are written.
    plan.set_obj_track_times(False)
    dtype = field.dtype
    if dtype.kind == "S":
        dtype = h5py.string_dtype("utf-8", dtype.itemsize)
    kind = h5py.h5t.py_create(dtype, logical=True)
    space = h5py.h5s.create_simple((rows, *field.shape))
    return locate(h5py.h5d.create(file.id, name.encode(), kind, space, plan))
