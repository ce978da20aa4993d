"""Whether a new run may continue what a store holds, and if not, the first difference."""

import reprlib
from pathlib import Path
from typing import Any

from theia.errors import StoreError
from theia.store.schema import MANIFEST, ImageSet, SetRecord, set_folder, to_plain

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


def same_images(former: ImageSet, images: ImageSet) -> bool:
    """Whether two image sets are one, after what JSON does to tuples."""
    return to_plain(former) == to_plain(images)


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


def check_teacher(root: Path, split: str, former: SetRecord, new: SetRecord) -> None:
    """Refuses to mix the features of two versions of a teacher in one set.

    Raises:
        StoreError: Names the first difference.
    """
    difference = _first_difference(_identity(former), _identity(new))
    if difference:
        name = _identity(new)["name"]
        raise StoreError(
            f"Split {split!r} of {root} has features of another {name!r}: {difference}. Give the same options, "
            f"another --store, or delete {set_folder(root, split, name)} to extract it anew."
        )


def has_shards(folder: Path) -> bool:
    """Whether a set has any file yet."""
    return any(folder.glob("shard-*.h5"))


def _identity(record: SetRecord) -> dict[str, Any]:
    return {**to_plain(record.spec), "dtype": record.dtype}


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
