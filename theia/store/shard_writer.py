"""One teacher's features of one shard, appended batch by batch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from theia.errors import FeatureError
from theia.store.features import to_stored
from theia.store.layout import CLS_SUMS, PATCH_SUMS
from theia.store.new_shard import NewShard
from theia.store.schema import FeatureDtype
from theia.store.statistics import Moments
from theia.types import TeacherSpec


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
        self._check(patches, cls)
        stop = self._rows + len(patches)
        columns, patch_moments, cls_moments = to_stored(
            self._spec,
            self._dtype,
            self.ids[self._rows : stop],
            _prepared(patches),
            None if cls is None else _prepared(cls),
        )
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

    def _check(self, patches: NDArray[Any], cls: NDArray[Any] | None) -> None:
        spec, batch = self._spec, len(patches)
        wanted = (batch, spec.grid_hw[0] * spec.grid_hw[1], spec.channels)
        wanted_cls = (batch, spec.channels) if spec.has_cls else None
        given_cls = None if cls is None else cls.shape
        if patches.shape != wanted or given_cls != wanted_cls:
            raise FeatureError(
                f"Teacher {spec.name!r} gave patches {patches.shape} and CLS {given_cls}; its spec says {wanted} and "
                f"{wanted_cls}. Correct its spec or its forward()."
            )
        if self._rows + batch > len(self.ids):
            raise FeatureError(
                f"Teacher {spec.name!r} gave features of more than the {len(self.ids)} images of {self._shard.path}. "
                "This is a defect of the extraction loop: please report it."
            )


def _prepared(values: NDArray[Any]) -> NDArray[np.float32]:
    # torch warns about arrays that it may not write to.
    return np.require(values, np.float32, ["C", "W"])
