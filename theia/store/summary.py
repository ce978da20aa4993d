"""What is in a store, for people."""

from dataclasses import dataclass
from pathlib import Path

from theia.store.completion import shard_records
from theia.store.layout import SetLayout, split_layouts
from theia.store.manifest import read_manifest
from theia.store.schema import IMAGE, FeatureDtype, ImageSet
from theia.types import TeacherSpec


@dataclass(frozen=True)
class SetSummary:
    """One teacher's features, or the images, of a split.

    Attributes:
        name: ``"image"`` or the name of the teacher.
        spec: The teacher, or ``None`` for images.
        dtype: Stored type of the patch tokens, or ``None`` for images.
        rows: Samples that are there.
        shards: Files that are there.
        bytes: Their size.
        complete: Whether the set is finished.
    """

    name: str
    spec: TeacherSpec | None
    dtype: FeatureDtype | None
    rows: int
    shards: int
    bytes: int
    complete: bool


@dataclass(frozen=True)
class SplitSummary:
    """One split of a store.

    Attributes:
        name: Its name.
        images: Its list of images.
        skipped: Listed images that could not be read; ``None`` while the images are unfinished.
        sets: Images first, then the teachers.
    """

    name: str
    images: ImageSet
    skipped: int | None
    sets: tuple[SetSummary, ...]


def describe(root: Path | str) -> list[SplitSummary]:
    """What a store has, from its manifest.

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
        rows=sum(shard.rows for shard in shards),
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        complete=record.complete,
    )
