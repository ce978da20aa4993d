"""Images of a source in random order, decoded a batch ahead, for commands that look at each image once."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from theia.errors import ConfigError, ImageError
from theia.extraction.images import UnreadableImageError, to_square
from theia.extraction.sources import FolderSource, ImageSource, open_source
from theia.extraction.user_files import IMAGE_ENDINGS, is_folder

_SEED = 0
_MAX_THREADS = 8


def open_images(location: str) -> ImageSource:
    """Opens images to look at: one image file, or a place that :func:`theia.extraction.sources.open_source` takes.

    Raises:
        ImageError: For the reasons given under that function.
    """
    path = Path(location)
    if path.suffix.lower() in IMAGE_ENDINGS and not is_folder(path, "Give an image, or a folder or .tar file of them."):
        return FolderSource(path.parent, [path.name], labels=False)
    return open_source(location, "val")


class ImageStream:
    """Batches of decoded images, squashed to a square, as an extraction does by default.

    Args:
        source: Source of the images.
        size: Height and width of the resized images, in pixels.
        batch_size: Number of images per batch, before unreadable ones are left out.
        max_images: Number of images to look at, drawn at random but the same each time; all by default.
        first: Ids of images that come first and are always among them.

    Attributes:
        skipped: Id of each image that could not be read, and the reason; complete after the last batch.

    Raises:
        ConfigError: If an id in ``first`` belongs to no image.
    """

    def __init__(
        self,
        source: ImageSource,
        size: int,
        batch_size: int,
        max_images: int | None = None,
        first: Sequence[str] = (),
    ) -> None:
        self._source, self._size, self._batch_size = source, size, batch_size
        self._order = _order(source.ids, max_images, first)
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
        """Yields ids and images, uint8 of shape ``(B, 3, size, size)``; never an empty batch.

        Raises:
            ImageError: If no image can be read, or the file system fails.
        """
        self.skipped = []
        found = False
        # Pillow releases the interpreter's lock while it decodes and resizes.
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            starts = range(0, len(self._order), self._batch_size)
            ahead = self._submit(pool, 0)
            for start in starts:
                current, ahead = ahead, self._submit(pool, start + self._batch_size)
                decoded = [future.result() for future in current]
                ids = [self._source.ids[place] for place in self._order[start : start + self._batch_size]]
                good = [(name, image) for name, image in zip(ids, decoded, strict=True) if not isinstance(image, str)]
                self.skipped += [(name, why) for name, why in zip(ids, decoded, strict=True) if isinstance(why, str)]
                if good:
                    found = True
                    yield [name for name, _ in good], torch.from_numpy(np.stack([image for _, image in good]))
        if not found:
            name, why = self.skipped[0]
            raise ImageError(
                f"None of the {len(self._order)} images can be read; the first, {name}: {why}. Give other --images."
            )

    def _submit(self, pool: ThreadPoolExecutor, start: int) -> list[Future[npt.NDArray[np.uint8] | str]]:
        return [pool.submit(self._decode, place) for place in self._order[start : start + self._batch_size]]

    def _decode(self, place: int) -> npt.NDArray[np.uint8] | str:
        """Pixels of one image, or the reason why there are none."""
        try:
            return to_square(self._source.read(place), self._size, "squash")
        except UnreadableImageError as error:
            return str(error)


def _order(ids: Sequence[str], max_images: int | None, first: Sequence[str]) -> list[int]:
    order: list[int] = np.random.default_rng(_SEED).permutation(len(ids)).tolist()
    if first:
        places = {name: place for place, name in enumerate(ids)}
        missing = [name for name in first if name not in places]
        if missing:
            near = ", ".join(ids[:3])
            raise ConfigError(f"There is no image {missing[0]!r}. Ids are paths below --images, such as {near}.")
        chosen = dict.fromkeys(places[name] for name in first)
        order = [*chosen, *(place for place in order if place not in chosen)]
    return order[:max_images]
