import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from theia.analysis.similarity import SimilarityFigures, SimilarityToMean


def of(patches: torch.Tensor, batch: int = 3) -> SimilarityFigures:
    similarity = SimilarityToMean()
    for part in patches.split(batch):
        similarity.update(part)
    return similarity.compute()


def test_agrees_with_scikit_learn_image_by_image() -> None:
    patches = torch.randn(8, 15, 6, generator=torch.Generator().manual_seed(0)) + 0.7
    images = [cosine_similarity(image, image.mean(0, keepdims=True)).mean() for image in patches.double().numpy()]

    found = of(patches)
    assert found.mean == pytest.approx(np.mean(images))
    assert found.std == pytest.approx(np.std(images, ddof=1))
    assert found.counts.sum() == 8 * 15
    assert of(patches, 8).mean == pytest.approx(of(patches, 1).mean, abs=1e-12)


def test_two_tokens_at_a_right_angle_are_45_degrees_off_their_mean() -> None:
    found = of(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]))
    assert found.mean == pytest.approx(math.cos(math.pi / 4))
    assert found.std is None


def test_constant_features_are_all_alike() -> None:
    found = of(torch.full((2, 5, 3), 0.1))
    assert found.mean == pytest.approx(1)
    assert found.std == pytest.approx(0, abs=1e-12)
    assert found.counts[-1] == 10


def test_tokens_without_direction_are_left_out() -> None:
    patches = torch.ones(2, 4, 3)
    patches[0, 0] = 0
    patches[1] = 0
    found = of(patches)
    assert found.mean == pytest.approx(1)
    assert found.without_direction == 5
    assert of(torch.zeros(2, 4, 3)).mean is None
