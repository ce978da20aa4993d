"""The files of one set: their required content, the check that they are whole, and the statistics over all of them."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from theia.errors import StoreError
from theia.store.disk import UnreadableFileError, file_size, reading
from theia.store.schema import (
    IMAGE,
    SCHEMA_VERSION,
    TRAIN,
    Field,
    ImageSet,
    SetRecord,
    ShardRecord,
    SplitRecord,
    canonical_json,
    feature_fields,
    image_fields,
    preprocessing_hash,
    set_folder,
    statistics_path,
    to_plain,
)
from theia.store.shard import CRC32, KEY, SCHEMA, Shard, damaged, decode, encode, file_sha256, read_shard
from theia.store.statistics import ChannelStatistics, Moments
from theia.types import Json, TeacherSpec

logger = logging.getLogger(__name__)

LABEL = "label"
SKIPPED = "skipped"

# Datasets with the sums of the stored values per channel, over patch tokens and over CLS tokens.
PATCH_SUMS = ("sum", "sumsq")
CLS_SUMS = ("cls_sum", "cls_sumsq")

_SHOWN = 8  # number of missing shards in a message


@dataclass(frozen=True)
class SetLayout:
    """The files of one set of one split.

    Attributes:
        root: Folder of the store.
        split: Name of the split.
        name: ``"image"`` or the name of a teacher.
        images: Image set of the split.
        record: Record of the set in the manifest.
    """

    root: Path
    split: str
    name: str
    images: ImageSet
    record: SetRecord

    def path(self, index: int) -> Path:
        """Path of one shard."""
        return set_folder(self.root, self.split, self.name) / f"shard-{index:06d}.h5"

    def sidecar(self, index: int) -> Path:
        """Path of the file that keeps the record of a shard until the manifest has it."""
        return self.path(index).with_suffix(".json")

    def row_fields(self, labels: bool = False) -> dict[str, Field]:
        """Fields of a row, by dataset name, in the order in which the checksum covers them.

        Args:
            labels: Whether images have labels.
        """
        if self.record.spec is None:
            return image_fields(self.images.size, labels)
        components = self.record.basis.components if self.record.basis else None
        return feature_fields(self.record.spec, self.record.dtype or "float16", components)

    def sum_names(self) -> tuple[str, ...]:
        """Names of the datasets that hold sums over the shard."""
        if self.record.spec is None:
            return ()
        return (*PATCH_SUMS, *CLS_SUMS) if self.record.spec.has_cls else PATCH_SUMS

    def datasets(self, rows: int, labels: bool = False) -> dict[str, tuple[int, Field]]:
        """Length and field of each dataset that does not depend on the ids, by name."""
        found = {name: (rows, field) for name, field in self.row_fields(labels).items()}
        found[CRC32] = (rows, Field(np.dtype("<u4"), ()))
        if self.record.spec is not None:
            channels = (self.record.spec.channels, Field(np.dtype("<f8"), ()))
            found |= dict.fromkeys(self.sum_names(), channels)
        return found

    def attributes(self, index: int, rows: int) -> dict[str, Json]:
        """Attributes of one file: everything that it says about itself."""
        return {**self._attributes, "shard": index, "rows": rows}

    @cached_property
    def _attributes(self) -> dict[str, Json]:
        common: dict[str, Json] = {
            SCHEMA: SCHEMA_VERSION,
            "split": self.split,
            "set": self.name,
            "image_set_sha256": hashlib.sha256(canonical_json(to_plain(self.images)).encode()).hexdigest(),
        }
        spec = self.record.spec
        if spec is None:
            return {**common, "dtype": "uint8", "resize": self.images.resize}
        return {
            **common,
            "dtype": self.record.dtype or "float16",
            "spec": to_plain(spec),
            "preprocessing_sha256": preprocessing_hash(spec),
            **({} if self.record.basis is None else {"basis": to_plain(self.record.basis)}),
        }

    def open(self, index: int, record: ShardRecord | None) -> Shard:
        """Opens a shard, and checks that it is the one that was written.

        Args:
            index: Number of the shard.
            record: Record of the shard; ``None`` if there is none, because something other than the writer put the file
                there.

        Raises:
            StoreError: If the file is missing, damaged, or disagrees with its record or with the manifest.
        """
        path = self.path(index)
        size = file_size(path)
        if record is not None and size is not None and size != record.bytes:
            raise StoreError(damaged(path, f"it has {size} bytes, its record says {record.bytes}"))
        shard = read_shard(path)
        self.check(shard, index)
        if record is not None and shard.rows != record.rows:
            raise StoreError(damaged(path, f"it has {shard.rows} samples, its record says {record.rows}"))
        return shard

    def check(self, shard: Shard, index: int) -> None:
        """Checks that a file agrees with the manifest.

        Raises:
            StoreError: If an attribute, or the type or shape of a dataset, differs.
        """
        for name, value in self.attributes(index, shard.rows).items():
            if shard.attributes.get(name) != value:
                raise StoreError(
                    damaged(shard.path, f"its {name} is {shard.attributes.get(name)!r}, the manifest says {value!r}")
                )
        for name, (rows, field) in self.datasets(shard.rows, LABEL in shard.datasets).items():
            dataset = shard.datasets.get(name)
            if dataset is None or dataset.rows != rows or dataset.field != field:
                old = "; the int8 of an earlier version had one step per token" if name == "scale" else ""
                raise StoreError(damaged(shard.path, f"/{name} is missing or has another shape{old}"))
        unread = self.images.listed_in(index) - shard.rows
        if self.name == IMAGE and (SKIPPED not in shard.datasets or shard.datasets[SKIPPED].rows != unread):
            raise StoreError(damaged(shard.path, f"/{SKIPPED} does not name {unread} images"))

    def recorded(self, index: int) -> ShardRecord | None:
        """Record of a shard, from its sidecar if there is one, since that is newer, or else from the manifest."""
        try:
            with reading(self.sidecar(index)):
                try:
                    return ShardRecord(**json.loads(self.sidecar(index).read_bytes()))
                except FileNotFoundError:
                    return self.record.shards[index] if index < len(self.record.shards) else None
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self.sidecar(index)} is damaged ({error}). Delete it.") from error


def split_layouts(root: Path, split: str, record: SplitRecord) -> list[SetLayout]:
    """Layouts of the sets of a split, images first."""
    names = sorted(record.sets, key=lambda name: name != IMAGE)
    return [SetLayout(root, split, name, record.images, record.sets[name]) for name in names]


def encode_skipped(skipped: list[tuple[str, str]]) -> NDArray[np.bytes_]:
    """Encodes the ids of a shard's unreadable images and the reasons as they are stored, shape ``(m, 2)``."""
    return encode([text for pair in skipped for text in pair]).reshape(-1, 2)


