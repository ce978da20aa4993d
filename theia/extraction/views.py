"""Random views of images: what is drawn, and a source that gives each image several times, every time another view."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from theia.errors import ConfigError
from theia.extraction.images import to_square
from theia.store.schema import VIEWS, Resize, image_id, view_id
from theia.types import Json
from theia.utils.arguments import check_number

if TYPE_CHECKING:
    from theia.extraction.sources import ImageSource


@dataclass(frozen=True)
class Augmentation:
    """Random views of an image. Teachers and student see the same one.

    Attributes:
        crop: Smallest share of the image's area in a random crop of any aspect from 3:4 to 4:3; ``None`` for none.
        flip: Probability of a horizontal flip.
        jitter: Strength of the colour jitter: brightness, contrast and saturation change by at most this factor, the
            hue by a quarter of it.
        seed: Seed for the views.
    """

    crop: float | None = None
    flip: float = 0.0
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("data.augment_crop", self.crop, 0, 1, above=True)
        check_number("data.augment_flip", self.flip, 0, 1)
        check_number("data.augment_jitter", self.jitter, 0, 1)

    @property
    def active(self) -> bool:
        """Whether anything is drawn at random."""
        return self.crop is not None or self.flip > 0 or self.jitter > 0

    def view(self, image: Image.Image, size: int, resize: Resize, epoch: int, row: int) -> NDArray[np.uint8]:
        """One view, which only the seed, the epoch and the image decide.

        Args:
            image: Image in RGB.
            size: Height and width of the view, in pixels.
            resize: Way to bring the image to that size where it is not cropped.
            epoch: Number of the epoch.
            row: Row number of the image.

        Returns:
            Pixels, uint8, shape ``(3, size, size)``.
        """
        if not self.active:
            return to_square(image, size, resize)
        drawn = np.random.SeedSequence((self.seed, epoch, row)).generate_state(1, np.uint64)
        return np.ascontiguousarray(np.asarray(self.drawn(image, size, resize, drawn.tobytes())).transpose(2, 0, 1))

    def drawn(self, image: Image.Image, size: int, resize: Resize, seed: bytes) -> Image.Image:
        """One view, which only a seed and the image decide.

        Args:
            image: Image in RGB.
            size: Height and width of the view, in pixels.
            resize: Way to bring the image to that size where it is not cropped.
            seed: Bytes, of which the first 8 are used as a little-endian number without its last bit.
        """
        # Takes seconds, and images as they are do not need it.
        from torchvision.transforms import v2

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(seed[:8], "little") >> 1)
            if self.crop is not None:
                image = v2.RandomResizedCrop(size, (self.crop, 1), interpolation=v2.InterpolationMode.BICUBIC)(image)
            else:
                image = Image.fromarray(to_square(image, size, resize).transpose(1, 2, 0))
            if self.flip:
                image = v2.RandomHorizontalFlip(self.flip)(image)
            if self.jitter:
                image = v2.ColorJitter(self.jitter, self.jitter, self.jitter, self.jitter / 4)(image)
        return image


# Not options: stores with other views could not be compared.
_STORED = Augmentation(crop=0.3, flip=0.5)


class ViewedSource:
    """Every image of a source, each followed by random views of it with ids like ``cat.jpg#view1``.

    A view's id alone, by its SHA-256, seeds what is drawn: a crop of 30 to 100 % of the area, and a flip every other
    time.

    Args:
        source: The images.
        views: Number of samples of each image, itself included.
        size: Height and width of a view, in pixels.
        resize: Way in which images are brought to that size.

    Raises:
        ConfigError: If an image has an id like that of a view.

    Source: Dataset reinforcement (Faghri et al., 2023) and MobileCLIP store what teachers say of several views.
    """

    def __init__(self, source: "ImageSource", views: int, size: int, resize: Resize) -> None:
        taken = next((sample for sample in source.ids if image_id(sample) != sample), None)
        if taken is not None:
            raise ConfigError(
                f"The image {taken!r} has a name as --views gives to views of images. Rename it, or leave out --views."
            )
        self._source, self._views, self._size, self._resize = source, views, size, resize
        self.ids: Sequence[str] = [view_id(sample, number) for sample in source.ids for number in range(views)]
        self.labels = None if source.labels is None else [label for label in source.labels for _ in range(views)]
        self.classes = source.classes
        self.description: dict[str, Json] = {
            **source.description, VIEWS: views, "view_crop": _STORED.crop, "view_flip": _STORED.flip,
        }  # fmt: skip
        self._last: tuple[int, Image.Image] | None = None  # views of an image are read one after another

    def read(self, index: int) -> Image.Image:
        """Decodes one image, and draws its view; RGB. A view has the size of the stored images.

        Raises:
            ImageError: For the reasons that the source has.
        """
        place, number = divmod(index, self._views)
        if self._last is None or self._last[0] != place:
            self._last = place, self._source.read(place)
        image = self._last[1]
        if not number:
            return image
        seed = hashlib.sha256(self.ids[index].encode()).digest()
        return _STORED.drawn(image, self._size, self._resize, seed)
