"""Writes one teacher's float32 features into a shard: checks, converts, sums and appends them batch by batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from theia.errors import FeatureError
from theia.store.schema import FeatureDtype
from theia.store.sets import CLS_SUMS, PATCH_SUMS
from theia.store.shard import NewShard
from theia.store.statistics import Moments
from theia.teacher import check_features
from theia.types import TeacherFeatures, TeacherSpec

Float32 = NDArray[np.float32]

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_INT8_MAX = 127
_BLOCK_VALUES = 1 << 18


class ShardWriter:
    """Takes the features of a shard's images in order. ``SplitWriter.open_shard`` makes it.

    Attributes:
        ids: Sample ids of the shard, in the order in which features are expected.
    """

    def __init__(self, shard: NewShard, spec: TeacherSpec, dtype: FeatureDtype, ids: list[str]) -> None:
        self.ids = ids
        self._shard = shard
        self._spec = spec
        self._dtype = dtype
        self._rows = 0
        self._patches = Moments.zero(spec.channels)
        self._cls = Moments.zero(spec.channels)

    def append(self, patches: NDArray[np.float32], cls: NDArray[np.float32] | None) -> None:
        """Stores the features of the next images.

        Args:
            patches: Patch tokens of the images, float32, shape ``(b, N, C)``.
            cls: CLS tokens of the images, float32, shape ``(b, C)``; ``None`` for a teacher without CLS token.

        Raises:
            FeatureError: If shapes do not fit the spec or the number of images, or a value cannot be stored.
            StoreError: If the disk is full.
        """
        # torch warns about arrays that it may not write to.
        patches = np.require(patches, np.float32, ["C", "W"])
        cls = None if cls is None else np.require(cls, np.float32, ["C", "W"])
        tensors = TeacherFeatures(torch.from_numpy(patches), None if cls is None else torch.from_numpy(cls))
        check_features(self._spec, tensors, len(patches))
        stop = self._rows + len(patches)
        if stop > len(self.ids):
            raise FeatureError(
                f"Teacher {self._spec.name!r} gave features of more than the {len(self.ids)} images of "
                f"{self._shard.path}. This is a defect of the extraction loop: please report it."
            )
        ids = self.ids[self._rows : stop]
        columns, patch_moments, cls_moments = to_stored(self._spec, self._dtype, ids, patches, cls)
        self._shard.write_samples(columns, self._rows)
        self._patches += patch_moments
        if cls_moments is not None:
            self._cls += cls_moments
        self._rows = stop

    def close(self) -> None:
        """Writes the sums over the shard.

        Raises:
            FeatureError: If images are left without features.
        """
        if self._rows != len(self.ids):
            raise FeatureError(
                f"Teacher {self._spec.name!r} gave features of {self._rows} images for {self._shard.path}, which has "
                f"{len(self.ids)}. This is a defect of the extraction loop: please report it."
            )
        pairs = [(PATCH_SUMS, self._patches)]
        if self._spec.has_cls:
            pairs.append((CLS_SUMS, self._cls))
        for (total, squares), moments in pairs:
            self._shard.write(total, moments.sum)
            self._shard.write(squares, moments.sumsq)


def to_stored(
    spec: TeacherSpec, dtype: FeatureDtype, ids: Sequence[str], patches: Float32, cls: Float32 | None
) -> tuple[dict[str, NDArray[Any]], Moments, Moments | None]:
    """Converts a batch to its stored form.

    Args:
        spec: Spec of the teacher, for messages.
        dtype: Stored type of the patch tokens. CLS tokens are always float16.
        ids: Sample ids, for messages.
        patches: Patch tokens, float32, shape ``(b, N, C)``.
        cls: CLS tokens, float32, shape ``(b, C)``, or ``None``.

    Returns:
        Rows by dataset name, and the sums of the stored values (for int8, of the values that they stand for).

    Raises:
        FeatureError: If a value is NaN, infinite, or beyond float16. The message names teacher, image and channel.
    """
    moments = Moments.zero(spec.channels)
    columns: dict[str, NDArray[Any]] = {}
    if dtype == "int8":
        columns["data"] = np.empty(patches.shape, np.int8)
        columns["scale"] = np.empty((len(patches), 2, spec.channels), np.float32)
    else:
        columns["data"] = _to_float16(patches)
    # Infinities of both signs have no sum. The check below finds them, so numpy need not warn.
    with np.errstate(invalid="ignore"):
        for row, data in enumerate(columns["data"]):
            if dtype == "int8":
                data[:], columns["scale"][row] = quantise(patches[row])
            for block in _blocks(*data.shape):
                values = torch.from_numpy(data[block]).double().numpy()
                if dtype == "int8":
                    step, middle = columns["scale"][row]
                    values *= step
                    values += middle
                moments += Moments.of(values)
        cls_moments = None
        if cls is not None:
            columns["cls"] = _to_float16(cls)
            cls_moments = Moments.of(columns["cls"])
    # A sum is finite only if every value is: the check costs nothing until it fails.
    if not np.isfinite(moments.sum).all():
        _refuse(spec, ids, patches, "patch token", dtype)
    if cls is not None and cls_moments is not None and not np.isfinite(cls_moments.sum).all():
        _refuse(spec, ids, cls[:, None], "CLS token", "float16")
    return columns, moments, cls_moments


def quantise(tokens: Float32) -> tuple[NDArray[np.int8], Float32]:
    """Stores the range of each channel of one image in int8 steps; a value is ``int8 * step + middle``.

    The standard deviations of a teacher's channels differ by orders of magnitude, and some channels hardly move around
    a mean that is a hundred times as large. A single step for all channels of a token would leave nothing of most of
    them.

    Args:
        tokens: Patch tokens of one image, shape ``(N, C)``.

    Returns:
        int8 of the same shape, at most half a step off, and the steps and middles, float32, shape ``(2, C)``. Where a
        channel is not finite, its step and middle are not finite either.
    """
    low, high = tokens.min(0), tokens.max(0)
    # Halved first: the difference of two large values may be beyond float32.
    step = (high / 2 - low / 2) / np.float32(_INT8_MAX)
    middle = low / 2 + high / 2
    # A channel with a single value is its middle. So is a channel that is not finite, which its middle shows.
    usable = (step >= np.finfo(np.float32).tiny) & np.isfinite(step)
    steps = tokens - middle
    steps /= np.where(usable, step, np.float32(1))
    steps[:, ~usable] = 0
    np.rint(steps, out=steps)
    # Where the range is a few units in the last place, the middle is rounded as coarsely.
    np.clip(steps, -_INT8_MAX, _INT8_MAX, out=steps)
    return steps.astype(np.int8), np.stack([step, middle])


def _blocks(tokens: int, channels: int) -> Iterator[slice]:
    # The values that one step works on stay in the cache.
    step = max(1, _BLOCK_VALUES // channels)
    return (slice(start, start + step) for start in range(0, tokens, step))


def _to_float16(values: Float32) -> NDArray[np.float16]:
    # torch converts with vector instructions, nine times faster than numpy.
    return torch.from_numpy(values).half().numpy()


def _refuse(spec: TeacherSpec, ids: Sequence[str], values: Float32, token: str, dtype: FeatureDtype) -> None:
    bad = ~np.isfinite(values if dtype == "int8" else _to_float16(values))
    sample, position, channel = (int(index) for index in np.argwhere(bad)[0])
    value = float(values[sample, position, channel])
    where = f"Teacher {spec.name!r}, image {ids[sample]!r}, {token} {position}, channel {channel}: {value:g}"
    if not np.isfinite(value):
        raise FeatureError(f"{where} is not a finite number. Remove that image from the source.")
    remedy = "Store this teacher as int8, or remove" if token == "patch token" else "Remove"
    raise FeatureError(
        f"{where} is beyond float16, whose largest value is {_FLOAT16_MAX:g}. {remedy} that image from the source."
    )
