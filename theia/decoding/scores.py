"""How far what a student shows is from what its teacher shows: 1 image, closed forms."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

Array = npt.NDArray[Any]


def depth_error(prediction: Array, target: Array) -> float:
    """Scale- and shift-invariant error of a depth map.

    The prediction ``d`` is fitted to the target ``t`` by least squares over all pixels, ``min (s d + b - t)^2`` with
    ``s >= 0``, and what remains is given as root mean square over the target's standard deviation. In closed form that
    is ``sqrt(1 - r^2)`` with Pearson's correlation ``r``, or 1 where ``r < 0``: near and far must not be exchanged.

    Args:
        prediction: Shape ``(H, W)``, any scale and shift.
        target: Same shape.

    Returns:
        0 for equal up to scale and shift, 1 for no better than a constant; NaN if the target is constant.

    Source: alignment of Ranftl et al., "Towards Robust Monocular Depth Estimation" (MiDaS), 2020, eq. (5).
    """
    d, t = (np.asarray(each, np.float64) - np.mean(each, dtype=np.float64) for each in (prediction, target))
    if not t.any() or np.ptp(target) == 0:
        return math.nan
    if np.ptp(prediction) == 0:
        return 1.0
    correlation = float((d * t).sum() / math.sqrt((d * d).sum() * (t * t).sum()))
    return math.sqrt(max(0.0, 1 - max(0.0, correlation) ** 2))


def mask_iou(prediction: Array, target: Array) -> float:
    """Mean intersection over union of masks in their best one-to-one matching.

    Masks are matched so that the sum of IoUs is largest (Hungarian method); it is divided by the larger of the two
    counts: a mask without a partner, missing or surplus, counts as 0.

    Args:
        prediction: bool, shape ``(M, H, W)``.
        target: bool, shape ``(K, H, W)``.

    Returns:
        From 0 to 1; NaN if there are no masks at all.
    """
    if not len(prediction) and not len(target):
        return math.nan
    if not len(prediction) or not len(target):
        return 0.0
    a, b = (np.asarray(each, np.float32).reshape(len(each), -1) for each in (prediction, target))
    intersection = (a @ b.T).astype(np.float64)
    union = a.sum(1, dtype=np.float64)[:, None] + b.sum(1, dtype=np.float64) - intersection
    iou = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    rows, columns = linear_sum_assignment(iou, maximize=True)
    return float(iou[rows, columns].sum() / max(len(a), len(b)))


def feature_cosine(prediction: Array, target: Array) -> float:
    """Cosine between two whole feature maps, each flattened, as the training loss has it.

    Args:
        prediction: Normalised features, shape ``(N, C)``.
        target: Same shape.

    Returns:
        From -1 to 1; NaN if one is all zero.
    """
    a, b = (np.asarray(each, np.float64).ravel() for each in (prediction, target))
    norms = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / norms if norms else math.nan
