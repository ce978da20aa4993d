"""Intervals and comparisons of what was measured on the same episodes: bootstrap, permutation, Holm's correction."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_DRAWS = 2000
_PERMUTATIONS = 10_000
_EXACT = 12  # episodes up to which all sign flips are tried: 4096
_SEED = 0

Values = NDArray[np.float64]


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Paired difference to a reference.

    Attributes:
        difference: Mean difference with its 95 % interval; below zero if the error is smaller than the reference's.
        p: Two-sided p-value of a permutation test over episodes.
    """

    difference: Interval
    p: float


def interval(errors: Values, weights: Values) -> Interval:
    """Weighted mean over episodes, with an interval by bootstrap over episodes and over seeds.

    Args:
        errors: Mean error of each episode, shape ``(seeds, episodes)``.
        weights: Weight of each episode, such as its number of pairs, shape ``(episodes,)``.
    """
    return Interval(float(_mean(errors, weights)), *_percentiles(_bootstrap(errors, weights)))


def compare(errors: Values, reference: Values, weights: Values) -> Comparison:
    """Compares with a reference, episode by episode.

    Args:
        errors: Mean error of each episode, shape ``(seeds, episodes)``.
        reference: Of the reference, on the same episodes, shape ``(seeds, episodes)``.
        weights: Weight of each episode, shape ``(episodes,)``.
    """
    # Seeds of the two are not the same draw of anything, but episodes are.
    difference = errors.mean(0, keepdims=True) - reference.mean(0, keepdims=True)
    if len(errors) == len(reference):
        difference = errors - reference
    return Comparison(interval(difference, weights), sign_flip_p(difference.mean(0) * weights))


def sign_flip_p(differences: Values) -> float:
    """Two-sided p-value of a paired permutation test: the sign of each difference is flipped at random.

    Exact up to 12 differences; by 10,000 draws, of which the observed one counts as one, beyond.

    Args:
        differences: Difference of each episode, weighted, shape ``(episodes,)``.
    """
    count = len(differences)
    if count <= _EXACT:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        sums = np.abs((2 * bits - 1) @ differences)
        return float((sums >= abs(differences.sum()) * (1 - 1e-12)).mean())
    rng = np.random.default_rng(_SEED)
    sums = np.abs(rng.choice([-1.0, 1.0], (_PERMUTATIONS, count)) @ differences)
    return float((1 + (sums >= abs(differences.sum()) * (1 - 1e-12)).sum()) / (1 + _PERMUTATIONS))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for the number of comparisons.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return [float(value) for value in adjusted]


def _bootstrap(errors: Values, weights: Values) -> Values:
    rng = np.random.default_rng(_SEED)
    seeds, episodes = errors.shape
    chosen = rng.integers(episodes, size=(_DRAWS, episodes))
    of_seeds = rng.integers(seeds, size=(_DRAWS, seeds))
    counts = np.stack([np.bincount(draw, minlength=episodes) for draw in chosen]) * weights
    shares = np.stack([np.bincount(draw, minlength=seeds) for draw in of_seeds]) / seeds
    return np.asarray((counts * (shares @ errors)).sum(1) / counts.sum(1))


def _mean(errors: Values, weights: Values) -> float:
    return float((errors.mean(0) * weights).sum() / weights.sum())


def _percentiles(draws: Values) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
