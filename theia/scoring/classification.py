"""How well the classes of images can be told by a frozen student's pooled tokens."""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from theia.encoder.encoder import Encoder
from theia.scoring.contract import Trained
from theia.types import FeatureBatch

logger = logging.getLogger(__name__)

_NEIGHBOURS = 20
_ITERATIONS = 1000

Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]


@torch.no_grad()
def classification(trained: Trained) -> dict[str, float]:
    """Tells classes by mean-pooled patch tokens: nearest neighbours and a linear probe.

    Protocol: one vector per image, the mean of its patch tokens. Nearest neighbours: the majority among the 20
    training images (all, if there are fewer) with the greatest cosine, each with one vote. Linear probe: vectors
    standardised per channel on the training images, multinomial logistic regression with scikit-learn's own L2
    penalty (C = 1). Neither has an option that is chosen by its score.

    Args:
        trained: The student.

    Returns:
        ``knn_accuracy`` and ``linear_probe_accuracy``, shares of held-out images from 0 to 1. Empty if the store has no
        labels, or the training images are all of one class; the log says so.
    """
    training = _pooled(trained.encoder, trained.train(features=False))
    held_out = None if training is None else _pooled(trained.encoder, trained.held_out(features=False))
    if training is None or held_out is None:
        logger.info("No classification scores: the store has no class labels. 'theia extract --labels' keeps them.")
        return {}
    if len(np.unique(training[1])) < 2:
        logger.info("No classification scores: all %d training images are of one class.", len(training[1]))
        return {}
    # Not at the top: it takes long to import, and without labels it is not needed.
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    neighbours = KNeighborsClassifier(min(_NEIGHBOURS, len(training[1])), metric="cosine")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    return {
        "knn_accuracy": _accuracy(neighbours, training, held_out),
        "linear_probe_accuracy": _accuracy(probe, training, held_out),
    }


def _pooled(encoder: Encoder, batches: Iterable[FeatureBatch]) -> Labelled | None:
    """One vector per image and its class; ``None`` without labels."""
    vectors, labels = [], []
    for batch in batches:
        if batch.labels is None:
            return None
        vectors.append(encoder(batch.images, pool="mean").cpu())
        labels.append(batch.labels.clone().cpu())
    return torch.cat(vectors).numpy(), torch.cat(labels).numpy()


def _accuracy(classifier: Any, training: Labelled, held_out: Labelled) -> float:
    return float(classifier.fit(*training).score(*held_out))
