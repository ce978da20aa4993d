"""Tokens beside their mean; and CKA, against the formula of Song et al. as it is printed, on all images at once."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from theia.analysis.similarity import CKA, SimilarityFigures, SimilarityToMean, noise


def figures(patches: torch.Tensor, batch: int = 3) -> SimilarityFigures:
    similarity = SimilarityToMean()
    for part in patches.split(batch):
        similarity.update(part)
    return similarity.compute()


def test_agrees_with_scikit_learn_image_by_image() -> None:
    patches = torch.randn(8, 15, 6, generator=torch.Generator().manual_seed(0)) + 0.7
    images = [cosine_similarity(image, image.mean(0, keepdims=True)).mean() for image in patches.double().numpy()]

    found = figures(patches)
    assert found.mean == pytest.approx(np.mean(images))
    assert found.std == pytest.approx(np.std(images, ddof=1))
    assert found.counts.sum() == 8 * 15
    assert figures(patches, 8).mean == pytest.approx(figures(patches, 1).mean, abs=1e-12)


def test_two_tokens_at_a_right_angle_are_45_degrees_off_their_mean() -> None:
    found = figures(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]))
    assert found.mean == pytest.approx(math.cos(math.pi / 4))
    assert found.std is None


def test_constant_features_are_all_alike() -> None:
    found = figures(torch.full((2, 5, 3), 0.1))
    assert found.mean == pytest.approx(1)
    assert found.std == pytest.approx(0, abs=1e-12)
    assert found.counts[-1] == 10


def test_tokens_without_direction_are_left_out() -> None:
    patches = torch.ones(2, 4, 3)
    patches[0, 0] = 0
    patches[1] = 0
    found = figures(patches)
    assert found.mean == pytest.approx(1)
    assert found.without_direction == 5
    assert figures(torch.zeros(2, 4, 3)).mean is None


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


def cka(minibatch: int = 256, arriving: int = 5, **features: torch.Tensor) -> list[list[float | None]]:
    collected = CKA([*features], minibatch)
    for start in range(0, len(next(iter(features.values()))), arriving):
        collected.update({name: rows[start : start + arriving] for name, rows in features.items()})
    return collected.compute()


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(40, 10)
    return x + 3, x @ torch.randn(10, 25) + 2 * torch.randn(40, 25)


def test_cka_of_one_minibatch_is_the_printed_formula(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = pair
    found = cka(x=x, y=y)
    assert found[0][1] == found[1][0] == pytest.approx(printed(x, y), abs=1e-9)
    assert [found[0][0], found[1][1]] == pytest.approx([1, 1])


def test_minibatches_of_cka_are_summed_up(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = pair
    sums = np.zeros(3)
    for start, stop in ((0, 16), (16, 32), (32, 40)):
        k, m = (side[start:stop].double().numpy() for side in pair)
        k, m = k @ k.T, m @ m.T
        sums += (stop - start) * np.array([hsic_1(k, m), hsic_1(k, k), hsic_1(m, m)])

    assert cka(16, x=x, y=y)[0][1] == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), abs=1e-9)


def test_how_images_arrive_changes_no_cka(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = pair
    assert cka(16, 1, x=x, y=y)[0][1] == pytest.approx(cka(16, 40, x=x, y=y)[0][1], abs=1e-12)


def test_rotation_scale_and_shift_change_no_cka(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = pair
    rotation, _ = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64))
    found = cka(x=x, moved=0.01 * x.double() @ rotation - 8, y=y)
    assert found[0][1] == pytest.approx(1, abs=1e-9)
    assert found[1][2] == pytest.approx(found[0][2], abs=1e-9)


def test_cka_of_unrelated_features_is_0_on_average_unlike_the_biased_estimate() -> None:
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(40):
        x, y = (torch.randn(64, 32, generator=generator) for _ in range(2))
        values.append(cka(16, 64, x=x, y=y)[0][1])
    assert np.mean(values) == pytest.approx(0, abs=0.02)  # the biased one is about 0.7


@pytest.mark.filterwarnings("error")
def test_constant_features_have_no_cka() -> None:
    x = torch.randn(30, 4)
    found = cka(x=x, constant=torch.full((30, 7), 0.1), zero=torch.zeros(30, 2))
    assert found[0][0] == pytest.approx(1)
    assert {found[row][column] for row, column in ((0, 1), (1, 0), (1, 1), (2, 2), (1, 2))} == {None}


def test_fewer_than_four_images_have_no_cka_and_a_rest_is_left_out() -> None:
    x = torch.randn(19, 4)
    assert cka(x=x[:3], y=x[:3]) == [[None, None], [None, None]]
    assert cka(16, x=x, y=x**2)[0][1] == cka(16, x=x[:16], y=x[:16] ** 2)[0][1]


@pytest.mark.parametrize("images", [4, 8, 16, 64])
def test_cka_of_unrelated_features_scatters_as_said(images: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(300):
        x, y = torch.randn(2, images, 200, generator=generator)
        values.append(cka(x=x, y=y)[0][1])
    assert np.std(np.array(values, float)) == pytest.approx(noise(images), rel=0.15)
