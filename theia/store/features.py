"""One teacher's float32 features on their way into a shard: checked, converted, summed, appended batch by batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from theia.errors import FeatureError
from theia.store.layout import CLS_SUMS, PATCH_SUMS
from theia.store.new_shard import NewShard
from theia.store.schema import FeatureDtype
from theia.store.statistics import Moments
from theia.teacher import check_features
from theia.types import TeacherFeatures, TeacherSpec

Float32 = NDArray[np.float32]

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_INT8_MAX = 127
_BLOCK_VALUES = 1 << 18


class ShardWriter:
    """Takes the features of a shard's images in order. Made by ``SplitWriter.open_shard``.

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
            patches: Float32, shape ``(b, N, C)``.
            cls: Float32, shape ``(b, C)``; ``None`` for a teacher without CLS token.

        Raises:
            FeatureError: If shapes do not fit the spec or the number of images, or a value cannot be stored.
            StoreError: If the disk is full.
        """
        patches, cls = _prepared(patches), None if cls is None else _prepared(cls)
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
        """Writes the sums.

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
        spec: The teacher, for messages.
        dtype: Stored type of the patch tokens; CLS tokens are float16 always.
        ids: Sample ids, for messages.
        patches: Float32, shape ``(b, N, C)``.
        cls: Float32, shape ``(b, C)``, or ``None``.

    Returns:
        Rows by dataset name, and the sums of the stored values (for int8: of what they stand for).

    Raises:
        FeatureError: If a value is NaN, infinite, or beyond float16; names teacher, image and channel.
    """
    tokens = patches.reshape(-1, patches.shape[-1])
    moments = Moments.zero(spec.channels)
    stored: NDArray[Any] = np.empty(tokens.shape, np.int8) if dtype == "int8" else _to_float16(tokens)
    columns = {"data": stored.reshape(patches.shape)}
    if dtype == "int8":
        columns["scale"] = np.empty(patches.shape[:2], np.float32)
    # Infinities of both signs have no sum: that is found below, not worth a warning.
    with np.errstate(invalid="ignore"):
        for block in _blocks(*tokens.shape):
            if dtype == "int8":
                scale = columns["scale"].reshape(-1)[block]
                stored[block], scale[:] = quantise(tokens[block])
            values = torch.from_numpy(stored[block]).double().numpy()
            if dtype == "int8":
                values *= scale[:, None]
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
    """int8 with one scale per token; a value is ``int8 * scale``, at most half a scale off.

    Args:
        tokens: Shape ``(n, C)``.

    Returns:
        int8 of the same shape, and float32 scales of shape ``(n,)``; where a token is not finite, neither is its scale.
    """
    scale = np.abs(tokens).max(1) / np.float32(_INT8_MAX)
    # A token of zeros, or as good as zeros, becomes zeros; so does one that is not finite, but its scale tells.
    usable = (scale >= np.finfo(np.float32).tiny) & np.isfinite(scale)
    steps = tokens / np.where(usable, scale, np.float32(1))[:, None]
    steps[~usable] = 0
    np.rint(steps, out=steps)
    return steps.astype(np.int8), scale


def _blocks(tokens: int, channels: int) -> Iterator[slice]:
    # What one step works on stays in the cache.
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


def _prepared(values: NDArray[Any]) -> NDArray[np.float32]:
    # torch warns about arrays that it may not write to.
    return np.require(values, np.float32, ["C", "W"])
