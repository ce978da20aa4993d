"""Sample photographs: crops of the pictures that the scikit-image wheel carries. They need no network."""

import random
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from theia.types import Json

# Loaders of skimage.data by our names. Drawings, scans of text, and pictures under 256 pixels are left out.
TRAIN_PHOTOS = {
    "astronaut": "astronaut",
    "motorcycle_left": "stereo_motorcycle",
    "motorcycle_right": "stereo_motorcycle",
    "hubble": "hubble_deep_field",
    "ihc": "immunohistochemistry",
    "retina": "retina",
    "moon": "moon",
    "clock": "clock",
    "coins": "coins",
    "brick": "brick",
    "grass": "grass",
    "gravel": "gravel",
}
HELD_OUT_PHOTOS = {"chelsea": "chelsea", "coffee": "coffee", "rocket": "rocket", "camera": "camera"}

_SIDE_RANGE = (0.3, 1.0)  # of the photograph's short edge
_MIN_SIDE = 64  # pixels


class SampleSource:
    """Square crops of real photographs, the same in every process and on every machine.

    Crop ``i`` shows photograph ``i % n``. The first ``n`` are the largest centred squares; the later ones have
    a random place and side, and half of them are mirrored.

    Args:
        split: ``"train"`` has its own photographs; every other split shows the held-out ones.
        count: Number of crops.
    """

    def __init__(self, split: str, count: int) -> None:
        self._photos = list(TRAIN_PHOTOS if split == "train" else HELD_OUT_PHOTOS)
        self._split = split
        self.ids = [f"{self._photo(index)}/crop-{index:05d}" for index in range(count)]
        self.labels: list[int] | None = None
        self.classes: list[str] | None = None
        self.description: dict[str, Json] = {"kind": "sample", "photographs": [*self._photos], "crops": count}

    def read(self, index: int) -> Image.Image:
        """One crop; RGB, square."""
        photo = _load(self._photo(index))
        short = min(photo.size)
        if index < len(self._photos):
            left, top = (photo.width - short) // 2, (photo.height - short) // 2
            return photo.crop((left, top, left + short, top + short))
        # Seeded with text: the standard library keeps that stream the same across versions and processes.
        rng = random.Random(f"{self._split}/{index}")
        side = max(_MIN_SIDE, round(short * rng.uniform(*_SIDE_RANGE)))
        left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        crop = photo.crop((left, top, left + side, top + side))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop

    def _photo(self, index: int) -> str:
        return self._photos[index % len(self._photos)]


@cache
def _load(photo: str) -> Image.Image:
    # Importing scikit-image takes long, and other image sources do not need it.
    import skimage.data

    loaded: Any = getattr(skimage.data, (TRAIN_PHOTOS | HELD_OUT_PHOTOS)[photo])()
    if photo.startswith("motorcycle"):
        left, right, _disparity = loaded
        loaded = left if photo == "motorcycle_left" else right
    return Image.fromarray(np.asarray(loaded)).convert("RGB")
