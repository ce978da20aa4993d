"""Whether shards are there and whole, and what is known only when all of a set are: its records and statistics."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from theia.errors import StoreError
from theia.store.layout import CLS_SUMS, PATCH_SUMS, SetLayout
from theia.store.schema import TRAIN, SetRecord, ShardRecord, statistics_path
from theia.store.shard import KEY, damaged, file_sha256, read_shard
from theia.store.statistics import ChannelStatistics, Moments

logger = logging.getLogger(__name__)

_SHOWN = 8


def is_whole(layout: SetLayout, images: SetLayout, index: int) -> bool:
    """Whether a shard is there, valid, and has the samples of the image shard.

    Args:
        layout: The set.
        images: The images of the split.
        index: Number of the shard.
    """
    path = layout.path(index)
    if not path.exists():
        return False
    try:
        shard = read_shard(path)
        layout.check(shard, index)
        recorded = layout.recorded(index)
        if recorded is not None and recorded.bytes != path.stat().st_size:
            raise StoreError(damaged(path, f"it has not the {recorded.bytes} bytes that were written"))
        if not np.array_equal(shard.read(KEY), read_shard(images.path(index)).read(KEY)):
            raise StoreError(damaged(path, "it has other samples than the image shard"))
    except StoreError as error:
        logger.warning("A shard has to be made again: %s", error)
        return False
    return True


def check_whole(layouts: Sequence[SetLayout], images: SetLayout) -> None:
    """Checks that no shard is missing.

    Raises:
        StoreError: Names those that are.
    """
    missing = [
        f"{layout.name} {index}"
        for layout in layouts
        for index in range(layout.images.shard_count)
        if not is_whole(layout, images, index)
    ]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise StoreError(
            f"Extraction of split {images.split!r} into {images.root} is unfinished. Missing shards: "
            f"{', '.join(missing[:_SHOWN])}{more}. Run the same command again."
        )


def complete(layout: SetLayout) -> SetRecord:
    """Writes the statistics of a whole set, for the training split, and gives its final record.

    Raises:
        StoreError: If a shard is damaged, or no shard has a sample.
    """
    shards = tuple(_shard_record(layout, index) for index in range(layout.images.shard_count))
    record = replace(layout.record, shards=shards, complete=True)
    if layout.split == TRAIN and record.spec is not None:
        target = statistics_path(layout.root, layout.name)
        # Nothing of a teacher that was complete before is touched.
        if record != layout.record or not target.exists():
            set_statistics(layout).save(target)
    return record


def set_statistics(layout: SetLayout) -> ChannelStatistics:
    """Statistics of a teacher's set, merged from the sums that its shards hold.

    Raises:
        StoreError: If a shard is damaged, or no shard has a sample.
    """
    spec = layout.record.spec
    if spec is None:
        raise StoreError(f"{layout.name!r} of {layout.root} has no statistics: they are for teachers.")
    patches, cls = Moments.zero(spec.channels), Moments.zero(spec.channels)
    for index in range(layout.images.shard_count):
        shard = read_shard(layout.path(index))
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
    return [path for path in paths if not path.exists()]


def _shard_record(layout: SetLayout, index: int) -> ShardRecord:
    path = layout.path(index)
    size = path.stat().st_size
    recorded = layout.recorded(index)
    if recorded is not None and recorded.bytes == size:
        return recorded
    # The file was put there by other means than the writer, which leaves a record.
    return ShardRecord(index, read_shard(path).rows, size, file_sha256(path))
