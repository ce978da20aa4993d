"""How well images can be classified by the pooled patch tokens of a frozen student."""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from theia.analysis.classifiers import NEIGHBOURS, logistic_classes, nearest_classes
from theia.encoder.encoder import Encoder
from theia.scoring.contract import Trained
from theia.types import FeatureBatch

logger = logging.getLogger(__name__)


@torch.no_grad()
def classification(trained: Trained) -> dict[str, float]:
    """Classifies images by their mean-pooled patch tokens: nearest neighbours and a linear probe.

    Protocol: one vector per image, the mean of its patch tokens. Nearest neighbours: the majority among the 20
    training images (all, if there are fewer) with the greatest cosine, each with one vote. Linear probe: vectors
    standardised per channel on the training images, multinomial logistic regression with scikit-learn's own L2
    penalty (C = 1). No option of either is tuned on the score.

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
    (vectors, labels), (queries, truth) = training, held_out
    if (labels == labels[0]).all():
        logger.info("No classification scores: all %d training images are of one class.", len(labels))
        return {}
    nearest = nearest_classes(vectors, labels, queries, min(NEIGHBOURS, len(labels)))
    linear = torch.from_numpy(logistic_classes(vectors.numpy(), labels.numpy(), queries.numpy()))
    return {
        "knn_accuracy": float((nearest == truth).double().mean()),
        "linear_probe_accuracy": float((linear == truth).double().mean()),
    }


def _pooled(encoder: Encoder, batches: Iterable[FeatureBatch]) -> tuple[Tensor, Tensor] | None:
    """One vector per image, ``(n, C)``, and its class, ``(n,)``; ``None`` without labels."""
    vectors, labels = [], []
    for batch in batches:
        if batch.labels is None:
            return None
        vectors.append(encoder(batch.images, pool="mean").cpu())
        labels.append(batch.labels.clone().cpu())
    return torch.cat(vectors), torch.cat(labels)
