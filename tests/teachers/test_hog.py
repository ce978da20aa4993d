import numpy as np
import pytest
import skimage.data
import torch
from skimage.feature import hog
from torch import Tensor

from theia.teacher import check_features
from theia_teachers.hog import HOG


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    return torch.from_numpy(skimage.data.astronaut()[:224, 100:324]).permute(2, 0, 1)[None].contiguous()


def by_cell(patches: Tensor) -> Tensor:
    """Channels in the documented order, ``(B, row, column, colour, orientation, cell_row, cell_column)``."""
    return patches.reshape(len(patches), 14, 14, 3, 9, 2, 2)


def grating(angle: float) -> Tensor:
    """A grey wave whose gradient has this angle, in degrees from left-to-right towards top-to-bottom."""
    rows, columns = np.mgrid[:224, :224]
    phase = 0.4 * (columns * np.cos(np.radians(angle)) + rows * np.sin(np.radians(angle)))
    wave = torch.from_numpy(np.round(127.5 + 127.5 * np.sin(phase)).astype(np.uint8))
    return wave.expand(1, 3, 224, 224)


@pytest.mark.parametrize("orientation", range(9))
def test_a_grating_fills_the_bin_of_its_angle(orientation: int) -> None:
    # The cells on the rim are left out: the gradient across the rim counts as zero.
    cells = by_cell(HOG()(grating(20 * orientation + 10)).patches)[:, 1:-1, 1:-1]
    assert (cells[:, :, :, :, orientation] > 0.95).all()


def test_equals_skimage_normalised_cell_by_cell(photograph: Tensor) -> None:
    cells = by_cell(HOG()(photograph).patches)[0]
    for colour in range(3):
        channel = photograph[0, colour].numpy()
        wanted = hog(channel, 9, (8, 8), (1, 1), block_norm="L2", feature_vector=False).reshape(28, 28, 9)
        for row, column in [(0, 0), (3, 4), (13, 9), (27, 27)]:
            given = cells[row // 2, column // 2, colour, :, row % 2, column % 2]
            np.testing.assert_allclose(given.numpy(), wanted[row, column], atol=1e-5)


def test_one_dot_shows_in_its_colour_and_cell_only() -> None:
    image = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    image[0, 1, 8 * 5 + 4, 8 * 18 + 4] = 200  # green, sixth row and nineteenth column of cells
    energy = by_cell(HOG()(image).patches).square().sum(dim=4)
    assert energy.nonzero().tolist() == [[0, 2, 9, 1, 1, 0]]
    assert energy.max().item() == pytest.approx(1)


def test_a_flat_image_gives_zeros() -> None:
    assert (HOG()(torch.full((1, 3, 224, 224), 128, dtype=torch.uint8)).patches == 0).all()


def test_brightness_and_contrast_do_not_matter(photograph: Tensor) -> None:
    halved = (photograph // 2) * 2  # even levels, so that dividing by two is exact
    difference = HOG()(halved).patches - HOG()(halved // 2 + 60).patches
    assert difference.abs().max() < 1e-5


def test_features_do_not_depend_on_the_batch(photograph: Tensor) -> None:
    images = torch.cat([photograph, photograph.flip(3), photograph.flip(2)])
    alone = torch.cat([HOG()(image[None]).patches for image in images])
    assert torch.equal(HOG()(images).patches, alone)


def test_any_image_size_gives_what_the_spec_says() -> None:
    images = torch.randint(0, 256, (2, 3, 120, 300), dtype=torch.uint8)
    features = HOG()(images)
    check_features(HOG.spec, features, 2)
    assert features.patches.dtype == torch.float32
