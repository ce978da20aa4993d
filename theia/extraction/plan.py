"""What an extraction will write, and whether the disk has room for it."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from theia.errors import StoreError
from theia.extraction.progress import readable_bytes
from theia.store.schema import IMAGE, FeatureDtype, ImageSet, feature_fields, image_fields
from theia.store.writer import SplitWriter
from theia.types import TeacherSpec

# Keys, checksums and alignment, which the sizes below leave out.
_OVERHEAD = 1.01


@dataclass(frozen=True)
class PlannedSet:
    """One set of files: the images of a split, or what one teacher gives for them.

    Attributes:
        split: Name of the split.
        name: ``"image"`` or the teacher.
        shape: Channels and grid, for people.
        dtype: Of the stored values, for people.
        image_bytes: Stored bytes per image.
        images: Listed images of the split.
        missing: Those in shards that are not there yet.
    """

    split: str
    name: str
    shape: str
    dtype: str
    image_bytes: int
    images: int
    missing: int

    @property
    def missing_bytes(self) -> int:
        """Bytes still to write."""
        return self.image_bytes * self.missing


def plan(
    writers: Mapping[str, SplitWriter],
    image_sets: Mapping[str, ImageSet],
    specs: Sequence[TeacherSpec],
    dtype: FeatureDtype,
    labels: bool,
) -> list[PlannedSet]:
    """Sizes of every set, with what is already there taken off.

    Args:
        writers: By split.
        image_sets: By split.
        specs: Of the teachers.
        dtype: How features are stored.
        labels: Whether image shards hold labels.
    """
    sets = []
    for split, images in image_sets.items():
        kinds = [(IMAGE, f"3 x {images.size}x{images.size}", "uint8", image_fields(images.size, labels))]
        for spec in specs:
            shape = f"{spec.channels} x {spec.grid_hw[0]}x{spec.grid_hw[1]}" + (" + CLS" if spec.has_cls else "")
            kinds.append((spec.name, shape, dtype, feature_fields(spec, dtype)))
        for name, shape, stored_as, fields in kinds:
            absent = [shard for shard in range(images.shard_count) if not writers[split].has_shard(name, shard)]
            sets.append(
                PlannedSet(
                    split=split,
                    name=name,
                    shape=shape,
                    dtype=stored_as,
                    image_bytes=sum(field.row_bytes for field in fields.values()),
                    images=images.listed,
                    missing=sum(images.listed_in(shard) for shard in absent),
                )
            )
    return sets


def describe_plan(sets: Sequence[PlannedSet], store: Path) -> str:
    """The plan as a table, with totals and the free space of the disk."""
    rows = [
        (
            part.split,
            part.name,
            part.shape,
            part.dtype,
            readable_bytes(part.image_bytes),
            part.images,
            part.images - part.missing,
            readable_bytes(part.image_bytes * part.images),
        )
        for part in sets
    ]
    headers = ("split", "set", "channels x grid", "stored as", "per image", "images", "already there", "in all")
    total = sum(part.missing_bytes for part in sets)
    return (
        f"{tabulate(rows, headers)}\n"
        f"To write: {readable_bytes(total)}. Free at {store}: {readable_bytes(free_bytes(store))}."
    )


def check_disk(sets: Sequence[PlannedSet], store: Path) -> None:
    """Refuses what does not fit.

    Raises:
        StoreError: If the missing shards are larger than the free space.
    """
    needed = int(sum(part.missing_bytes for part in sets) * _OVERHEAD)
    free = free_bytes(store)
    if needed > free:
        raise StoreError(
            f"The features do not fit: {readable_bytes(needed)} are to be written and {store} has "
            f"{readable_bytes(free)} free. Free some space, give another --store, fewer --teachers, or --dtype int8."
        )


def free_bytes(path: Path) -> int:
    """Free space of the disk that holds a path, which need not exist yet."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free
