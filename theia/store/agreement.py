"""Whether what is to be stored, or read, agrees with what else the store holds, and if not, the first difference."""

import logging
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from theia.errors import StoreError
from theia.store.schema import MANIFEST, ImageSet, SetRecord, SplitRecord, set_folder, to_plain
from theia.types import TeacherSpec

logger = logging.getLogger(__name__)

_NAMES = {"ids_sha256": "list of image ids (digest)", "listed": "number of images"}


def check_folder(root: Path) -> None:
    """Refuses to make a store among other files.

    Raises:
        StoreError: If the folder holds something, but no store.
    """
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is a file. Give a folder with --store.")
    # Hidden files may be left by a writer that was killed before its manifest.
    if root.is_dir() and not (root / MANIFEST).exists() and any(path.name[0] != "." for path in root.iterdir()):
        raise StoreError(f"{root} is not empty and not a feature store. Give a new or empty folder with --store.")


def check_images(root: Path, split: str, former: ImageSet, images: ImageSet) -> None:
    """Refuses to mix two image sets in one split.

    Raises:
        StoreError: Names the first difference.
    """
    difference = _first_difference(to_plain(former), to_plain(images))
    if difference:
        raise StoreError(
            f"Split {split!r} of {root} was begun with other images: {difference}. Give the same images and options, "
            f"another --split or --store, or delete {root / split} to make the split anew."
        )


def check_teacher(root: Path, split: str, name: str, former: SetRecord, new: SetRecord) -> None:
    """Refuses to mix the features of two versions of a teacher in one set; warns of two devices.

    Raises:
        StoreError: Names the first difference.
    """
    former_way, way = ({"dtype": part.dtype, "precision": part.computed.get("precision")} for part in (former, new))
    difference = _spec_difference(former.spec, new.spec) or _first_difference(former_way, way)
    if difference:
        raise StoreError(
            f"Split {split!r} of {root} has features of another {name!r}: {difference}. Give the same options, "
            f"another --store, or delete {set_folder(root, split, name)} to extract it anew."
        )
    devices = [part.computed.get("device") for part in (former, new)]
    if devices[0] != devices[1] and not former.complete:
        logger.warning("Features of %r / %r were begun on %s and go on on %s.", name, split, *devices)


def check_splits(
    root: Path, split: str, images: ImageSet, teachers: Sequence[TeacherSpec], others: Mapping[str, SplitRecord]
) -> None:
    """Refuses splits that differ in the size of their images or in a teacher: no model could be scored on them.

    Args:
        root: Folder of the store.
        split: Name of the split.
        images: Its images.
        teachers: Its teachers.
        others: The other splits, from :func:`with_shards`.

    Raises:
        StoreError: Names the first difference.
    """
    for other, record in others.items():
        theirs, ours = ({"size": part.size, "resize": part.resize} for part in (record.images, images))
        difference = _first_difference(theirs, ours) if record.sets else None
        if difference:
            raise StoreError(
                f"The images of split {split!r} of {root} differ from those of {other!r}: {difference}. Give the "
                f"same options, another --store, or delete {root / other} and extract that split anew."
            )
        for spec in teachers:
            difference = _spec_difference(record.teachers.get(spec.name), spec)
            if difference:
                raise StoreError(
                    f"Split {split!r} of {root} has another {spec.name!r} than {other!r}: {difference}. Give the same "
                    f"options, another --store, or delete {set_folder(root, other, spec.name)} and extract it anew."
                )


def with_shards(root: Path, split: str, record: SplitRecord) -> SplitRecord:
    """A split with only those sets that have a file."""
    sets = {name: part for name, part in record.sets.items() if any(set_folder(root, split, name).glob("shard-*.h5"))}
    return replace(record, sets=sets)


def _spec_difference(former: TeacherSpec | None, new: TeacherSpec | None) -> str | None:
    if former is None or new is None:
        return None
    # A digest says what the weights are, wherever they lie.
    if former.revision == new.revision and (new.revision or "").startswith("sha256:"):
        former = replace(former, weights=new.weights)
    return _first_difference(to_plain(former), to_plain(new))


def _first_difference(former: Any, new: Any, place: str = "") -> str | None:
    if isinstance(former, dict) and isinstance(new, dict):
        for key in {**former, **new}:
            inner = f"{place}.{key}" if place else key
            difference = _first_difference(former.get(key), new.get(key), inner)
            if difference:
                return difference
        return None
    if former == new:
        return None
    return f"{_NAMES.get(place, place)} was {reprlib.repr(former)}, is {reprlib.repr(new)}"
