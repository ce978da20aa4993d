"""Opens a store: validates every file once, then reads rows in any order at their byte offsets."""

import hashlib
import mmap
import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theia.errors import ShapeError, StoreError
from theia.store.components import Basis, load_basis
from theia.store.manifest import Manifest, check_splits, read_manifest, with_shards
from theia.store.reads import Files, Read, memory_bytes
from theia.store.schema import IMAGE, MANIFEST, Field, SplitRecord, set_folder, statistics_path
from theia.store.sets import LABEL, SetLayout, missing_shards
from theia.store.shard import KEY, Dataset, Shard, as_bytes, decode
from theia.store.statistics import ChannelStatistics
from theia.types import TeacherSpec

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Column:
    """Where one field of every sample lies.

    Attributes:
        field: Type and shape of one row.
        paths: Path of each shard's file.
        offsets: First byte of the dataset in each file, shape ``(shards,)``.
    """

    field: Field
    paths: list[str]
    offsets: Int64


class Split:
    """A validated split that reads rows in any order.

    It holds paths, offsets and labels, but no HDF5 handle, so that it can be pickled and used after a fork. Several
    threads may read at once.

    Attributes:
        teachers: Specs of the teachers, by name.
        image_hw: Height and width of the images, in pixels.
        fields: Fields of a row: ``"image"``, and per teacher ``NAME``, ``NAME/scale`` (int8 only) and ``NAME/cls``.
        labels: Class indices, int64, shape ``(rows,)``, or ``None``.
        bases: By name, bases of the teachers of which components are stored: whoever reads them restores the channels.
        direct: Whether rows are read past the page cache, from the disk into the buffers. By default, this is so for a
            split larger than the memory: in random order, one of twice its size would find 15 % of its rows in the page
            cache, and pay for that with a copy of each row and with what other programs have there. A split that fits
            is read from the disk once, and from the page cache in all later epochs.
    """

    def __init__(
        self,
        teachers: dict[str, TeacherSpec],
        image_hw: tuple[int, int],
        columns: dict[str, Column],
        keys: Sequence[tuple[str, Dataset]],
        labels: Int64 | None,
        bases: Mapping[str, Basis] = MappingProxyType({}),
    ) -> None:
        """Keeps what ``FeatureStore.open_split`` found.

        Args:
            teachers: Specs of the teachers, by name.
            image_hw: Height and width of the images, in pixels.
            columns: Places of all values, by field name.
            keys: File and dataset with the sample ids of each shard.
            labels: Class indices of all rows, int64, shape ``(rows,)``, or ``None``.
            bases: Bases of the teachers whose components are stored, by name.
        """
        self.bases = dict(bases)
        self.teachers = teachers
        self.image_hw = image_hw
        self.labels = labels
        self.fields = {name: column.field for name, column in columns.items()}
        self._columns = columns
        self._keys = keys
        self._first_rows = np.cumsum([0, *(dataset.rows for _, dataset in keys)], dtype=np.int64)
        self._process = 0
        self._files: Files | None = None
        self.direct = len(self) * sum(field.row_bytes for field in self.fields.values()) > memory_bytes()

    def images_only(self) -> "Split":
        """Gives the same rows without features."""
        return Split({}, self.image_hw, {IMAGE: self._columns[IMAGE]}, self._keys, self.labels)

    def with_cls_of(self, teachers: Collection[str]) -> "Split":
        """Gives the same rows without the CLS tokens of all but some teachers.

        Args:
            teachers: Names of the teachers whose CLS tokens remain, if the store has them.
        """
        unwanted = {f"{name}/cls" for name in self.teachers if name not in teachers}
        columns = {name: column for name, column in self._columns.items() if name not in unwanted}
        return Split(self.teachers, self.image_hw, columns, self._keys, self.labels, self.bases)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __getstate__(self) -> dict[str, Any]:
        # File descriptors and threads are not passed on: they belong to one process.
        return {**self.__dict__, "_process": 0, "_files": None}

    @property
    def folder(self) -> Path:
        """Folder of the split's files."""
        return Path(self._keys[0][0]).parents[1]

    def key(self, row: int) -> str:
        """Sample id of one row.

        Raises:
            StoreError: If there is no such row, or the file is damaged.
        """
        shards, within = self._locate(np.array([row], np.int64))
        path, dataset = self._keys[int(shards[0])]
        size = dataset.field.row_bytes
        text = bytearray(size)
        self._own_files().read(Read(path, memoryview(text), dataset.offset + int(within[0]) * size))
        return text.rstrip(b"\0").decode("utf-8", "surrogateescape")

    def sample_ids(self) -> list[str]:
        """Sample ids of all rows.

        Raises:
            StoreError: If a file cannot be read to its end.
        """
        found: list[str] = []
        for path, dataset in self._keys:
            texts = np.empty(dataset.rows, dataset.field.dtype)
            if len(texts):
                self._own_files().read(Read(path, as_bytes(texts), dataset.offset))
            found += decode(texts)
        return found

    def allocate(self, rows: int) -> dict[str, NDArray[Any]]:
        """Makes buffers for all fields, filled with zeros and shared with processes that are forked later.

        Args:
            rows: Number of samples that they hold.
        """
        return allocate(self.fields, rows)

    def read_into(self, rows: Int64, buffers: Mapping[str, NDArray[Any]], at_once: int = 1) -> None:
        """Reads samples into the first rows of buffers. Only fields that have a buffer are read.

        Args:
            rows: Row numbers, int64, shape ``(n,)``, in any order.
            buffers: Buffers by field name, C-contiguous, of the field's type, shape ``(>= n, *field.shape)``.
            at_once: Number of reads that may wait for the disk at a time; more than 1 takes threads.

        Raises:
            ShapeError: If a buffer does not fit its field.
            StoreError: If a row does not exist, or a file cannot be read to its end.
        """
        shards, within = self._locate(rows)
        numbers = shards.tolist()
        reads = []
        for name, buffer in buffers.items():
            column = self._fitting(name, buffer, len(rows))
            size = column.field.row_bytes
            view = as_bytes(buffer)
            offsets = (column.offsets[shards] + within * size).tolist()
            start = 0
            for shard, offset in zip(numbers, offsets, strict=True):
                reads.append(Read(column.paths[shard], view[start : start + size], offset))
                start += size
        self._own_files().read_all(reads, self.direct, at_once)

    def _locate(self, rows: Int64) -> tuple[Int64, Int64]:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise StoreError(
                f"Rows {rows.min()} to {rows.max()} were asked for; the split has rows 0 to {len(self) - 1}."
            )
        # Searched from the right, because a shard without rows begins where the next one does.
        shards = np.searchsorted(self._first_rows, rows, side="right") - 1
        return shards, rows - self._first_rows[shards]

    def _fitting(self, name: str, buffer: NDArray[Any], rows: int) -> Column:
        column = self._columns.get(name)
        if column is None:
            raise ShapeError(f"No field {name!r} in this split. It has: {', '.join(self._columns)}.")
        field = column.field
        if (
            buffer.dtype != field.dtype
            or buffer.shape[1:] != field.shape
            or len(buffer) < rows
            or not buffer.flags.carray
        ):
            raise ShapeError(
                f"Buffer of {name!r} is {buffer.dtype} {buffer.shape}; needed is writable, C-contiguous {field.dtype} "
                f"of at least {rows} rows of {field.shape}. Make it with Split.allocate()."
            )
        return column

    def _own_files(self) -> Files:
        # A worker was forked with its parent's files, and without its parent's threads.
        if self._files is None or self._process != os.getpid():
            self._files = Files()
            self._process = os.getpid()
        return self._files


