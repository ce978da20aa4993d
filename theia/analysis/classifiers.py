"""Two classifiers of frozen vectors with nothing to tune: nearest neighbours and logistic regression.

They are the protocol of ``theia test --scorers classification`` and of ``theia probe classification``.
"""

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

NEIGHBOURS = 20

_QUERIES = 256  # classified at a time, to bound memory
_ITERATIONS = 1000


def nearest_classes(train: Tensor, labels: Tensor, queries: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """The most frequent class among the training vectors of greatest cosine.

    Each neighbour has one vote, whatever its cosine; of classes with equally many votes the first one wins.

    Args:
        train: Training vectors, shape ``(n, C)``.
        labels: Class index of each training vector, int64, shape ``(n,)``.
        queries: Vectors to classify, shape ``(m, C)``.
        neighbours: How many vote, at most ``n``.

    Returns:
        Class indices, shape ``(m,)``.
    """
    directions = F.normalize(train, dim=1)
    classes = int(labels.max()) + 1
    found = []
    for start in range(0, len(queries), _QUERIES):
        chunk = queries[start : start + _QUERIES]
        nearest = (F.normalize(chunk, dim=1) @ directions.T).topk(neighbours, dim=1).indices
        votes = torch.zeros(len(chunk), classes, device=train.device)
        votes.scatter_add_(1, labels[nearest], torch.ones_like(nearest, dtype=votes.dtype))
        found.append(votes.argmax(1))
    return torch.cat(found)


def logistic_classes(
    train: NDArray[np.float32], labels: NDArray[np.int64], queries: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Classes by multinomial logistic regression.

    Channels are standardised on the training vectors; the L2 penalty is scikit-learn's default (C = 1). The fit runs
    until it has converged; scikit-learn warns if that takes more than a thousand iterations.

    Args:
        train: Training vectors, shape ``(n, C)``.
        labels: Class index of each training vector, shape ``(n,)``.
        queries: Vectors to classify, shape ``(m, C)``.

    Returns:
        Class indices, shape ``(m,)``.
    """
    # Takes long to import, and a store without labels has no use for it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    return cast(NDArray[np.int64], probe.fit(train, labels).predict(queries))
