"""How well classes of pixels are told, from one confusion matrix over all images."""

import torch
from torch import Tensor

IGNORED = 255  # label of pixels that do not count


def confusion(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """Counts pixels by true class (rows) and predicted class (columns).

    Args:
        prediction: Class indices, any shape.
        target: The same shape; pixels of 255 are left out.
        classes: How many there are.

    Returns:
        int64, shape ``(classes, classes)``.
    """
    valid = target != IGNORED
    pairs = target[valid].long() * classes + prediction[valid].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """Mean over classes of intersection over union, of all pixels of all images together.

    A class that occurs neither in the truth nor in the prediction is left out of the mean.

    Args:
        counts: Confusion matrix, shape ``(classes, classes)``.

    Source: Everingham et al., "The PASCAL Visual Object Classes Challenge", 2015, section 3.
    """
    intersection = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - intersection
    return float((intersection[union > 0] / union[union > 0]).mean())


def pixel_accuracy(counts: Tensor) -> float:
    """Share of pixels that have their true class.

    Args:
        counts: Confusion matrix, shape ``(classes, classes)``.
    """
    return float(counts.diagonal().sum() / counts.sum())