def allocate(fields: Mapping[str, Field], rows: int) -> dict[str, NDArray[Any]]:
    """Makes buffers for fields by name, filled with zeros and shared with processes that are forked later.

    Args:
        fields: Type and shape of one row of each field.
        rows: Number of samples that they hold.
    """
    return {name: shared_array((rows, *field.shape), field.dtype) for name, field in fields.items()}


def shared_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Makes an array of zeros in its own memory, shared with processes forked later, that begins on a page.

    The kernel copies from a file to the beginning of a page at nearly twice the rate at which it copies to the place
    where ``np.empty`` puts an array, 16 bytes further on.

    Args:
        shape: Shape of the array.
        dtype: Type of its elements.
    """
    count = int(np.prod(shape, dtype=np.int64))
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize))  # a mapping cannot be empty
    return np.frombuffer(memory, dtype, count).reshape(shape)


class FeatureStore:
    """A feature store on disk.

    Attributes:
        root: Folder of the store.
        manifest: Manifest of the store.
        manifest_sha256: Digest of ``manifest.json``, which identifies the store's content.

    Args:
        root: Folder of the store.

    Raises:
        StoreError: If there is no store, or it has another schema.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.manifest: Manifest = read_manifest(self.root)
        self.manifest_sha256 = hashlib.sha256((self.root / MANIFEST).read_bytes()).hexdigest()

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self.manifest.splits)

    def teachers(self, split: str) -> dict[str, TeacherSpec]:
        """Specs of a split's teachers, by name.

        Raises:
            StoreError: If there is no such split.
        """
        return self._record(split).teachers

    def finished_teachers(self, splits: Iterable[str]) -> list[str]:
        """Names of the teachers that are complete in each of the given splits.

        Raises:
            StoreError: If there is no such split.
        """
        sets = [self._record(split).sets for split in splits]
        return [name for name in sets[0] if name != IMAGE and all(name in one and one[name].complete for one in sets)]

    def statistics(self, teacher: str) -> ChannelStatistics:
        """Mean and standard deviation of a teacher's features over the training split.

        Raises:
            StoreError: If there are no statistics, or their file is damaged.
        """
        path = statistics_path(self.root, teacher)
        if not path.exists():
            raise StoreError(
                f"{self.root} has no statistics of {teacher!r}: they come from the training split. "
                f"Extract it: {self._command('train', teacher)}"
            )
        return ChannelStatistics.load(path)

    def open_split(self, split: str, teachers: str | Sequence[str] | None = None) -> Split:
        """Validates the files of a split and makes it readable.

        Args:
            split: Name of the split.
            teachers: Names of the teachers to read, or a single name; all by default.

        Raises:
            StoreError: If the split or a teacher is missing or unfinished, a file is missing, truncated or unreadable,
                the samples of a teacher are not those of the images, or another split has a different teacher of the
                same name.
        """
        record = self._record(split)
        names = [teachers] if isinstance(teachers, str) else list(record.teachers if teachers is None else teachers)
        for name in names:
            if name not in record.teachers:
                raise StoreError(
                    f"Split {split!r} of {self.root} has no teacher {name!r}. It has: "
                    f"{', '.join(record.teachers) or 'none'}. Add it: {self._command(split, name)}"
                )
        others = {
            other: with_shards(self.root, other, part) for other, part in self.manifest.splits.items() if other != split
        }
        check_splits(self.root, split, record.images, [record.teachers[name] for name in names], others)
        layouts = {name: self._complete(split, record, name) for name in (IMAGE, *names)}
        shards: dict[str, list[Shard]] = {name: [] for name in layouts}
        for index in range(record.images.shard_count):
            for name, layout in layouts.items():
                shard = layout.open(index, layout.record.shards[index])
                if name != IMAGE:
                    _check_keys(shards[IMAGE][index], shard)
                shards[name].append(shard)
        columns = {}
        for name, layout in layouts.items():
            for dataset, field in layout.row_fields().items():
                offsets = np.array([shard.datasets[dataset].offset for shard in shards[name]], np.int64)
                paths = [str(shard.path) for shard in shards[name]]
                columns[name if dataset == "data" else f"{name}/{dataset}"] = Column(field, paths, offsets)
        labelled = [shard for shard in shards[IMAGE] if LABEL in shard.datasets]
        if labelled and len(labelled) < len(shards[IMAGE]):
            raise StoreError(
                f"Only {len(labelled)} of {len(shards[IMAGE])} image shards of {self.root / split} have labels. Delete "
                "that folder and extract the split anew."
            )
        labels = np.concatenate([shard.read(LABEL) for shard in labelled]) if labelled else None
        keys = [(str(shard.path), shard.datasets[KEY]) for shard in shards[IMAGE]]
        size = record.images.size
        bases = {
            name: load_basis(self.root, name, basis) for name in names if (basis := record.sets[name].basis) is not None
        }
        return Split({name: record.teachers[name] for name in names}, (size, size), columns, keys, labels, bases)

    def _record(self, split: str) -> SplitRecord:
        if split not in self.manifest.splits:
            raise StoreError(
                f"{self.root} has no split {split!r}. It has: {', '.join(self.splits) or 'none'}. "
                f"Add it: {self._command(split, 'NAMES')}"
            )
        return self.manifest.splits[split]

    def _complete(self, split: str, record: SplitRecord, name: str) -> SetLayout:
        layout = SetLayout(self.root, split, name, record.images, record.sets[name])
        if not layout.record.complete:
            total = record.images.shard_count
            drop = ""
            if name != IMAGE:
                folder = set_folder(self.root, split, name)
                drop = f", or drop this teacher: delete {folder} and run any theia extract of that split"
            raise StoreError(
                f"Extraction of {name!r} / {split!r} in {self.root} is unfinished: "
                f"{total - len(missing_shards(layout))} of {total} shards. Run the same theia extract again{drop}."
            )
        return layout

    def _command(self, split: str, teachers: str) -> str:
        lacks = ["--split", split, "--teachers", teachers, "--store", str(self.root)]
        return shlex.join(["theia", "extract", "--images", "DIR", *lacks])


def _check_keys(images: Shard, features: Shard) -> None:
    wanted, given = images.read(KEY), features.read(KEY)
    if np.array_equal(wanted, given):
        return
    rows = min(len(wanted), len(given))
    differing = np.flatnonzero(wanted[:rows] != given[:rows])
    row = int(differing[0]) if len(differing) else rows
    pair = [decode(keys[row : row + 1]) or ["nothing"] for keys in (wanted, given)]
    raise StoreError(
        f"Samples differ at row {row}: {pair[0][0]!r} in {images.path}, {pair[1][0]!r} in {features.path}. "
        f"Delete {features.path} and run the theia extract that made it again."
    )
