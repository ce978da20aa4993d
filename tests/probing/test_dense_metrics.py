import math

import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import jaccard_score

from theia.probing.dense_metrics import (
    align,
    angular_error,
    confusion,
    delta,
    depth_metrics,
    mean_iou,
    normal_metrics,
    pixel_accuracy,
    rmse,
    silog,
)

ALL = torch.ones(1, 1, 4, dtype=torch.bool)


def row(*values: float) -> torch.Tensor:
    """One image of one row."""
    return torch.tensor([[values]])


def test_rmse_by_hand() -> None:
    # Squares 1, 0, 4, 1: mean 1.5.
    assert rmse(row(1, 2, 5, 3), row(2, 2, 3, 4), ALL).item() == pytest.approx(math.sqrt(1.5))


@pytest.mark.parametrize(("power", "share"), [(1, 0.25), (2, 0.5), (3, 0.75)])
def test_delta_counts_factors_below_powers_of_five_quarters(power: int, share: float) -> None:
    # Off by 1.2, 1.5, 1/1.9 and 2.
    assert delta(row(1.2, 3, 1, 8), row(1, 2, 1.9, 4), ALL, power).item() == share


def test_silog_is_the_deviation_of_logarithms_and_forgives_scale() -> None:
    target = row(1, 2, 3, 4)
    assert silog(7 * target, target, ALL).item() == pytest.approx(0, abs=1e-4)
    # Logarithms off by +a, -a, +a, -a: deviation a.
    factor = row(1.1, 1 / 1.1, 1.1, 1 / 1.1)
    assert silog(factor * target, target, ALL).item() == pytest.approx(100 * math.log(1.1), rel=1e-5)


def test_silog_equals_the_formula_of_eigen() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.rand(1, 5, 6, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    d = prediction.log() - target.log()
    expected = 100 * math.sqrt(float((d**2).sum() / 30 - d.sum() ** 2 / 30**2))
    assert silog(prediction, target, target > 0).item() == pytest.approx(expected)


def test_alignment_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.rand(1, 5, 6, generator=generator) for _ in range(2))
    valid = torch.rand(1, 5, 6, generator=generator) > 0.3
    points = prediction[valid].numpy()[:, None]
    line = LinearRegression().fit(points, target[valid].numpy())
    assert torch.allclose(
        align(prediction, target, valid)[valid], torch.from_numpy(line.predict(points)).float(), atol=1e-5
    )


def test_alignment_of_a_constant_is_the_mean_of_the_target() -> None:
    assert torch.allclose(align(row(0.3, 0.3, 0.3, 0.3), row(1.0, 2, 3, 6), ALL), row(3.0, 3, 3, 3))


def test_depth_that_is_right_up_to_scale_and_shift_is_right_when_aligned() -> None:
    target = row(1, 2, 3, 4)
    found = depth_metrics(0.5 * target + 2, target)
    assert found["aligned_rmse"].item() == pytest.approx(0, abs=1e-5)
    assert found["aligned_delta1"].item() == 1
    assert found["rmse"].item() > 0.5


def test_unknown_depth_does_not_count() -> None:
    known = depth_metrics(row(1, 2, 5), row(2, 2, 3))
    more = depth_metrics(row(1, 2, 5, 9), row(2, 2, 3, 0))
    worse = depth_metrics(row(1, 2, 5, math.inf), row(2, 2, 3, 0))
    for name, value in known.items():
        assert value.item() == pytest.approx(more[name].item()) == pytest.approx(worse[name].item())


def test_an_image_without_known_depth_has_no_figures() -> None:
    assert all(value.isnan().all() for value in depth_metrics(row(1, 2), row(0, 0)).values())


def normals(*angles: float) -> torch.Tensor:
    """Vectors turned from the z axis by angles in degrees, ``(1, 3, 1, n)``."""
    turned = torch.deg2rad(torch.tensor(angles))
    return torch.stack([turned.sin(), torch.zeros_like(turned), turned.cos()])[None, :, None]


def test_angles_between_normals_are_exact_even_if_small() -> None:
    angles = (0.001, 0.1, 11.0, 90.0, 179.9)
    found = angular_error(3 * normals(*angles), normals(*[0.0] * 5))
    assert found.flatten().tolist() == pytest.approx(angles, rel=1e-3)


def test_figures_of_normals_by_hand() -> None:
    found = normal_metrics(normals(0, 11, 12, 29), normals(0, 0, 0, 0))
    assert found["angular_rmse"].item() == pytest.approx(math.sqrt((121 + 144 + 841) / 4), rel=1e-5)
    assert [found[f"under_{angle}"].item() for angle in ("11.25", "22.5", "30")] == [0.5, 0.75, 1.0]


def test_no_direction_is_not_a_perfect_one() -> None:
    found = normal_metrics(torch.zeros(1, 3, 1, 2), normals(0, 40))
    assert found["angular_rmse"].item() == 90
    assert found["under_30"].item() == 0


def test_unknown_normals_do_not_count() -> None:
    target = normals(0, 0, 0)
    target[..., 2] = 0
    assert normal_metrics(normals(10, 20, 90), target)["under_30"].item() == 1


def test_mean_iou_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randint(4, (2, 5, 6), generator=generator) for _ in range(2))
    expected = jaccard_score(target.flatten(), prediction.flatten(), average="macro")
    assert mean_iou(confusion(prediction, target, 4)) == pytest.approx(expected)


def test_ignored_pixels_and_absent_classes_do_not_count() -> None:
    counts = confusion(torch.tensor([0, 0, 1, 5]), torch.tensor([0, 1, 1, 255]), 6)
    # Class 0: 1 of 2, class 1: 1 of 2, others nowhere.
    assert mean_iou(counts) == 0.5
    assert pixel_accuracy(counts) == pytest.approx(2 / 3)
