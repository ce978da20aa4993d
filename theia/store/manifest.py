"""The manifest: splits, sets and shards of a store, and the checks that a new extraction agrees with them."""

import json
import logging
import reprlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from theia.errors import StoreError
from theia.store.disk import locked, replace_bytes, unreadable
from theia.store.schema import (
    IMAGE,
    MANIFEST,
    SCHEMA_VERSION,
    VIEWS,
    BasisRecord,
    ImageSet,
    SetRecord,
    ShardRecord,
    SplitRecord,
    image_set_from,
    set_folder,
    teacher_spec_from,
    to_plain,
)
from theia.types import TeacherSpec

logger = logging.getLogger(__name__)

_LOCK = ".lock"
# Names of these fields of an image set in messages.
_NAMES = {"ids_sha256": "list of image ids (digest)", "listed": "number of images", f"source.{VIEWS}": "--views"}


@dataclass
class Manifest:
    """Content of ``manifest.json``: everything that a store says about itself.

    Attributes:
        splits: Record of each split, by name.
    """

    splits: dict[str, SplitRecord] = field(default_factory=dict)


def read_manifest(root: Path) -> Manifest:
    """Reads ``manifest.json``.

    Args:
        root: Folder of the store.

    Raises:
        StoreError: If there is no store, the manifest is damaged, or it has another schema.
    """
    if not root.is_dir():
        raise StoreError(
            f"No feature store at {root}. Make one with: "
            f"theia extract --images DIR --split train --teachers NAMES --store {shlex.quote(str(root))}"
        )
    path = root / MANIFEST
    try:
        return parse_manifest(path, path.read_bytes())
    except FileNotFoundError:
        raise StoreError(
            f"{root} is not a feature store: it has no {MANIFEST}. Give the folder that 'theia extract --store' wrote."
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error


def parse_manifest(path: Path | str, text: bytes) -> Manifest:
    """Makes a manifest of the content of its file.

    Args:
        path: Place of the file, for messages.
        text: Its content.

    Raises:
        StoreError: If it is damaged, or has another schema.
    """
    try:
        content = json.loads(text)
        _check_schema(path, content)
        return Manifest({name: _split_from(values) for name, values in content["splits"].items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged ({type(error).__name__}: {error}). Restore it from a copy, or extract again."
        ) from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replaces ``manifest.json`` atomically.

    Raises:
        StoreError: If it cannot be written.
    """
    replace_bytes(root / MANIFEST, manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    """Content of the file of a manifest."""
    content = {
        "schema": SCHEMA_VERSION,
        "splits": {name: _split_to_plain(record) for name, record in manifest.splits.items()},
    }
    return (json.dumps(content, indent=1) + "\n").encode()


@contextmanager
def edit_manifest(root: Path) -> Iterator[Manifest]:
    """Gives the manifest as it is on disk now (empty for a new store), and writes it back unless there is an error.

    Raises:
        StoreError: If it cannot be read or written.
    """
    with locked(root / _LOCK):
        manifest = read_manifest(root) if (root / MANIFEST).exists() else Manifest()
        yield manifest
        write_manifest(root, manifest)


def _check_schema(path: Path | str, content: Any) -> None:
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, int):
        raise StoreError(f"{path} is not the manifest of a feature store: it states no schema. Extract again.")
    if schema > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema {schema}; this Theia reads schema {SCHEMA_VERSION}. "
            "Update it: pip install --upgrade theia"
        )
    if schema < SCHEMA_VERSION:
        raise StoreError(f"{path} has schema {schema}; this Theia reads schema {SCHEMA_VERSION}. Extract again.")


def _split_to_plain(record: SplitRecord) -> dict[str, Any]:
    return {
        "images": to_plain(record.images),
        "sets": {name: _set_to_plain(name, values) for name, values in record.sets.items()},
    }


def _set_to_plain(name: str, record: SetRecord) -> dict[str, Any]:
    files = {"shards": [to_plain(shard) for shard in record.shards], "complete": record.complete}
    if name == IMAGE:
        return files
    basis = {} if record.basis is None else {"basis": to_plain(record.basis)}
    return {"spec": to_plain(record.spec), "dtype": record.dtype, **basis, "computed": dict(record.computed), **files}


def _split_from(values: dict[str, Any]) -> SplitRecord:
    images = image_set_from(values["images"])
    sets = {name: _set_from(part) for name, part in values["sets"].items()}
    for name, record in sets.items():
        if record.complete and [shard.index for shard in record.shards] != list(range(images.shard_count)):
            raise ValueError(f"{name!r} is complete, but not all its shards are recorded")
    return SplitRecord(images, sets)


def _set_from(values: dict[str, Any]) -> SetRecord:
    return SetRecord(
        spec=teacher_spec_from(values["spec"]) if "spec" in values else None,
        dtype=values.get("dtype"),
        basis=BasisRecord(**values["basis"]) if "basis" in values else None,
        computed=values.get("computed", {}),
        shards=tuple(ShardRecord(**shard) for shard in values["shards"]),
        complete=values["complete"],
    )


def check_folder(root: Path) -> None:
    """Refuses to make a store among other files.

    Raises:
        StoreError: If the folder holds something other than a store.
    """
    if root.exists() and not root.is_dir():
        raise StoreError(f"{root} is a file. Give a folder with --store.")
    # A writer that was killed before it wrote a manifest may have left hidden files.
    if root.is_dir() and not (root / MANIFEST).exists() and any(path.name[0] != "." for path in root.iterdir()):
        raise StoreError(f"{root} is not empty and not a feature store. Give a new or empty folder with --store.")


def check_images(root: Path, split: str, former: ImageSet, images: ImageSet) -> None:
    """Refuses to mix two image sets in one split.

    Raises:
        StoreError: If they differ. The message names the first difference.
    """
    difference = _first_difference(to_plain(former), to_plain(images))
    if difference:
        raise StoreError(
            f"Split {split!r} of {root} was begun with other images: {difference}. Give the same images and options, "
            f"another --split or --store, or delete {root / split} to make the split anew."
        )


def check_teacher(root: Path, split: str, name: str, former: SetRecord, new: SetRecord) -> None:
    """Refuses to mix the features of two versions of a teacher in one set, and warns about two devices.

    Raises:
        StoreError: If they differ. The message names the first difference.
    """
    former_way, way = (
        {
            "dtype": part.dtype,
            "keep_components": part.basis and part.basis.components,
            "basis": part.basis and part.basis.sha256,
            "precision": part.computed.get("precision"),
        }
        for part in (former, new)
    )
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
    """Refuses splits that differ in image size or in a teacher, since no model could be scored on them.

    Args:
        root: Folder of the store.
        split: Name of the new split.
        images: Image set of the new split.
        teachers: Specs of the new split's teachers.
        others: Records of the other splits, from :func:`with_shards`.

    Raises:
        StoreError: If they differ. The message names the first difference.
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
    """Record of a split, limited to the sets that have a file."""
    sets = {name: part for name, part in record.sets.items() if any(set_folder(root, split, name).glob("shard-*.h5"))}
    return replace(record, sets=sets)


def _spec_difference(former: TeacherSpec | None, new: TeacherSpec | None) -> str | None:
    if former is None or new is None:
        return None
    # A digest identifies the weights, wherever they lie.
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
    before, now = ("not set" if value is None else reprlib.repr(value) for value in (former, new))
    return f"{_NAMES.get(place, place)} was {before}, is {now}"
