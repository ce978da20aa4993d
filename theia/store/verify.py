"""Describes a store by its manifest and its files' sizes, and checks that every byte in it is as it was written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from theia.errors import StoreError
from theia.store.components import basis_path, load_basis
from theia.store.disk import file_size
from theia.store.manifest import read_manifest
from theia.store.schema import IMAGE, TRAIN, FeatureDtype, ImageSet, ShardRecord, set_folder, statistics_path
from theia.store.sets import SetLayout, missing_shards, shard_records, split_layouts, teacher_statistics
from theia.store.shard import CRC32, KEY, Shard, file_sha256, read_shard
from theia.store.statistics import ChannelStatistics
from theia.types import TeacherSpec

_ROWS_AT_ONCE = 64
_SHOWN = 8
_AGAIN = "Run its theia extract again."
_DELETE = "Delete it and run its theia extract again."


@dataclass(frozen=True)
class Checked:
    """Sign of progress: a file has been checked, whether or not it is whole.

    Attributes:
        path: Path of the file.
        bytes: Size of the file in the manifest.
    """

    path: Path
    bytes: int


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a store.

    Attributes:
        path: Path of the file or folder.
        text: Description of the problem, and the next step.
    """

    path: Path
    text: str


def verify(root: Path | str) -> Iterator[Problem | Checked]:
    """Reads every byte of a store and compares it with its checksums.

    Args:
        root: Folder of the store.

    Yields:
        A ``Checked`` for every shard, after the shard's problems; also the problems of sets and statistics.

    Raises:
        StoreError: If there is no store.
    """
    for split, record in read_manifest(Path(root)).splits.items():
        layouts = split_layouts(Path(root), split, record)
        for layout in layouts:
            found = False
            if layout.record.basis is not None:
                try:
                    load_basis(layout.root, layout.name, layout.record.basis)
                except StoreError as error:
                    path = basis_path(layout.root, layout.name, layout.record.basis)
                    yield Problem(path, str(error).removeprefix(f"{path} "))
            for event in _verify_set(layout, layouts[0]):
                found = found or isinstance(event, Problem)
                yield event
            if not found and split == TRAIN and layout.record.spec is not None:
                yield from _verify_statistics(layout, layout.record.spec)


def _verify_set(layout: SetLayout, images: SetLayout) -> Iterator[Problem | Checked]:
    folder = set_folder(layout.root, layout.split, layout.name)
    try:
        records = shard_records(layout)
        missing = len(missing_shards(layout))
    except StoreError as error:
        yield Problem(folder, str(error))
        return
    if not layout.record.complete:
        total = layout.images.shard_count
        yield Problem(folder, f"is unfinished: {total - missing} of {total} shards. {_AGAIN}")
    for record in records:
        path = layout.path(record.index)
        try:
            reason = _fault(layout, images, record)
        except StoreError as error:
            yield Problem(path, str(error).removeprefix(f"{path} "))
        else:
            if reason:
                yield Problem(path, f"{reason}. {_DELETE}")
        yield Checked(path, record.bytes)


def _fault(layout: SetLayout, images: SetLayout, record: ShardRecord) -> str | None:
    path = layout.path(record.index)
    if reason := _wrong_size(path, record):
        return reason
    shard = read_shard(path)
    intact = file_sha256(path) == record.sha256
    layout.check(shard, record.index)
    if not intact:
        return _damage(shard)
    if layout.name != IMAGE and file_size(images.path(record.index)) is not None:
        wanted = read_shard(images.path(record.index))
        if not np.array_equal(wanted.read(KEY), shard.read(KEY)):
            return f"has other samples than {wanted.path}"
    return None


def _wrong_size(path: Path, record: ShardRecord) -> str | None:
    size = file_size(path)
    if size is None or size == record.bytes:
        return None
    return f"has {size} bytes, the manifest says {record.bytes}"


