"""The images of one shard, as the extraction loop reads them back."""

import numpy as np
from numpy.typing import NDArray

from theia.store.layout import LABEL, SKIPPED
from theia.store.shard import Shard, decode, encode


class ImageShard:
    """Images of one shard, read in slices.

    Attributes:
        ids: Sample ids, in order.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.ids = shard.keys()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Images from one row to another, uint8, shape ``(stop - start, 3, H, W)``.

        Raises:
            StoreError: If the file is damaged.
        """
        return self._shard.read("data", start, stop)

    def labels(self) -> NDArray[np.int64] | None:
        """Class indices, int64, shape ``(n,)``, or ``None``."""
        return self._shard.read(LABEL) if LABEL in self._shard.datasets else None

    def skipped(self) -> list[tuple[str, str]]:
        """Ids of the listed images that could not be read, with the reason."""
        texts = decode(self._shard.read(SKIPPED).reshape(-1))
        return list(zip(texts[::2], texts[1::2], strict=True))


def encode_skipped(skipped: list[tuple[str, str]]) -> NDArray[np.bytes_]:
    """Inverse of :meth:`ImageShard.skipped`, shape ``(m, 2)``."""
    return encode([text for pair in skipped for text in pair]).reshape(-1, 2)
