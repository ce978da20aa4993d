"""Writes one split of a store, shard by shard, by several processes, and again after any interruption."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theia.errors import ShapeError, StoreError
from theia.store.agreement import check_folder, check_images, check_teacher, has_shards, same_images
from theia.store.completion import check_whole, complete, is_whole, missing_shards
from theia.store.files import remove_stale, replace_bytes, writing
from theia.store.image_shard import ImageShard, encode_skipped
from theia.store.layout import LABEL, SKIPPED, SetLayout
from theia.store.manifest import edit_manifest, read_manifest
from theia.store.new_shard import NewShard
from theia.store.schema import (
    IMAGE,
    STATISTICS,
    FeatureDtype,
    Field,
    ImageSet,
    SetRecord,
    ShardRecord,
    SplitRecord,
    set_folder,
    to_plain,
)
from theia.store.shard import read_shard
from theia.store.shard_writer import ShardWriter
from theia.types import Json, TeacherSpec


class SplitWriter:
    """One process's hand on one split of a store.

    One process calls :meth:`begin`; then any number of them, on any host, write different shards; when all are done,
    the first calls :meth:`finish`. A shard appears under its name only when it is whole, so that after an
    interruption the same calls, with whatever :meth:`has_shard` reports left out, end with the same store.

    Args:
        root: Folder of the store.
        split: Name of the split.

    Raises:
        StoreError: If the split cannot be the name of a folder.
    """

    def __init__(self, root: Path, split: str) -> None:
        if not re.fullmatch(r"\w[\w.-]*", split) or split == STATISTICS:
            raise StoreError(f"A split cannot be named {split!r}. Use letters, digits, '_', '-' and '.'.")
        self._root = Path(root)
        self._split = split
        self._names: tuple[str, ...] = ()
        self._record: SplitRecord | None = None

    def begin(
        self,
        images: ImageSet,
        teachers: Sequence[TeacherSpec],
        dtype: FeatureDtype,
        computed: Mapping[str, Json],
    ) -> None:
        """Announces what will be written, or checks that it continues what is there.

        Args:
            images: The split's images.
            teachers: Teachers to extract now; others that the store has stay as they are.
            dtype: Stored type of their patch tokens.
            computed: How they are computed, for the record.

        Raises:
            StoreError: If the store holds other images, or other features of one of the teachers; or cannot be
                written.
        """
        check_folder(self._root)
        with writing(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
        with edit_manifest(self._root) as manifest:
            former = manifest.splits.get(self._split, SplitRecord(images, {}))
            if not same_images(former.images, images):
                if has_shards(self._folder(IMAGE)):
                    check_images(self._root, self._split, former.images, images)
                former = SplitRecord(images, {})
            sets = {**former.sets, IMAGE: former.sets.get(IMAGE, SetRecord())}
            for spec in teachers:
                new = SetRecord(spec=spec, dtype=dtype, computed=computed)
                sets[spec.name] = self._continued(former.sets.get(spec.name), new, spec.name)
            self._names = (IMAGE, *(spec.name for spec in teachers))
            self._record = SplitRecord(images, sets)
            for name in self._names:
                whole = not missing_shards(self._layout(name))
                sets[name] = replace(sets[name], complete=sets[name].complete and whole)
            manifest.splits[self._split] = self._record
        folders = [self._root, self._root / STATISTICS, self._root / self._split]
        for folder in (*folders, *(self._folder(name) for name in self._names)):
            remove_stale(folder)

    def has_shard(self, name: str, index: int) -> bool:
        """Whether a whole and valid shard is there, so that it need not be written.

        Args:
            name: ``"image"`` or the name of a teacher.
            index: Number of the shard.
        """
        return is_whole(self._layout(name), self._layout(IMAGE), index)

    def write_images(
        self,
        index: int,
        ids: list[str],
        images: NDArray[np.uint8],
        labels: NDArray[np.int64] | None,
        skipped: list[tuple[str, str]],
    ) -> None:
        """Writes one shard of images.

        Args:
            index: Number of the shard.
            ids: Sample ids of the images that could be read, in the order of the list.
            images: uint8, shape ``(n, 3, H, W)``.
            labels: Class indices, int64, shape ``(n,)``, or ``None``.
            skipped: Ids of the listed images that could not be read, with the reason.

        Raises:
            ShapeError: If the arguments do not fit each other or the image set.
            StoreError: If the disk is full.
        """
        layout = self._layout(IMAGE)
        columns: dict[str, NDArray[Any]] = {"data": images}
        if labels is not None:
            columns[LABEL] = labels
        if any(len(column) != len(ids) for column in columns.values()):
            raise ShapeError(f"Image shard {index}: {len(ids)} ids for {len(images)} images or their labels.")
        if len(ids) + len(skipped) != layout.images.listed_in(index):
            raise ShapeError(
                f"Image shard {index}: {len(ids)} images and {len(skipped)} skipped ones do not make the "
                f"{layout.images.listed_in(index)} that are listed for it."
            )
        lost = encode_skipped(skipped)
        extra = {SKIPPED: (len(lost), Field(lost.dtype, (2,)))}
        datasets = layout.datasets(len(ids), labels is not None) | extra
        with NewShard(layout.path(index), ids, datasets, layout.attributes(index, len(ids))) as shard:
            shard.write_samples(columns)
            shard.write(SKIPPED, lost)
            self._commit(shard, layout, index, len(ids))

    def read_images(self, index: int) -> ImageShard:
        """The images of one shard.

        Raises:
            StoreError: If the shard is missing or damaged.
        """
        return ImageShard(read_shard(self._layout(IMAGE).path(index)))

    @contextmanager
    def open_shard(self, name: str, index: int) -> Iterator[ShardWriter]:
        """Writes one shard of a teacher; it appears when the block ends well and all images have features.

        Args:
            name: Name of the teacher.
            index: Number of the shard.

        Raises:
            FeatureError: If images are left without features.
            StoreError: If the image shard is missing, or the disk is full.
        """
        layout = self._layout(name)
        spec, dtype = layout.record.spec, layout.record.dtype
        if spec is None or dtype is None:
            raise StoreError(f"{name!r} is not a teacher of split {self._split!r}: write images with write_images().")
        ids = self.read_images(index).ids
        attributes = layout.attributes(index, len(ids))
        with NewShard(layout.path(index), ids, layout.datasets(len(ids)), attributes) as shard:
            features = ShardWriter(shard, spec, dtype, ids)
            yield features
            features.close()
            self._commit(shard, layout, index, len(ids))

    def skipped(self) -> list[tuple[str, str]]:
        """Ids and reasons of the images that could not be read, over all image shards on disk."""
        layout = self._layout(IMAGE)
        paths = (layout.path(index) for index in range(layout.images.shard_count))
        return [pair for path in paths if path.exists() for pair in ImageShard(read_shard(path)).skipped()]

    def finish(self) -> None:
        """Writes what is known only at the end: the manifest's records, the statistics, the list of skipped images.

        For the process that called :meth:`begin`, after all others are done.

        Raises:
            StoreError: If shards are missing; names them.
        """
        if not self._names:
            raise StoreError("SplitWriter.finish() is for the process that called begin().")
        layouts = [self._layout(name) for name in self._names]
        check_whole(layouts, self._layout(IMAGE))
        finished = {layout.name: complete(layout) for layout in layouts}
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("id", "reason"), *self.skipped()])
        skipped = table.getvalue().encode("utf-8", "surrogateescape")
        replace_bytes(self._root / self._split / "skipped.csv", skipped)
        with edit_manifest(self._root) as manifest:
            former = manifest.splits.get(self._split, self._known())
            manifest.splits[self._split] = replace(former, sets={**former.sets, **finished})
        for layout in layouts:
            for shard in finished[layout.name].shards:
                layout.sidecar(shard.index).unlink(missing_ok=True)

    def _continued(self, former: SetRecord | None, new: SetRecord, name: str) -> SetRecord:
        if former is None or not has_shards(self._folder(name)):
            return new
        check_teacher(self._root, self._split, former, new)
        return former

    def _commit(self, shard: NewShard, layout: SetLayout, index: int, rows: int) -> None:
        # The record comes first: killed in between, a later run finds the shard missing and replaces both.
        record = ShardRecord(index, rows, *shard.sync())
        replace_bytes(layout.sidecar(index), json.dumps(to_plain(record)).encode())
        shard.commit()

    def _layout(self, name: str) -> SetLayout:
        known = self._known()
        if name not in known.sets:
            raise StoreError(
                f"Split {self._split!r} of {self._root} has no {name!r}, only {', '.join(known.sets)}. "
                "Announce it with begin()."
            )
        return SetLayout(self._root, self._split, name, known.images, known.sets[name])

    def _known(self) -> SplitRecord:
        # Processes that did not call begin() learn from the manifest what it announced.
        if self._record is None:
            splits = read_manifest(self._root).splits
            if self._split not in splits:
                raise StoreError(f"{self._root} has no split {self._split!r} yet. Announce it with begin().")
            self._record = splits[self._split]
        return self._record

    def _folder(self, name: str) -> Path:
        return set_folder(self._root, self._split, name)
