"""Classes by nearest neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 256  # queries at a time


def nearest_classes(train: Tensor, labels: Tensor, queries: Tensor, neighbours: int) -> Tensor:
    """The class that most of the nearest training vectors have.

    The vectors of greatest cosine have one vote each, whatever their cosine; of classes with as many votes the first
    wins. The protocol of :mod:`theia.scoring.classification`; nothing in it is chosen by the score.

    Args:
        train: Shape ``(n, C)``.
        labels: Class index of each, int64, shape ``(n,)``.
        queries: Shape ``(m, C)``.
        neighbours: How many vote, at most ``n``.

    Returns:
        Class indices, shape ``(m,)``.
    """
    directions = F.normalize(train, dim=1)
    classes = int(labels.max()) + 1
    found = []
    for start in range(0, len(queries), _CHUNK):
        chunk = queries[start : start + _CHUNK]
        nearest = (F.normalize(chunk, dim=1) @ directions.T).topk(neighbours, dim=1).indices
        votes = torch.zeros(len(chunk), classes, device=train.device)
        votes.scatter_add_(1, labels[nearest], torch.ones_like(nearest, dtype=votes.dtype))
        found.append(votes.argmax(1))
    return torch.cat(found)
