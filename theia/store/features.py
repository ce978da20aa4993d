"""Writes one teacher's features into a shard: checks, converts, sums and appends them batch by batch.

Conversion and sums run on the device that holds the features. The rest is done by the threads of a
:class:`theia.store.shard.NewShard`.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theia.errors import FeatureError
from theia.store.components import Basis
from theia.store.schema import FeatureDtype
from theia.store.sets import CLS_SUMS, PATCH_SUMS
from theia.store.shard import NewShard
from theia.store.statistics import Moments
from theia.teacher import check_features
from theia.types import TeacherFeatures, TeacherSpec

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_INT8_MAX = 127
_BLOCK_VALUES = 1 << 18  # summed at a time
_PIECE_VALUES = 1 << 20  # converted, checked and written at a time
_LOCAL = threading.local()


@dataclass(frozen=True)
class StoredRows:
    """Features of some images in their stored form, on any device.

    Attributes:
        columns: Rows by dataset name, contiguous.
        sums: Sum and sum of squares of the stored patch tokens per channel (for int8, of the values that they stand
            for), float64, shape ``(2, C)``. They are finite only if every value is.
        cls_sums: The same of the CLS tokens; ``None`` for a teacher without one.
        given: What the teacher gave, for a message about values that cannot be stored.
    """

    columns: dict[str, Tensor]
    sums: Tensor
    cls_sums: Tensor | None
    given: TeacherFeatures

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.columns["data"])

    def to_host(self) -> "StoredRows":
        """Begins to copy the stored form into pinned memory of the host; the current stream knows when it is there."""
        return replace(
            self,
            columns={name: values.to("cpu", non_blocking=True) for name, values in self.columns.items()},
            sums=self.sums.to("cpu", non_blocking=True),
            cls_sums=None if self.cls_sums is None else self.cls_sums.to("cpu", non_blocking=True),
        )


class ShardWriter:
    """Takes the features of a shard's images in order. ``SplitWriter.open_shard`` makes it.

    Attributes:
        ids: Sample ids of the shard, in the order in which features are expected.
    """

    def __init__(
        self, shard: NewShard, spec: TeacherSpec, dtype: FeatureDtype, ids: list[str], basis: Basis | None = None
    ) -> None:
        self.ids = ids
        self._shard = shard
        self._spec = spec
        self._dtype = dtype
        self._basis = basis
        self._rows = 0
        # Used for every batch: memory that is new costs more than the conversion.
        self._stored = torch.empty(0, dtype=torch.float16)
        self._patches = Moments.zero(spec.channels)
        self._cls = Moments.zero(spec.channels)

    def append(self, patches: NDArray[Any] | Tensor, cls: NDArray[Any] | Tensor | None) -> None:
        """Converts and stores the features of the next images. They must be in the memory of the host.

        Args:
            patches: Patch tokens of the images, floating point, shape ``(b, N, C)``.
            cls: CLS tokens of the images, floating point, shape ``(b, C)``; ``None`` for a teacher without CLS token.

        Raises:
            FeatureError: If shapes do not fit the spec or the number of images, or a value cannot be stored.
            StoreError: If the disk is full.
        """
        features = TeacherFeatures(_tensor(patches), None if cls is None else _tensor(cls))
        check_features(self._spec, features, len(features.patches))
        self._check_room(len(features.patches))
        # A few images at a time: conversions then need little memory, and the helpers write some while the next ones
        # are converted.
        used = self._dtype == "float16" or self._basis is not None
        if used and len(self._stored) < len(features.patches):
            self._stored = torch.empty(features.patches.shape, dtype=torch.float16)
        for piece in self._pieces(len(features.patches)):
            cls_tokens = None if features.cls is None else features.cls[piece]
            self._add(convert(self._dtype, features.patches[piece], cls_tokens, self._stored[piece], self._basis))
        self._shard.settle()

    def append_stored(self, rows: StoredRows) -> None:
        """Stores the next images' features that were converted already, with :func:`convert`.

        Args:
            rows: Features in their stored form, in the memory of the host.

        Raises:
            FeatureError: If there are too many images, or a value cannot be stored.
            StoreError: If the disk is full.
        """
        self._check_room(rows.images)
        self._add(rows)
        self._shard.settle()

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

    def _check_room(self, images: int) -> None:
        if self._rows + images > len(self.ids):
            raise FeatureError(
                f"Teacher {self._spec.name!r} gave features of more than the {len(self.ids)} images of "
                f"{self._shard.path}. This is a defect of the extraction loop: please report it."
            )

    def _add(self, rows: StoredRows) -> None:
        # A sum is finite only if every value is: the check costs nothing until it fails.
        if not rows.sums.isfinite().all():
            self._refuse(rows.given.patches, "patch token", self._dtype)
        if rows.cls_sums is not None and rows.given.cls is not None and not rows.cls_sums.isfinite().all():
            self._refuse(rows.given.cls[:, None], "CLS token", "float16")
        columns = {name: values.numpy() for name, values in rows.columns.items()}
        for piece in self._pieces(rows.images):
            some = {name: values[piece] for name, values in columns.items()}
            self._shard.write_samples(some, self._rows + piece.start)
        tokens = self._spec.grid_hw[0] * self._spec.grid_hw[1]
        total, squares = rows.sums.numpy()
        self._patches += Moments(total, squares, rows.images * tokens)
        if rows.cls_sums is not None:
            total, squares = rows.cls_sums.numpy()
            self._cls += Moments(total, squares, rows.images)
        self._rows += rows.images

    def _pieces(self, images: int) -> Iterator[slice]:
        # Not smaller: threads that hand each other much less hand each other mostly Python's lock.
        step = max(1, _PIECE_VALUES // (self._spec.grid_hw[0] * self._spec.grid_hw[1] * self._spec.channels))
        return (slice(start, min(start + step, images)) for start in range(0, images, step))

    def _refuse(self, given: Tensor, token: str, dtype: FeatureDtype) -> None:
        values = given.float()
        bad = ~(values if dtype == "int8" else values.half()).isfinite()
        if not bad.any():
            raise FeatureError(
                f"Teacher {self._spec.name!r}, image {self.ids[self._rows]!r} or one of the next: a component "
                "is beyond float16. Extract this teacher without --keep_components."
            )
        sample, position, channel = (int(index) for index in bad.nonzero()[0])
        value = float(values[sample, position, channel])
        where = (
            f"Teacher {self._spec.name!r}, image {self.ids[self._rows + sample]!r}, {token} {position}, "
            f"channel {channel}: {value:g}"
        )
        if not np.isfinite(value):
            raise FeatureError(f"{where} is not a finite number. Remove that image from the source.")
        remedy = "Store this teacher as int8, or remove" if token == "patch token" else "Remove"
        raise FeatureError(
            f"{where} is beyond float16, whose largest value is {_FLOAT16_MAX:g}. {remedy} that image from the source."
        )


def convert(
    dtype: FeatureDtype, patches: Tensor, cls: Tensor | None, out: Tensor | None = None, basis: Basis | None = None
) -> StoredRows:
    """Converts features to their stored form and sums them, on their device and without waiting for it.

    Args:
        dtype: Stored type of the patch tokens. CLS tokens are always float16.
        patches: Patch tokens, floating point, shape ``(b, N, C)``, in any layout of memory.
        cls: CLS tokens, floating point, shape ``(b, C)``, or ``None``.
        out: Memory for patch tokens that are stored as float16, shape ``(b, N, C)``; on a CPU only.
        basis: Basis of the components to store; ``None`` to store all channels. Sums are then those of the channels
            in float16, so that statistics are those of a store with all of them.
    """
    stored, scale = patches if basis is None else basis.project(patches), None
    if dtype == "int8":
        data, scale = quantise(stored.float())
        columns = {"data": data.contiguous(), "scale": scale}
    else:
        columns = {"data": _to_float16(stored, out if basis is None else None)}
    if basis is None:
        total = sums(columns["data"], scale)
    else:
        total = sums(_to_float16(patches, out))
        finite = columns["data" if scale is None else "scale"].isfinite().all()
        total = torch.where(finite, total, torch.nan)
    cls_sums = None
    if cls is not None:
        columns["cls"] = cls.float().half().contiguous()
        cls_sums = sums(columns["cls"][:, None])
    return StoredRows(columns, total, cls_sums, TeacherFeatures(patches, cls))


def quantise(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Stores the range of each channel of each image in int8 steps; a value is ``int8 * step + middle``.

    The standard deviations of a teacher's channels differ by orders of magnitude, and some channels hardly move around
    a mean that is a hundred times as large. A single step for all channels of a token would leave nothing of most of
    them.

    Args:
        tokens: Patch tokens, float32, shape ``(b, N, C)``.

    Returns:
        int8 of the same shape, at most half a step off, and the steps and middles, float32, shape ``(b, 2, C)``. Where
        a channel is not finite, its step and middle are not finite either.
    """
    low, high = tokens.amin(1, keepdim=True), tokens.amax(1, keepdim=True)
    # Halved first: the difference of two large values may be beyond float32.
    step = (high / 2 - low / 2) / _INT8_MAX
    middle = low / 2 + high / 2
    # A channel with a single value is its middle. So is a channel that is not finite, which its middle shows.
    usable = (step >= torch.finfo(torch.float32).tiny) & step.isfinite()
    steps = tokens - middle
    steps /= torch.where(usable, step, 1)
    steps.masked_fill_(~usable, 0)
    # Where the range is a few units in the last place, the middle is rounded as coarsely.
    steps.round_().clamp_(-_INT8_MAX, _INT8_MAX)
    return steps.to(torch.int8), torch.cat([step, middle], 1)


