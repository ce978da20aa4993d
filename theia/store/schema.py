"""The layout of a feature store on disk: names, types and records that writer and reader share."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from theia.types import Json, TeacherSpec

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STATISTICS = "statistics"
IMAGE = "image"
TRAIN = "train"
VIEWS = "views"  # in the record of a source: number of samples of each image, where there are several

SPLIT_RULE = f"letters, digits, '_' and '-', and not {STATISTICS!r}: it becomes a folder in the store"

FeatureDtype = Literal["float16", "int8"]
Resize = Literal["squash", "center_crop"]


@dataclass(frozen=True)
class Field:
    """Type and row shape of one value per sample.

    Attributes:
        dtype: Little-endian numpy type.
        shape: Shape of one row, without the sample axis.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """The list of images behind one split, and how they were processed.

    Attributes:
        source: Origin of the images, as plain values. It is compared when an extraction is continued, so it must hold
            what identifies the images and nothing that changes from run to run.
        size: Height and width of the stored images, in pixels.
        resize: Way in which an image is brought to that size.
        listed: Number of images in the list, readable or not.
        ids_sha256: Digest of the images' ids in order, from :func:`hash_ids`.
        shard_size: Number of listed images per shard.
        classes: Class names by label, or ``None`` without labels.
    """

    source: Mapping[str, Json]
    size: int
    resize: Resize
    listed: int
    ids_sha256: str
    shard_size: int
    classes: tuple[str, ...] | None = None

    @property
    def shard_count(self) -> int:
        """Number of shards in every set of the split."""
        return -(-self.listed // self.shard_size)

    def listed_in(self, shard: int) -> int:
        """Number of listed images that belong to one shard."""
        return min(self.shard_size, self.listed - shard * self.shard_size)


@dataclass(frozen=True)
class ShardRecord:
    """Manifest entry for one file of a set.

    Attributes:
        index: Number of the shard.
        rows: Number of samples in the file.
        bytes: Size of the file in bytes.
        sha256: Sha256 digest of the file.
    """

    index: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BasisRecord:
    """What identifies the basis of features that are stored as components.

    Attributes:
        components: Number of components that are kept.
        sha256: Digest of the file of the basis.
    """

    components: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SetRecord:
    """The files of one teacher, or of the images, within a split.

    Attributes:
        spec: Spec of the teacher; ``None`` for images.
        dtype: Type of the stored patch tokens; ``None`` for images.
        basis: Basis of the components that are stored; ``None`` if the channels are.
        computed: How the features were computed (device, precision, versions). This is information; only the precision
            is compared.
        shards: One record per shard, empty until the set is complete for the first time.
        complete: Whether every shard is there, and the statistics belong to these shards.
    """

    spec: TeacherSpec | None = None
    dtype: FeatureDtype | None = None
    basis: BasisRecord | None = None
    computed: Mapping[str, Json] = field(default_factory=dict)
    shards: tuple[ShardRecord, ...] = ()
    complete: bool = False


@dataclass(frozen=True)
class SplitRecord:
    """One split: its image set, and its sets by name (``"image"`` and the teachers)."""

    images: ImageSet
    sets: Mapping[str, SetRecord]

    @property
    def teachers(self) -> dict[str, TeacherSpec]:
        """Specs of the teachers whose extraction was begun, by name."""
        return {name: record.spec for name, record in self.sets.items() if record.spec is not None}


def is_split_name(name: str) -> bool:
    """Whether a split may have this name. ``SPLIT_RULE`` describes allowed names, for messages."""
    return name != STATISTICS and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) is not None


def set_folder(root: Path, split: str, name: str) -> Path:
    """Folder of the shards of one set."""
    return root / split / name


def statistics_path(root: Path, teacher: str) -> Path:
    """Path of the statistics of one teacher."""
    return root / STATISTICS / f"{teacher}.npz"


def image_fields(size: int, labels: bool) -> dict[str, Field]:
    """Fields of a row of an image shard, by dataset name."""
    row = {"data": Field(np.dtype("u1"), (3, size, size))}
    return row | {"label": Field(np.dtype("<i8"), ())} if labels else row


def feature_fields(spec: TeacherSpec, dtype: FeatureDtype, components: int | None = None) -> dict[str, Field]:
    """Fields of a row of a teacher's shard, by dataset name, in the order in which the checksum covers them.

    Args:
        spec: Spec of the teacher.
        dtype: Stored type of the patch tokens.
        components: Number of components that are stored of each token; ``None`` for all channels.
    """
    tokens, width = spec.grid_hw[0] * spec.grid_hw[1], components or spec.channels
    row = {"data": Field(np.dtype("i1" if dtype == "int8" else "<f2"), (tokens, width))}
    if dtype == "int8":
        row["scale"] = Field(np.dtype("<f4"), (2, width))
    if spec.has_cls:
        row["cls"] = Field(np.dtype("<f2"), (spec.channels,))
    return row


def hash_ids(ids: Iterable[str]) -> str:
    """Digest of sample ids in order. Two lists with the same digest are the same list."""
    digest = hashlib.sha256()
    for sample in ids:
        digest.update(sample.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def view_id(image: str, number: int) -> str:
    """Sample id of a view of an image; view 0 is the image itself."""
    return f"{image}#view{number}" if number else image


def image_id(sample: str) -> str:
    """Sample id of the image that a sample is a view of, or is itself."""
    return re.sub(r"#view[0-9]+$", "", sample)


def preprocessing_hash(spec: TeacherSpec) -> str:
    """Digest of all steps that turn an image into the teacher's input."""
    return hashlib.sha256(canonical_json(spec.preprocessing).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """The unique JSON text of a value, with sorted keys and without spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=dict)


def to_plain(record: Any) -> dict[str, Any]:
    """Converts a record as a round trip through JSON would: tuples to lists, mappings to plain dictionaries."""
    values = {part.name: getattr(record, part.name) for part in fields(record)}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=dict))
    return plain


def image_set_from(values: Mapping[str, Any]) -> ImageSet:
    """Builds the image set from its values in a manifest."""
    classes = values["classes"]
    return ImageSet(**{**values, "classes": None if classes is None else tuple(classes)})


def teacher_spec_from(values: Mapping[str, Any]) -> TeacherSpec:
    """Builds the teacher spec from its values in a manifest."""
    height, width = values["grid_hw"]
    return TeacherSpec(**{**values, "grid_hw": (height, width)})
