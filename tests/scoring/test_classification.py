import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from theia.encoder.encoder import Encoder
from theia.scoring.classification import classification
from theia.scoring.contract import Trained

Make = Callable[..., Trained]


def labels(images: torch.Tensor, noisy: int = 5) -> torch.Tensor:
    """Three classes by brightness, a few of them wrong."""
    brightness = images.float().mean((1, 2, 3))
    classes = torch.bucketize(brightness, brightness.quantile(torch.tensor([1 / 3, 2 / 3])))
    classes[::noisy] = (classes[::noisy] + 1) % 3
    return classes


def pooled(encoder: Encoder, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return encoder.forward_features(images).patches.mean(1).double().numpy()


def test_the_scores_are_those_of_the_stated_protocol(make_trained: Make, images: torch.Tensor) -> None:
    classes = labels(images)
    trained = make_trained({}, {}, labels=classes)

    scores = classification(trained)

    vectors, numbers = pooled(trained.encoder, images), classes.numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = np.argsort(-(unit[40:] @ unit[:40].T), axis=1)[:, :20]
    votes = np.array([np.bincount(numbers[row], minlength=3).argmax() for row in nearest])
    scaled = (vectors - vectors[:40].mean(0)) / vectors[:40].std(0)
    probe = LogisticRegression(max_iter=1000).fit(scaled[:40], numbers[:40])
    assert scores == {
        "knn_accuracy": pytest.approx((votes == numbers[40:]).mean()),
        "linear_probe_accuracy": pytest.approx(probe.score(scaled[40:], numbers[40:])),
    }
    assert scores["linear_probe_accuracy"] > 1 / 3


def test_few_images_are_all_neighbours(make_trained: Make, images: torch.Tensor) -> None:
    trained = make_trained({}, {}, labels=torch.arange(50) % 2)
    few = Trained(**{**vars(trained), "train": lambda features: iter([next(iter(trained.train(features)))])})

    # Six images, three of each class: a draw, and scikit-learn then takes the first class.
    assert classification(few)["knn_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("classes", "reason"), [(None, "no class labels"), (torch.zeros(50, dtype=torch.int64), "of one class")]
)
def test_nothing_to_tell_is_said_and_gives_nothing(
    make_trained: Make, caplog: pytest.LogCaptureFixture, classes: torch.Tensor | None, reason: str
) -> None:
    with caplog.at_level(logging.INFO, logger="theia"):
        assert classification(make_trained({}, {}, labels=classes)) == {}

    assert [reason in record.message for record in caplog.records] == [True]
