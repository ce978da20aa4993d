import pytest
import torch
from torch import Tensor

from theia.teacher import check_features
from theia_teachers.color import Color


def constant(red: int, green: int, blue: int, size: int = 224) -> Tensor:
    colour = torch.tensor([red, green, blue], dtype=torch.uint8)
    return colour.view(1, 3, 1, 1).expand(1, 3, size, size).clone()


# CIE Lab of the sRGB primaries under D65, 2 degrees, as printed in colour-science tables.
@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_a_constant_image_has_its_lab_colour_and_no_spread(
    rgb: tuple[int, int, int], lab: tuple[float, float, float]
) -> None:
    patches = Color()(constant(*rgb)).patches
    torch.testing.assert_close(
        patches[0, :, :3], torch.tensor(lab, dtype=torch.float32).expand(256, 3), atol=0.02, rtol=0
    )
    assert patches[..., 3:].abs().max() < 1e-5


def test_a_cell_half_white_half_black_has_mean_and_spread_fifty() -> None:
    image = constant(0, 0, 0)
    image[:, :, 14 * 3 : 14 * 4, 14 * 11 : 14 * 11 + 7] = 255
    grid = Color()(image).patches.reshape(16, 16, 6)
    torch.testing.assert_close(grid[3, 11], torch.tensor([50.0, 0.0, 0.0, 50.0, 0.0, 0.0]), atol=0.02, rtol=0)
    grid[3, 11] = 0
    assert grid.abs().max() < 1e-5


def test_other_sizes_are_squashed_to_the_same_cells() -> None:
    image = constant(255, 0, 0, size=448)
    image[:, 0, :, 224:] = 0
    image[:, 2, :, 224:] = 255
    grid = Color()(image[:, :, :200]).patches.reshape(16, 16, 6)
    wanted = Color()(constant(255, 0, 0)).patches[0, 0]
    torch.testing.assert_close(grid[:, :7], wanted.expand(16, 7, 6))
    wanted = Color()(constant(0, 0, 255)).patches[0, 0]
    torch.testing.assert_close(grid[:, 9:], wanted.expand(16, 7, 6))


def test_features_do_not_depend_on_the_batch() -> None:
    images = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8)
    alone = torch.cat([Color()(image[None]).patches for image in images])
    assert torch.equal(Color()(images).patches, alone)


def test_gives_what_the_spec_says() -> None:
    features = Color()(torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8))
    check_features(Color.spec, features, 2)
    assert features.patches.dtype == torch.float32
