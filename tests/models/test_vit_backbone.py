import pytest
import torch
import torch.nn.functional as F

from theia.models.vit import resize_positions

SIZES = [(7, 10), (20, 33), (16, 14), (14, 16), (5, 40)]


@pytest.fixture
def grid() -> torch.Tensor:
    return torch.randn(14, 14, 8, generator=torch.Generator().manual_seed(0))


def upstream(grid: torch.Tensor, **options: object) -> torch.Tensor:
    return F.interpolate(grid.permute(2, 0, 1)[None].contiguous(), mode="bicubic", **options)[0].permute(1, 2, 0)


@pytest.mark.parametrize("size", SIZES)
def test_the_size_rule_is_torchs_antialiased_bicubic(grid: torch.Tensor, size: tuple[int, int]) -> None:
    expected = upstream(grid, size=size, antialias=True)
    torch.testing.assert_close(resize_positions(grid, *size, "size"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_the_published_rule_is_bicubic_with_their_scale_factor(grid: torch.Tensor, size: tuple[int, int]) -> None:
    expected = upstream(grid, scale_factor=tuple((side + 0.1) / 14 for side in size), align_corners=False)
    torch.testing.assert_close(resize_positions(grid, *size, "scale_factor"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", ["size", "scale_factor"])
def test_the_trained_size_is_left_alone(grid: torch.Tensor, rule: str) -> None:
    torch.testing.assert_close(resize_positions(grid, 14, 14, rule), grid, atol=1e-6, rtol=0)