def _damage(shard: Shard) -> str:
    stored = shard.read(CRC32)
    rows: list[int] = []
    for start in range(0, shard.rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, shard.rows)
        rows += (start + np.flatnonzero(shard.row_crc32(start, stop) != stored[start:stop])).tolist()
    if not rows:
        return "has changed bytes (in its structure, ids or sums; the samples are whole)"
    keys = shard.keys()
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"has damaged samples: {', '.join(f'{keys[row]!r} (row {row})' for row in rows[:_SHOWN])}{more}"


def _verify_statistics(layout: SetLayout, spec: TeacherSpec) -> Iterator[Problem]:
    path = statistics_path(layout.root, layout.name)
    try:
        paths = (layout.path(index) for index in range(layout.images.shard_count))
        stored, computed = ChannelStatistics.load(path), teacher_statistics(layout, spec, map(read_shard, paths))
    except StoreError as error:
        yield Problem(path, str(error).removeprefix(f"{path} "))
        return
    if not all(
        np.array_equal(getattr(stored, part.name), getattr(computed, part.name)) for part in fields(ChannelStatistics)
    ):
        yield Problem(path, f"differs from the sums in the shards. {_DELETE}")


@dataclass(frozen=True)
class SetSummary:
    """Summary of one set of a split: one teacher's features, or the images.

    Attributes:
        name: ``"image"`` or the name of the teacher.
        spec: Spec of the teacher, or ``None`` for images.
        dtype: Stored type of the patch tokens, or ``None`` for images.
        components: Number of components that are stored of each token; ``None`` for all channels.
        rows: Number of samples that are there.
        shards: Number of files that are there.
        bytes: Size of these files in bytes, as it was recorded when they were written.
        complete: Whether the set was finished.
        problems: Files that are missing or have another size now. Nothing is read for that: :func:`verify` finds more.
    """

    name: str
    spec: TeacherSpec | None
    dtype: FeatureDtype | None
    components: int | None
    rows: int
    shards: int
    bytes: int
    complete: bool
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class SplitSummary:
    """Summary of one split of a store.

    Attributes:
        name: Name of the split.
        images: Image set of the split.
        skipped: Number of listed images that could not be read; ``None`` while the images are unfinished.
        sets: Summaries of the sets: images first, then the teachers.
    """

    name: str
    images: ImageSet
    skipped: int | None
    sets: tuple[SetSummary, ...]


def describe(root: Path | str) -> list[SplitSummary]:
    """Summarises the content of a store from its manifest and the sizes of its files.

    Raises:
        StoreError: If there is no store.
    """
    summaries = []
    for name, record in read_manifest(Path(root)).splits.items():
        sets = tuple(_summary(layout) for layout in split_layouts(Path(root), name, record))
        images = next(part for part in sets if part.name == IMAGE)
        skipped = record.images.listed - images.rows if images.complete else None
        summaries.append(SplitSummary(name, record.images, skipped, sets))
    return summaries


def _summary(layout: SetLayout) -> SetSummary:
    record = layout.record
    shards = shard_records(layout)
    return SetSummary(
        name=layout.name,
        spec=record.spec,
        dtype=record.dtype,
        components=None if record.basis is None else record.basis.components,
        rows=sum(shard.rows for shard in shards),
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        complete=record.complete,
        problems=tuple(_problems_of_size(layout, shards)),
    )


def _problems_of_size(layout: SetLayout, records: Sequence[ShardRecord]) -> Iterator[Problem]:
    basis = layout.record.basis
    if basis is not None and file_size(place := basis_path(layout.root, layout.name, basis)) is None:
        yield Problem(place, "is missing. Without it the features cannot be restored.")
    for record in records:
        path = layout.path(record.index)
        if file_size(path) is None:
            yield Problem(path, f"is missing. {_AGAIN}")
        elif reason := _wrong_size(path, record):
            yield Problem(path, f"{reason}. {_DELETE}")
