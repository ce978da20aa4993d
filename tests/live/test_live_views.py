"""Augmentation: a view is a function of seed, epoch and image, and what it does is what its name says."""

import numpy as np
import pytest
import torch
from PIL import Image

from theia.extraction.images import to_square
from theia.extraction.views import Augmentation

ALL = {"crop": 0.2, "flip": 0.5, "jitter": 0.4}


@pytest.fixture(scope="module")
def image() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((70, 50), Image.Resampling.BICUBIC)


def view(image: Image.Image, epoch: int = 0, row: int = 0, **options: float) -> np.ndarray:
    return Augmentation(**options).view(image, 32, "squash", epoch, row)


def test_a_view_is_decided_by_seed_epoch_and_image(image: Image.Image) -> None:
    first = view(image, 3, 5, **ALL)
    view(image, 1, 2, **ALL)
    torch.rand(3)

    assert np.array_equal(view(image, 3, 5, **ALL), first)
    assert first.shape == (3, 32, 32)
    assert first.dtype == np.uint8
    for other in (view(image, 4, 5, **ALL), view(image, 3, 6, **ALL), view(image, 3, 5, **ALL, seed=1)):
        assert not np.array_equal(other, first)


def test_the_random_state_of_the_training_is_left_alone(image: Image.Image) -> None:
    before = torch.get_rng_state()
    view(image, **ALL)

    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_changed_by_default(image: Image.Image) -> None:
    assert not Augmentation().active
    assert np.array_equal(view(image, 3, 5), to_square(image, 32, "squash"))


def test_a_flip_mirrors(image: Image.Image) -> None:
    assert np.array_equal(view(image, flip=1.0), to_square(image, 32, "squash")[:, :, ::-1])
    mirrored = [not np.array_equal(view(image, 0, row, flip=0.25), view(image)) for row in range(400)]
    assert 60 < sum(mirrored) < 140  # 100, with a standard deviation of 8.7


def test_a_crop_shows_a_part_as_large_as_it_says() -> None:
    across, down = np.meshgrid(np.arange(200), np.arange(200))
    ramp = Image.fromarray(np.stack([across, down, 0 * down], 2).astype(np.uint8))
    shares, aspects = [], []
    for row in range(200):
        seen = view(ramp, 0, row, crop=0.25).astype(float)
        width, height = (np.ptp(seen[channel]) * 32 / 31 for channel in (0, 1))
        shares.append(width * height / 200**2)
        aspects.append(width / height)

    assert 0.2 < min(shares) < 0.35
    assert 0.85 < max(shares) < 1.05
    assert 0.7 < min(aspects) < 0.85 < 1.15 < max(aspects) < 1.45


def test_jitter_changes_colours_and_not_places(image: Image.Image) -> None:
    seen, plain = (view(image, **options).astype(float) for options in ({"jitter": 0.3}, {}))

    assert not np.array_equal(seen, plain)
    grey = [np.corrcoef(picture.mean(0).ravel(), plain.mean(0).ravel())[0, 1] for picture in (seen, seen[:, ::-1])]
    assert grey[0] > 0.9 > grey[1]