def read_skipped(images: Shard) -> list[tuple[str, str]]:
    """Reads from an image shard what :func:`encode_skipped` stored."""
    texts = decode(images.read(SKIPPED).reshape(-1))
    return list(zip(texts[::2], texts[1::2], strict=True))


class WholeShards:
    """The shards of one split that are whole. A process opens and validates each file once.

    Args:
        layouts: Layouts of the sets by name, including the images.
    """

    def __init__(self, layouts: Mapping[str, SetLayout]) -> None:
        self._layouts = layouts
        self._found: dict[int, dict[str, Shard]] = {}
        self._reported: set[Path] = set()

    def get(self, name: str, index: int) -> Shard | None:
        """Gives a shard if it is there, valid, and has the samples of the image shard; else ``None``.

        Args:
            name: ``"image"`` or the name of a teacher.
            index: Number of the shard.

        Raises:
            UnreadableFileError: If the system refuses to read a file, which making it anew would not cure.
        """
        found = self._found.setdefault(index, {})
        if name not in found:
            images = None if name == IMAGE else self.get(IMAGE, index)
            shard = None if images is None and name != IMAGE else self._validated(name, index, images)
            if shard is None:
                return None
            found[name] = shard
        return found[name]

    def forget(self, index: int) -> None:
        """Forgets the shards of one number, whose images were replaced, so that they are validated again."""
        self._found.pop(index, None)

    def sets(self, names: Sequence[str]) -> dict[str, list[Shard]]:
        """Gives all shards of the given sets.

        Raises:
            StoreError: If shards are missing. The message names them.
        """
        found: dict[str, list[Shard]] = {name: [] for name in names}
        missing = []
        for name in names:
            for index in range(self._layouts[name].images.shard_count):
                if (shard := self.get(name, index)) is None:
                    missing.append(f"{name} {index}")
                else:
                    found[name].append(shard)
        if missing:
            images = self._layouts[IMAGE]
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise StoreError(
                f"Extraction of split {images.split!r} into {images.root} is unfinished. Missing shards: "
                f"{', '.join(missing[:_SHOWN])}{more}. Run the same command again."
            )
        return found

    def _validated(self, name: str, index: int, images: Shard | None) -> Shard | None:
        layout = self._layouts[name]
        path = layout.path(index)
        if file_size(path) is None:
            return None
        try:
            shard = layout.open(index, layout.recorded(index))
            if images is not None and not np.array_equal(shard.read(KEY), images.read(KEY)):
                raise StoreError(damaged(path, "it has other samples than the image shard"))
        except UnreadableFileError:
            raise
        except StoreError as error:
            if path not in self._reported:
                logger.warning("A shard is made again: %s", error)
            self._reported.add(path)
            return None
        return shard


