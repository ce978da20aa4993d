"""Which shards are there and whole, and what is known only when all of a set are: its records and statistics."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from theia.errors import StoreError
from theia.store.files import UnreadableFileError, file_size
from theia.store.layout import CLS_SUMS, PATCH_SUMS, SetLayout
from theia.store.schema import IMAGE, TRAIN, SetRecord, ShardRecord, statistics_path
from theia.store.shard import KEY, Shard, damaged, file_sha256, read_shard
from theia.store.statistics import ChannelStatistics, Moments

logger = logging.getLogger(__name__)

_SHOWN = 8


class WholeShards:
    """The whole shards of one split: a process opens and validates each file once.

    Args:
        layouts: The sets, by name; the images among them.
    """

    def __init__(self, layouts: Mapping[str, SetLayout]) -> None:
        self._layouts = layouts
        self._found: dict[int, dict[str, Shard]] = {}
        self._reported: set[Path] = set()

    def get(self, name: str, index: int) -> Shard | None:
        """A shard that is there, valid, and has the samples of the image shard; else ``None``.

        Args:
            name: ``"image"`` or the name of a teacher.
            index: Number of the shard.

        Raises:
            UnreadableFileError: If the system refuses to read a file: making it anew would be no remedy.
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
        """Looks anew, the next time, at the shards of one number: their images were replaced."""
        self._found.pop(index, None)

    def sets(self, names: Sequence[str]) -> dict[str, list[Shard]]:
        """All shards of some sets.

        Raises:
            StoreError: Names those that are missing.
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
        size = file_size(path)
        if size is None:
            return None
        try:
            shard = read_shard(path)
            layout.check(shard, index)
            recorded = layout.recorded(index)
            if recorded is not None and recorded.bytes != size:
                raise StoreError(damaged(path, f"it has not the {recorded.bytes} bytes that were written"))
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
    """Writes the statistics of a whole set, for the training split, and gives its final record.

    Args:
        layout: The set.
        shards: All of it.

    Raises:
        StoreError: If a shard is damaged, or no shard has a sample.
    """
    records = tuple(_shard_record(layout, index, shard) for index, shard in enumerate(shards))
    record = replace(layout.record, shards=records, complete=True)
    if layout.split == TRAIN and record.spec is not None:
        target = statistics_path(layout.root, layout.name)
        # Nothing of a teacher that was complete before is touched.
        if record != layout.record or not target.exists():
            set_statistics(layout, shards).save(target)
    return record


def set_statistics(layout: SetLayout, shards: Iterable[Shard]) -> ChannelStatistics:
    """Statistics of a teacher's set, merged from the sums that its shards hold.

    Args:
        layout: The set.
        shards: All of it.

    Raises:
        StoreError: If a shard is damaged, or no shard has a sample.
    """
    spec = layout.record.spec
    if spec is None:
        raise StoreError(f"{layout.name!r} of {layout.root} has no statistics: they are for teachers.")
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
    """Files of a set that are not there."""
    paths = (layout.path(index) for index in range(layout.images.shard_count))
    return [path for path in paths if file_size(path) is None]


def shard_records(layout: SetLayout) -> list[ShardRecord]:
    """What is known about the shards of a set: all of a complete one, else those that are there."""
    if layout.record.complete:
        return list(layout.record.shards)
    there = (index for index in range(layout.images.shard_count) if file_size(layout.path(index)) is not None)
    return [record for record in map(layout.recorded, there) if record is not None]


def _shard_record(layout: SetLayout, index: int, shard: Shard) -> ShardRecord:
    recorded = layout.recorded(index)
    if recorded is not None:
        return recorded
    # The file was put there by other means than the writer, which leaves a record.
    return ShardRecord(index, shard.rows, shard.path.stat().st_size, file_sha256(shard.path))
