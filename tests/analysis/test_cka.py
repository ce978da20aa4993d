"""Against the formula of Song et al. as it is printed, on all images at once."""

from typing import Any

import numpy as np
import pytest
import torch

from theia.analysis.similarity import CKA, noise


def hsic_1(k: Any, m: Any) -> float:
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    first = np.trace(k @ m)
    second = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (ones @ k @ m @ ones)
    return float((first + second - third) / (n * (n - 3)))


def printed(x: torch.Tensor, y: torch.Tensor) -> float:
    k, m = (side.double().numpy() @ side.double().numpy().T for side in (x, y))
    return hsic_1(k, m) / np.sqrt(hsic_1(k, k) * hsic_1(m, m))


def of(minibatch: int = 256, arriving: int = 5, **features: torch.Tensor) -> list[list[float | None]]:
    cka = CKA([*features], minibatch)
    for start in range(0, len(next(iter(features.values()))), arriving):
        cka.update({name: rows[start : start + arriving] for name, rows in features.items()})
    return cka.compute()


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(40, 10)
    return x + 3, x @ torch.randn(10, 25) + 2 * torch.randn(40, 25)


def test_one_minibatch_is_the_printed_formula(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = pair
    found = of(x=x, y=y)
    assert found[0][1] == found[1][0] == pytest.approx(printed(x, y), abs=1e-9)
    assert [found[0][0], found[1][1]] == pytest.approx([1, 1])


def test_minibatches_are_summed_up(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = pair
    sums = np.zeros(3)
    for start, stop in ((0, 16), (16, 32), (32, 40)):
        k, m = (side[start:stop].double().numpy() for side in pair)
        k, m = k @ k.T, m @ m.T
        sums += (stop - start) * np.array([hsic_1(k, m), hsic_1(k, k), hsic_1(m, m)])

    assert of(16, x=x, y=y)[0][1] == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), abs=1e-9)


def test_how_images_arrive_changes_nothing(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = pair
    assert of(16, 1, x=x, y=y)[0][1] == pytest.approx(of(16, 40, x=x, y=y)[0][1], abs=1e-12)


def test_rotation_scale_and_shift_change_nothing(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = pair
    rotation, _ = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64))
    found = of(x=x, moved=0.01 * x.double() @ rotation - 8, y=y)
    assert found[0][1] == pytest.approx(1, abs=1e-9)
    assert found[1][2] == pytest.approx(found[0][2], abs=1e-9)


def test_of_unrelated_features_it_is_0_on_average_unlike_the_biased_estimate() -> None:
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(40):
        x, y = (torch.randn(64, 32, generator=generator) for _ in range(2))
        values.append(of(16, 64, x=x, y=y)[0][1])
    assert np.mean(values) == pytest.approx(0, abs=0.02)  # the biased one is about 0.7


@pytest.mark.filterwarnings("error")
def test_constant_features_have_none() -> None:
    x = torch.randn(30, 4)
    found = of(x=x, constant=torch.full((30, 7), 0.1), zero=torch.zeros(30, 2))
    assert found[0][0] == pytest.approx(1)
    assert {found[row][column] for row, column in ((0, 1), (1, 0), (1, 1), (2, 2), (1, 2))} == {None}


def test_fewer_than_four_images_have_none_and_a_rest_is_left_out() -> None:
    x = torch.randn(19, 4)
    assert of(x=x[:3], y=x[:3]) == [[None, None], [None, None]]
    assert of(16, x=x, y=x**2)[0][1] == of(16, x=x[:16], y=x[:16] ** 2)[0][1]


@pytest.mark.parametrize("images", [4, 8, 16, 64])
def test_unrelated_features_scatter_as_said(images: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(300):
        x, y = torch.randn(2, images, 200, generator=generator)
        values.append(of(x=x, y=y)[0][1])
    assert np.std(np.array(values, float)) == pytest.approx(noise(images), rel=0.15)
