"""The manifest: which splits, sets and shards a store has. Written last, replaced atomically."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from theia.errors import StoreError
from theia.store.files import locked, replace_bytes, unreadable
from theia.store.schema import (
    IMAGE,
    MANIFEST,
    SCHEMA_VERSION,
    SetRecord,
    ShardRecord,
    SplitRecord,
    image_set_from,
    teacher_spec_from,
    to_plain,
)

_LOCK = ".lock"


@dataclass
class Manifest:
    """Everything that a store says about itself.

    Attributes:
        splits: Records by name of the split.
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
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(
            f"{root} is not a feature store: it has no {MANIFEST}. Give the folder that 'theia extract --store' wrote."
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}). Restore it from a copy, or extract again.") from error
    _check_schema(path, content)
    try:
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
    content = {
        "schema": SCHEMA_VERSION,
        "splits": {name: _split_to_plain(record) for name, record in manifest.splits.items()},
    }
    replace_bytes(root / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


@contextmanager
def edit_manifest(root: Path) -> Iterator[Manifest]:
    """Gives the manifest as it is on disk now (empty for a new store) and writes it back, unless an error comes.

    Raises:
        StoreError: If it cannot be read or written.
    """
    with locked(root / _LOCK):
        manifest = read_manifest(root) if (root / MANIFEST).exists() else Manifest()
        yield manifest
        write_manifest(root, manifest)


def _check_schema(path: Path, content: Any) -> None:
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
    return {"spec": to_plain(record.spec), "dtype": record.dtype, "computed": dict(record.computed), **files}


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
        computed=values.get("computed", {}),
        shards=tuple(ShardRecord(**shard) for shard in values["shards"]),
        complete=values["complete"],
    )
