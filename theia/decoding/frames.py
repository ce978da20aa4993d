"""What is decoded: pictures in a fixed order."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from PIL import Image


class Frames(Protocol):
    """Images or the frames of a video.

    Attributes:
        skipped: By id, why it could not be read; filled while reading.
    """

    skipped: dict[str, str]

    @property
    def ids(self) -> Sequence[str]:
        """Of all, in order, unique."""

    def pick(self, indices: Iterable[int]) -> Iterator[tuple[int, Image.Image]]:
        """Reads some of them.

        Args:
            indices: Ascending.

        Yields:
            Index and picture, RGB, any size. Unreadable ones are left out and noted in ``skipped``.
        """
