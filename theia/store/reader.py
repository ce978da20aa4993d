"""Opens a store: validates every file once, then hands out byte offsets."""

import hashlib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from theia.errors import StoreError
from theia.store.agreement import check_splits, with_shards
from theia.store.completion import missing_shards
from theia.store.files import file_size
from theia.store.layout import LABEL, SetLayout
from theia.store.manifest import Manifest, read_manifest
from theia.store.schema import IMAGE, MANIFEST, SplitRecord, set_folder, statistics_path
from theia.store.shard import KEY, Shard, damaged, decode, read_shard
from theia.store.split import Column, Split
from theia.store.statistics import ChannelStatistics
from theia.types import TeacherSpec


class FeatureStore:
    """A feature store on disk.

    Attributes:
        root: Its folder.
        manifest: What it says about itself.
        manifest_sha256: Digest of ``manifest.json``: identifies the store's content.

    Args:
        root: Its folder.

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
        """Names of the teachers that are whole in each of some splits.

        Raises:
            StoreError: If there is no such split.
        """
        sets = [self._record(split).sets for split in splits]
        return [name for name in sets[0] if name != IMAGE and all(name in one and one[name].complete for one in sets)]

    def statistics(self, teacher: str) -> ChannelStatistics:
        """Mean and standard deviation of a teacher's features over the training split.

        Raises:
            StoreError: If there are none, or the file is damaged.
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
            split: Its name.
            teachers: Teachers to read, or one; all by default.

        Raises:
            StoreError: If the split or a teacher is not there or unfinished, a file is missing, truncated or
                unreadable, the samples of a teacher are not those of the images, or another split has another teacher
                of the same name.
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
                shard = _validated(layout, index)
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
        return Split({name: record.teachers[name] for name in names}, (size, size), columns, keys, labels)

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


def _validated(layout: SetLayout, index: int) -> Shard:
    path, record = layout.path(index), layout.record.shards[index]
    size = file_size(path)
    if size is not None and size != record.bytes:
        raise StoreError(damaged(path, f"it has {size} bytes, the manifest says {record.bytes}"))
    shard = read_shard(path)
    layout.check(shard, index)
    if shard.rows != record.rows:
        raise StoreError(damaged(path, f"it has {shard.rows} samples, the manifest says {record.rows}"))
    return shard


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
