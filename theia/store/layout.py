"""What every file of a set must contain: written by the writer, checked by whoever opens it."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from theia.errors import StoreError
from theia.store.files import reading
from theia.store.schema import (
    IMAGE,
    SCHEMA_VERSION,
    Field,
    ImageSet,
    SetRecord,
    ShardRecord,
    SplitRecord,
    canonical_json,
    feature_fields,
    image_fields,
    preprocessing_hash,
    shard_path,
    to_plain,
)
from theia.store.shard import CRC32, SCHEMA, Shard, damaged, decode, encode
from theia.types import Json

LABEL = "label"
SKIPPED = "skipped"

# Sums of the stored values per channel: of patch tokens and of CLS tokens.
PATCH_SUMS = ("sum", "sumsq")
CLS_SUMS = ("cls_sum", "cls_sumsq")


@dataclass(frozen=True)
class SetLayout:
    """The files of one set of one split.

    Attributes:
        root: Folder of the store.
        split: Name of the split.
        name: ``"image"`` or the name of a teacher.
        images: The split's image set.
        record: What the manifest says about the set.
    """

    root: Path
    split: str
    name: str
    images: ImageSet
    record: SetRecord

    def path(self, index: int) -> Path:
        """File of one shard."""
        return shard_path(self.root, self.split, self.name, index)

    def sidecar(self, index: int) -> Path:
        """File that keeps the record of a shard until the manifest has it."""
        return self.path(index).with_suffix(".json")

    def row_fields(self, labels: bool = False) -> dict[str, Field]:
        """What a row holds, by dataset name, in the order of its checksum.

        Args:
            labels: Whether images have labels.
        """
        if self.record.spec is None:
            return image_fields(self.images.size, labels)
        return feature_fields(self.record.spec, self.record.dtype or "float16")

    def sum_names(self) -> tuple[str, ...]:
        """Datasets that hold sums over the shard."""
        if self.record.spec is None:
            return ()
        return (*PATCH_SUMS, *CLS_SUMS) if self.record.spec.has_cls else PATCH_SUMS

    def datasets(self, rows: int, labels: bool = False) -> dict[str, tuple[int, Field]]:
        """All datasets that do not depend on ids: length of the first axis and type by name."""
        found = {name: (rows, field) for name, field in self.row_fields(labels).items()}
        found[CRC32] = (rows, Field(np.dtype("<u4"), ()))
        if self.record.spec is not None:
            channels = (self.record.spec.channels, Field(np.dtype("<f8"), ()))
            found |= dict.fromkeys(self.sum_names(), channels)
        return found

    def attributes(self, index: int, rows: int) -> dict[str, Json]:
        """What one file says about itself."""
        return {**self._attributes, "shard": index, "rows": rows}

    @cached_property
    def _attributes(self) -> dict[str, Json]:
        common: dict[str, Json] = {
            SCHEMA: SCHEMA_VERSION,
            "split": self.split,
            "set": self.name,
            "image_set_sha256": hashlib.sha256(canonical_json(to_plain(self.images)).encode()).hexdigest(),
        }
        spec = self.record.spec
        if spec is None:
            return {**common, "dtype": "uint8", "resize": self.images.resize}
        return {
            **common,
            "dtype": self.record.dtype or "float16",
            "spec": to_plain(spec),
            "preprocessing_sha256": preprocessing_hash(spec),
        }

    def check(self, shard: Shard, index: int) -> None:
        """Checks that a file is what the manifest says.

        Raises:
            StoreError: If an attribute or the type or shape of a dataset differs.
        """
        for name, value in self.attributes(index, shard.rows).items():
            if shard.attributes.get(name) != value:
                raise StoreError(
                    damaged(shard.path, f"its {name} is {shard.attributes.get(name)!r}, the manifest says {value!r}")
                )
        for name, (rows, field) in self.datasets(shard.rows, LABEL in shard.datasets).items():
            dataset = shard.datasets.get(name)
            if dataset is None or dataset.rows != rows or dataset.field != field:
                old = "; the int8 of an earlier version had one step per token" if name == "scale" else ""
                raise StoreError(damaged(shard.path, f"/{name} is missing or has another shape{old}"))
        unread = self.images.listed_in(index) - shard.rows
        if self.name == IMAGE and (SKIPPED not in shard.datasets or shard.datasets[SKIPPED].rows != unread):
            raise StoreError(damaged(shard.path, f"/{SKIPPED} does not name {unread} images"))

    def recorded(self, index: int) -> ShardRecord | None:
        """The record of a shard: of its sidecar, which is newer, or else of the manifest."""
        try:
            with reading(self.sidecar(index)):
                try:
                    return ShardRecord(**json.loads(self.sidecar(index).read_bytes()))
                except FileNotFoundError:
                    return self.record.shards[index] if index < len(self.record.shards) else None
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self.sidecar(index)} is damaged ({error}). Delete it.") from error


def split_layouts(root: Path, split: str, record: SplitRecord) -> list[SetLayout]:
    """The sets of a split, images first."""
    names = sorted(record.sets, key=lambda name: name != IMAGE)
    return [SetLayout(root, split, name, record.images, record.sets[name]) for name in names]


def encode_skipped(skipped: list[tuple[str, str]]) -> NDArray[np.bytes_]:
    """Ids of the images of a shard that could not be read, with the reason, as stored: shape ``(m, 2)``."""
    return encode([text for pair in skipped for text in pair]).reshape(-1, 2)


def read_skipped(images: Shard) -> list[tuple[str, str]]:
    """What :func:`encode_skipped` stored in an image shard."""
    texts = decode(images.read(SKIPPED).reshape(-1))
    return list(zip(texts[::2], texts[1::2], strict=True))