def sums(data: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sum and sum of squares of each channel, in float64.

    Args:
        data: Stored patch tokens, float16 or int8, shape ``(b, N, C)``, contiguous.
        scale: Steps and middles of int8, float32, shape ``(b, 2, C)``.

    Returns:
        Sums on the device of ``data``, float64, shape ``(2, C)``.
    """
    if data.device.type == "cpu":
        return _sums_on_host(data, scale)
    total = torch.zeros(2, data.shape[2], dtype=torch.float64, device=data.device)
    for row, tokens in enumerate(data):
        # Image by image, which bounds the memory that the doubles take.
        values = tokens.double()
        if scale is not None:
            values = values * scale[row, 0] + scale[row, 1]
        total += torch.stack([values.sum(0), values.square().sum(0)])
    return total


def _sums_on_host(data: Tensor, scale: Tensor | None) -> Tensor:
    """Likewise, with numpy, which is faster here and gives the same numbers whatever torch's number of threads."""
    channels = data.shape[2]
    step = max(1, _BLOCK_VALUES // channels)
    # By way of float32, which is exact: there are vector instructions for each of the two steps.
    single, double = _scratch(step, channels)
    moments = Moments.zero(channels)
    # Infinities of both signs have no sum, which is for the caller to find.
    with np.errstate(invalid="ignore"):
        for row, tokens in enumerate([data.flatten(0, 1)] if scale is None else data):
            for block in tokens.split(step):
                values = double[: len(block)].copy_(single[: len(block)].copy_(block))
                if scale is not None:
                    values *= scale[row, 0]
                    values += scale[row, 1]
                moments += Moments.of(values.numpy())
    return torch.from_numpy(np.stack([moments.sum, moments.sumsq]))


def _scratch(*shape: int) -> tuple[Tensor, Tensor]:
    """Memory of this thread in float32 and in float64, which is used again and again."""
    if getattr(_LOCAL, "shape", None) != shape:
        with torch.inference_mode(False):  # so that it can be written to everywhere
            _LOCAL.tensors = torch.empty(shape), torch.empty(shape, dtype=torch.float64)
        _LOCAL.shape = shape
    found: tuple[Tensor, Tensor] = _LOCAL.tensors
    return found


def _to_float16(values: Tensor, out: Tensor | None) -> Tensor:
    if values.device.type != "cpu":
        return values.half().contiguous()
    out = torch.empty(values.shape, dtype=torch.float16) if out is None else out
    for stored, given in zip(out, values, strict=True):
        # torch transposes by blocks, which is five times as fast, only single matrices that keep their type.
        stored.copy_(given if given.is_contiguous() else given.half())
    return out


def _tensor(values: NDArray[Any] | Tensor) -> Tensor:
    # torch warns about arrays that it may not write to.
    return values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, None, ["C", "W"]))
