"""Writes one split of a store, shard by shard, from several processes, and continues after any interruption."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theia.errors import ShapeError, StoreError
from theia.store.components import Basis, load_basis, save_basis
from theia.store.disk import replace_bytes, writing
from theia.store.features import ShardWriter
from theia.store.manifest import (
    check_folder,
    check_images,
    check_splits,
    check_teacher,
    edit_manifest,
    read_manifest,
    with_shards,
)
from theia.store.schema import (
    IMAGE,
    MANIFEST,
    SPLIT_RULE,
    STATISTICS,
    FeatureDtype,
    Field,
    ImageSet,
    SetRecord,
    ShardRecord,
    SplitRecord,
    is_split_name,
    set_folder,
    to_plain,
)
from theia.store.sets import (
    LABEL,
    SKIPPED,
    SetLayout,
    WholeShards,
    complete,
    encode_skipped,
    missing_shards,
    read_skipped,
    split_layouts,
)
from theia.store.shard import NewShard, Shard
from theia.types import Json, TeacherSpec
from theia.utils.files import remove_stale


class SplitWriter:
    """Writes one split of a store, as one of the processes that share the work.

    One process calls :meth:`begin`. Then any number of processes, on any host, write different shards. When all are
    done, the first process calls :meth:`finish`. A shard appears under its final name only when it is whole, so after
    an interruption the same calls, without the shards that :meth:`has_shard` reports, end with the same store.

    Args:
        root: Folder of the store.
        split: Name of the split.

    Raises:
        StoreError: If the name of the split cannot be that of a folder.
    """

    def __init__(self, root: Path, split: str) -> None:
        if not is_split_name(split):
            raise StoreError(f"A split cannot be named {split!r}. Use {SPLIT_RULE}.")
        self._root = Path(root)
        self._split = split
        self._names: tuple[str, ...] = ()
        self._sets: dict[str, SetLayout] = {}
        self._whole = WholeShards(self._sets)
        self._bases: dict[str, Basis] = {}

    def begin(
        self,
        images: ImageSet,
        teachers: Sequence[TeacherSpec],
        dtype: FeatureDtype,
        computed: Mapping[str, Json],
        precisions: Mapping[str, str] | None = None,
        bases: Mapping[str, Basis] | None = None,
    ) -> None:
        """Announces what will be written, or checks that it continues the split that is there.

        Args:
            images: Image set of the split.
            teachers: Specs of the teachers to extract now. Other teachers of the split stay, unless they have no file.
            dtype: Stored type of their patch tokens.
            computed: How the features are computed, for the record.
            precisions: Precision in which each teacher computes, by teacher, for the record as well.
            bases: Bases of the teachers whose features are stored as components, by teacher.

        Raises:
            StoreError: If the split holds other images, or other features of one of the teachers; if another split
                has images of another size, or another teacher of the same name; or if the store cannot be written.
        """
        check_folder(self._root)
        with writing(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
        with edit_manifest(self._root) as manifest:
            # Sets without a file hold nothing that must agree, and nothing is lost with them.
            splits = {name: with_shards(self._root, name, record) for name, record in manifest.splits.items()}
            former = splits.pop(self._split, None)
            kept = {} if former is None else dict(former.sets)
            if former is not None and kept:
                check_images(self._root, self._split, former.images, images)
            check_splits(self._root, self._split, images, teachers, splits)
            sets = {IMAGE: SetRecord(), **kept}
            for spec in teachers:
                way = {**computed, "precision": precisions[spec.name]} if precisions else computed
                basis = (bases or {}).get(spec.name)
                new = SetRecord(spec=spec, dtype=dtype, basis=None if basis is None else basis.record, computed=way)
                sets[spec.name] = kept.get(spec.name, new)
                check_teacher(self._root, self._split, spec.name, sets[spec.name], new)
            self._names = (IMAGE, *(spec.name for spec in teachers))
            for layout in split_layouts(self._root, self._split, SplitRecord(images, sets)):
                if layout.name in self._names and layout.record.complete and missing_shards(layout):
                    sets[layout.name] = replace(layout.record, complete=False)
            for name, basis in (bases or {}).items():
                save_basis(self._root, name, basis)
            manifest.splits[self._split] = SplitRecord(images, sets)
            self._announce(manifest.splits[self._split])
        folders = [self._root, self._root / STATISTICS, self._root / self._split]
        for folder in (*folders, *(self._folder(name) for name in self._names)):
            remove_stale(folder)

    def begun(self, teacher: str) -> SetRecord | None:
        """Record of those of a teacher's features that are in the store: in this split, or else in another one.

        Args:
            teacher: Name of the teacher.

        Returns:
            The record; ``None`` if the store has no features of this teacher.

        Raises:
            StoreError: If the manifest is damaged or cannot be read.
        """
        if not (self._root / MANIFEST).exists():
            return None
        splits = read_manifest(self._root).splits
        for split in (self._split, *splits):
            if split in splits and teacher in (sets := with_shards(self._root, split, splits[split]).sets):
                return sets[teacher]
        return None

    def basis(self, teacher: str) -> Basis | None:
        """Basis of a teacher's components; ``None`` if all channels are stored.

        Raises:
            StoreError: If it is missing or damaged.
        """
        record = self._layout(teacher).record.basis
        if record is None:
            return None
        if teacher not in self._bases:
            self._bases[teacher] = load_basis(self._root, teacher, record)
        return self._bases[teacher]

    def row_bytes(self, name: str) -> int:
        """Number of bytes that a set stores of each image."""
        return sum(field.row_bytes for field in self._layout(name).row_fields().values())

    def has_shard(self, name: str, index: int) -> bool:
        """Whether a whole and valid shard is there already.

        Args:
            name: ``"image"`` or the name of a teacher.
            index: Number of the shard.

        Raises:
            StoreError: If the system refuses to read a file.
        """
        self._layout(name)
        return self._whole.get(name, index) is not None

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
            skipped: Id of each listed image that could not be read, and the reason.

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
        self._whole.forget(index)

    def images(self, index: int) -> Shard:
        """Opens the images of one shard: dataset ``data``, uint8, shape ``(n, 3, H, W)``.

        Raises:
            StoreError: If the shard is missing or damaged.
        """
        path = self._layout(IMAGE).path(index)
        shard = self._whole.get(IMAGE, index)
        if shard is None:
            raise StoreError(f"{path} is missing or damaged. Run the same theia extract again.")
        return shard

    @contextmanager
    def open_shard(self, name: str, index: int, helpers: Executor | None = None) -> Iterator[ShardWriter]:
        """Writes one shard of a teacher. It appears when the block ends well and all images have features.

        Args:
            name: Name of the teacher.
            index: Number of the shard.
            helpers: Threads that compute checksums and write; by default the calling thread does.

        Raises:
            FeatureError: If images are left without features.
            StoreError: If the image shard is missing, or the disk is full.
        """
        layout = self._layout(name)
        spec, dtype = layout.record.spec, layout.record.dtype
        if spec is None or dtype is None:
            raise StoreError(f"{name!r} is not a teacher of split {self._split!r}: write images with write_images().")
        ids = self.images(index).keys()
        attributes = layout.attributes(index, len(ids))
        with NewShard(layout.path(index), ids, layout.datasets(len(ids)), attributes, helpers) as shard:
            features = ShardWriter(shard, spec, dtype, ids, self.basis(name))
            yield features
            features.close()
            self._commit(shard, layout, index, len(ids))

    def skipped(self) -> list[tuple[str, str]]:
        """Ids and reasons of the images that could not be read, over all image shards that are there."""
        shards = (self._whole.get(IMAGE, index) for index in range(self._layout(IMAGE).images.shard_count))
        return [pair for shard in shards if shard is not None for pair in read_skipped(shard)]

    def finish(self) -> None:
        """Writes what is known only at the end: records in the manifest, statistics, and the list of skipped images.

        The process that called :meth:`begin` calls this after all others are done.

        Raises:
            StoreError: If shards are missing. The message names them.
        """
        if not self._names:
            raise StoreError("SplitWriter.finish() is for the process that called begin().")
        whole = self._whole.sets(self._names)
        finished = {name: complete(self._layout(name), shards) for name, shards in whole.items()}
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("id", "reason"), *self.skipped()])
        skipped = table.getvalue().encode("utf-8", "surrogateescape")
        replace_bytes(self._root / self._split / "skipped.csv", skipped)
        with edit_manifest(self._root) as manifest:
            former = manifest.splits.get(self._split, SplitRecord(self._layout(IMAGE).images, {}))
            manifest.splits[self._split] = replace(former, sets={**former.sets, **finished})
        for name, record in finished.items():
            for shard in record.shards:
                self._layout(name).sidecar(shard.index).unlink(missing_ok=True)

    def _commit(self, shard: NewShard, layout: SetLayout, index: int, rows: int) -> None:
        if layout.record.complete:
            self._reopen(layout.name)
        # The record comes first: after a kill in between, a later run finds the shard missing and replaces both.
        record = ShardRecord(index, rows, *shard.sync())
        replace_bytes(layout.sidecar(index), json.dumps(to_plain(record)).encode())
        shard.commit()

    def _reopen(self, name: str) -> None:
        # Otherwise a kill before finish() would leave new features beside old statistics in a set that counts as
        # complete.
        with edit_manifest(self._root) as manifest:
            record = manifest.splits[self._split]
            reopened = replace(self._sets[name].record, complete=False)
            manifest.splits[self._split] = replace(record, sets={**record.sets, name: reopened})
        self._sets[name] = replace(self._sets[name], record=reopened)

    def _layout(self, name: str) -> SetLayout:
        # Processes that did not call begin() learn from the manifest what it announced.
        if not self._sets:
            splits = read_manifest(self._root).splits
            if self._split not in splits:
                raise StoreError(f"{self._root} has no split {self._split!r} yet. Announce it with begin().")
            self._announce(splits[self._split])
        if name not in self._sets:
            raise StoreError(
                f"Split {self._split!r} of {self._root} has no {name!r}, only {', '.join(self._sets)}. "
                "Announce it with begin()."
            )
        return self._sets[name]

    def _announce(self, record: SplitRecord) -> None:
        self._sets = {layout.name: layout for layout in split_layouts(self._root, self._split, record)}
        self._whole = WholeShards(self._sets)

    def _folder(self, name: str) -> Path:
        return set_folder(self._root, self._split, name)
