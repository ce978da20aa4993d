"""HOG's strokes and the colours of cells."""

import numpy as np
import pytest
import torch
from torch import Tensor

from theia_teachers.color import Color
from theia_teachers.hog import HOG


@pytest.mark.parametrize("orientation", range(9))
def test_a_stroke_runs_along_the_edge_of_its_orientation(orientation: int) -> None:
    patches = torch.zeros(1, 14, 14, 3, 9, 2, 2)
    patches[0, 4, 6, 1, orientation, 1, 0] = 1  # green, row 9 and column 12 of cells
    pixels = HOG().decode(patches.reshape(1, 196, 108), torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).pixels[0]

    assert pixels.shape == (448, 448, 3)
    rows, columns = pixels[..., 1].nonzero(as_tuple=True)
    assert (rows.min() // 16, rows.max() // 16) == (9, 9)
    assert (columns.min() // 16, columns.max() // 16) == (12, 12)
    assert not pixels[..., [0, 2]].any()
    weights = pixels[rows, columns, 1].numpy()
    spread = np.cov(np.stack([columns.numpy(), rows.numpy()]), aweights=weights)
    along = np.linalg.eigh(spread)[1][:, -1]
    angle = np.radians(20 * orientation + 10)
    gradient = np.array([np.cos(angle), np.sin(angle)])
    assert abs(along @ gradient) < np.sin(np.radians(6))


def test_negative_predictions_have_no_stroke() -> None:
    images = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    assert not HOG().decode(torch.full((2, 196, 108), -1.0), images).pixels.any()


def test_a_cells_own_features_give_back_its_colour() -> None:
    colours = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = colours.repeat_interleave(14, 2).repeat_interleave(14, 3)

    pixels = Color().decode(Color()(images).patches, images).pixels

    difference = pixels.int() - colours.permute(0, 2, 3, 1).int()
    assert difference.abs().max() <= 1


@pytest.mark.filterwarnings("error")
def test_colours_that_no_screen_shows_are_the_nearest_that_it_can() -> None:
    patches: Tensor = torch.tensor([50.0, 300, -300, 0, 0, 0]).expand(1, 256, 6)
    assert Color().decode(patches, torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).pixels.dtype == torch.uint8
