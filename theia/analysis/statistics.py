"""Pearson's correlation with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95

ROUNDING = 1e-12
"""Values that differ by less than this part of their size differ by rounding only."""

FEATURE_ROUNDING = 1e-6
"""Features, float32 at best, that vary by less than this part of their length vary by rounding only."""


@dataclass(frozen=True)
class Correlation:
    """Pearson's coefficient.

    Attributes:
        r: In ``[-1, 1]``.
        low: Lower end of its 95 % interval (Fisher's transformation); ``None`` with fewer than four points.
        high: Upper end.
        n: Points.
    """

    r: float
    low: float | None
    high: float | None
    n: int


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation | None:
    """Pearson's coefficient of paired values.

    Args:
        x: Finite values.
        y: As many.

    Returns:
        ``None`` with fewer than three points, through two of which there is always a line, or if either side is
        constant.
    """
    if len(x) < 3 or is_constant(x) or is_constant(y):
        return None
    from scipy import stats

    found = stats.pearsonr(x, y)
    r = float(found.statistic)
    if len(x) < 4:
        return Correlation(r, None, None, len(x))
    with np.errstate(divide="ignore"):  # points on a line: the interval is the coefficient alone
        low, high = found.confidence_interval(CONFIDENCE)
    return Correlation(r, float(low), float(high), len(x))


def is_constant(values: Sequence[float] | npt.NDArray[Any]) -> bool:
    """Whether all values are the same but for rounding."""
    return bool(np.ptp(values) <= ROUNDING * np.max(np.abs(values)))
