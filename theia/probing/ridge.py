"""Ridge regression in closed form, streamed: features are read in pieces and only their products are kept."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

Array = NDArray[np.float64]
# Features of some samples, shape (n, P), from their places.
FeaturesOf = Callable[[NDArray[np.int64]], NDArray[np.floating]]

# Penalties, in units of the mean variance of a feature times the number of samples.
PENALTIES = tuple(10.0**power for power in range(-6, 3))
_PIECE = 2048


@dataclass(frozen=True)
class Moments:
    """Sums over samples from which a ridge regression follows; those of two sets of samples can be added."""

    samples: int
    x: Array  # (P,)
    y: Array  # (D,)
    xx: Array  # (P, P)
    xy: Array  # (P, D)
    low: Array  # (P,)
    high: Array  # (P,)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.samples + other.samples, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy,
            np.minimum(self.low, other.low), np.maximum(self.high, other.high),
        )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A fitted regression.

    Inputs are clipped to their range in training, and so are outputs: on other data a line would run off without bound.

    Attributes:
        weights: Shape ``(P, D)``.
        offset: Shape ``(D,)``.
        x_range: Smallest and largest value of each feature in training.
        y_range: Smallest and largest value of each output in training.
    """

    weights: Array
    offset: Array
    x_range: tuple[Array, Array]
    y_range: tuple[Array, Array]

    def predict(self, features: NDArray[np.floating]) -> Array:
        """Predictions, shape ``(n, D)``, for features of shape ``(n, P)``."""
        clipped = np.clip(features.astype(np.float64), *self.x_range)
        found: Array = np.clip(clipped @ self.weights + self.offset, *self.y_range)
        return found


def measure(features_of: FeaturesOf, samples: NDArray[np.int64], targets: Array) -> Moments:
    """Reads the features of samples once and sums what a ridge regression needs.

    Args:
        features_of: Gives features of samples.
        samples: Places of the samples, shape ``(n,)``.
        targets: Values to predict, shape ``(n, D)``.
    """
    total: Moments | None = None
    for piece in _pieces(len(samples)):
        x = np.asarray(features_of(samples[piece]), np.float64)
        y = targets[piece]
        part = Moments(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, x.min(0), x.max(0))
        total = part if total is None else total + part
    assert total is not None
    return total


def solve(moments: Moments, targets: Array, penalty: float) -> Line:
    """Fits ``|y - x w - b|^2 + a |w|^2`` over all samples.

    Args:
        moments: Sums over the samples.
        targets: Their targets, for the range, shape ``(n, D)``.
        penalty: In units of the mean variance of a feature times the number of samples.
    """
    x_mean, y_mean = moments.x / moments.samples, moments.y / moments.samples
    xx = moments.xx - moments.samples * np.outer(x_mean, x_mean)
    xy = moments.xy - moments.samples * np.outer(x_mean, y_mean)
    scale = np.trace(xx) / len(xx)
    # Features that are all constant predict the mean.
    absolute = penalty * scale if scale > 0 else 1.0
    xx[np.diag_indices_from(xx)] += absolute
    weights: Array = cho_solve(cho_factor(xx, overwrite_a=True), xy)
    return Line(weights, y_mean - x_mean @ weights, (moments.low, moments.high), (targets.min(0), targets.max(0)))


def absolute_penalty(moments: Moments, penalty: float) -> float:
    """The penalty ``a`` itself, as other libraries count it."""
    x_mean = moments.x / moments.samples
    return penalty * float(np.trace(moments.xx) - moments.samples * (x_mean @ x_mean)) / len(x_mean)


def fit(
    features_of: FeaturesOf, samples: NDArray[np.int64], targets: Array, checked: NDArray[np.bool_]
) -> tuple[Line, float]:
    """Fits a regression whose penalty is the best on some of the samples, which are then fitted, too.

    Args:
        features_of: Gives features of samples.
        samples: Places of the samples, shape ``(n,)``.
        targets: Values to predict, shape ``(n, D)``.
        checked: Which samples choose the penalty, shape ``(n,)``; whole episodes. Without any, the middle penalty
            is taken.

    Returns:
        The regression on all samples, and its penalty.
    """
    if not checked.any() or checked.all():
        moments = measure(features_of, samples, targets)
        penalty = PENALTIES[len(PENALTIES) // 2]
        return solve(moments, targets, penalty), penalty
    fitted = measure(features_of, samples[~checked], targets[~checked])
    lines = [solve(fitted, targets[~checked], penalty) for penalty in PENALTIES]
    errors = np.zeros(len(lines))
    for piece in _pieces(int(checked.sum())):
        x, y = features_of(samples[checked][piece]), targets[checked][piece]
        errors += [float(np.abs(line.predict(x) - y).sum()) for line in lines]
    penalty = PENALTIES[int(np.argmin(errors))]
    both = fitted + measure(features_of, samples[checked], targets[checked])
    return solve(both, targets, penalty), penalty


def predict(line: Line, features_of: FeaturesOf, samples: NDArray[np.int64]) -> Array:
    """Predictions for samples, shape ``(n, D)``."""
    return np.concatenate([line.predict(features_of(samples[piece])) for piece in _pieces(len(samples))])


def _pieces(count: int) -> Iterator[slice]:
    for start in range(0, count, _PIECE):
        yield slice(start, start + _PIECE)