def complete(layout: SetLayout, shards: Sequence[Shard]) -> SetRecord:
    """Gives the final record of a set, and writes the statistics of a teacher's set of the training split.

    Args:
        layout: Layout of the set.
        shards: All its shards.

    Raises:
        StoreError: For the reasons given under :func:`teacher_statistics`.
    """
    records = tuple(_shard_record(layout, index, shard) for index, shard in enumerate(shards))
    record = replace(layout.record, shards=records, complete=True)
    if layout.split == TRAIN and record.spec is not None:
        target = statistics_path(layout.root, layout.name)
        # A teacher that was complete before stays untouched.
        if record != layout.record or not target.exists():
            teacher_statistics(layout, record.spec, shards).save(target)
    return record


def teacher_statistics(layout: SetLayout, spec: TeacherSpec, shards: Iterable[Shard]) -> ChannelStatistics:
    """Merges the sums that a teacher's shards hold into its statistics.

    Args:
        layout: Layout of the teacher's set, for the message.
        spec: Spec of the teacher.
        shards: All shards of the set.

    Raises:
        StoreError: If a shard is damaged, or no shard has a sample.
    """
    patches, cls = Moments.zero(spec.channels), Moments.zero(spec.channels)
    for shard in shards:
        total, squares = (shard.read(name) for name in PATCH_SUMS)
        patches += Moments(total, squares, shard.rows * spec.grid_hw[0] * spec.grid_hw[1])
        if spec.has_cls:
            total, squares = (shard.read(name) for name in CLS_SUMS)
            cls += Moments(total, squares, shard.rows)
    if not patches.count:
        raise StoreError(f"Split {layout.split!r} of {layout.root} has no image. Give images that can be read.")
    return ChannelStatistics.from_moments(patches, cls if spec.has_cls else None)


def missing_shards(layout: SetLayout) -> list[Path]:
    """Paths of the set's missing shards."""
    paths = (layout.path(index) for index in range(layout.images.shard_count))
    return [path for path in paths if file_size(path) is None]


def shard_records(layout: SetLayout) -> list[ShardRecord]:
    """Known records of a set's shards: all shards if the set is complete, else those that are there."""
    if layout.record.complete:
        return list(layout.record.shards)
    there = (index for index in range(layout.images.shard_count) if file_size(layout.path(index)) is not None)
    return [record for record in map(layout.recorded, there) if record is not None]


def _shard_record(layout: SetLayout, index: int, shard: Shard) -> ShardRecord:
    recorded = layout.recorded(index)
    if recorded is not None:
        return recorded
    # Something other than the writer, which leaves a record, put the file there.
    return ShardRecord(index, shard.rows, shard.path.stat().st_size, file_sha256(shard.path))
