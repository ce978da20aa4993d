"""Means and paired differences over a few seeds, each with its 95 % interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.

    Attributes:
        mean: Mean of the values, in their unit.
        low: Lower end of the 95 % interval of the mean; ``None`` for a single value, which says nothing about its own
            spread.
        high: Upper end of the interval.
        n: Number of values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval, which is symmetric."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean of differences, over the seeds that two rows have in common.

    Attributes:
        p: P value of the two-sided paired t test; ``None`` where it is not defined: with one common seed, or if all
            differences are equal.
    """

    p: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of some values, with Student's t interval.

    Args:
        values: Finite values, one per run, at least one.

    Returns:
        The mean, without an interval if there is one value, and with an interval of width 0 if all are equal.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, None, None, len(values))
    from scipy import stats

    error = 0.0 if is_constant(values) else float(np.std(values, ddof=1)) / len(values) ** 0.5
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return Estimate(mean, mean - half_width, mean + half_width, len(values))


def paired_difference(values: Mapping[int | None, float], reference: Mapping[int | None, float]) -> Difference | None:
    """Mean difference between a row and a reference, seed by seed.

    Runs of one seed share the order of samples and the initial weights, so their differences spread less than the
    runs do.

    Args:
        values: Finite values of the row, by seed.
        reference: Finite values of the reference, by seed.

    Returns:
        The mean of ``values - reference`` over common seeds, or ``None`` if there are none.
    """
    common = [seed for seed in values if seed in reference]
    if not common:
        return None
    ours, theirs = [values[seed] for seed in common], [reference[seed] for seed in common]
    differences = np.subtract(ours, theirs)
    size = float(np.max(np.abs([ours, theirs])))
    if np.ptp(differences) <= ROUNDING * size:
        # The t statistic would be 0/0 or infinite, or any number if rounding alone made the values differ.
        differences = np.full(len(common), differences.mean())
    found = estimate(differences.tolist())
    p = None
    if len(common) > 1 and not is_constant(differences):
        from scipy import stats

        p = float(stats.ttest_rel(ours, theirs).pvalue)
    return Difference(found.mean, found.low, found.high, found.n, p)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Corrects p values for the number of tests, so that the chance of even one false difference is that of one test.

    Args:
        p: P values of the tests, by name.

    Returns:
        Corrected p values under the same names, in ``[0, 1]``.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected: dict[str, float] = {}
    least = 0.0
    for place, name in enumerate(sorted(p, key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - place) * p[name]))
        corrected[name] = least
    return corrected


CONFIDENCE = 0.95

ROUNDING = 1e-12
"""Values that differ by less than this part of their size differ by rounding only."""

FEATURE_ROUNDING = 1e-6
"""Features, float32 at best, that vary by less than this part of their length vary by rounding only."""


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation coefficient.

    Attributes:
        r: Coefficient, in ``[-1, 1]``.
        low: Lower end of the 95 % interval of ``r`` (Fisher's transformation); ``None`` with fewer than four points.
        high: Upper end of the interval.
        n: Number of points.
    """

    r: float
    low: float | None
    high: float | None
    n: int


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation | None:
    """Pearson's correlation coefficient of paired values.

    Args:
        x: Finite values of one quantity.
        y: Finite values of the other quantity, as many as in ``x``.

    Returns:
        The coefficient; ``None`` if either side is constant, or with fewer than three points, since two always lie on a
        line.
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
    """Whether all values are the same, apart from rounding."""
    return bool(np.ptp(values) <= ROUNDING * np.max(np.abs(values)))


_DRAWS = 2000
_FLIPS = 10_000


def over_episodes(
    errors: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], parts: Sequence[Any] | None = None
) -> Estimate:
    """Weighted mean over episodes, with a bootstrap interval over episodes and seeds.

    The frames of an episode are alike, and so are its errors: it is drawn as a whole.

    Args:
        errors: Mean error of each episode, shape ``(seeds, episodes)``.
        weights: Weight of each episode, such as its number of samples, shape ``(episodes,)``.
        parts: Part that each episode belongs to, such as a task that was chosen and not drawn: how much the parts
            differ does not widen the interval. By default, all are of one.
    """
    rng = np.random.default_rng(0)
    seeds, episodes = errors.shape
    _, labels = np.unique(np.zeros(episodes) if parts is None else parts, return_inverse=True)
    counts = np.empty((_DRAWS, episodes))
    for part in range(labels.max() + 1):
        places = np.flatnonzero(labels == part)
        counts[:, places] = rng.multinomial(len(places), np.full(len(places), 1 / len(places)), _DRAWS)
    counts *= weights
    shares = rng.multinomial(seeds, np.full(seeds, 1 / seeds), _DRAWS) / seeds
    draws = (counts * (shares @ errors)).sum(1) / counts.sum(1)
    low, high = np.percentile(draws, [50 - 50 * CONFIDENCE, 50 + 50 * CONFIDENCE])
    return Estimate(float(np.average(errors.mean(0), weights=weights)), float(low), float(high), episodes)


def paired_over_episodes(
    errors: npt.NDArray[np.float64],
    reference: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    parts: Sequence[Any] | None = None,
) -> Difference:
    """Difference from a reference on the same episodes.

    Args:
        errors: Mean error of each episode, shape ``(seeds, episodes)``.
        reference: The reference's, on the same episodes, with as many seeds. What nothing is random in has one seed.
        weights: Weight of each episode, shape ``(episodes,)``.
        parts: See :func:`over_episodes`.

    Returns:
        The mean of ``errors - reference``, with a bootstrap interval, and the p value of the two-sided test that flips
        the signs of the episodes' differences (exact for up to 13 episodes).
    """
    from scipy import stats

    differences = errors - reference
    found = over_episodes(differences, weights, parts)
    of_episodes = (differences.mean(0) * weights,)
    p = 1.0  # of differences that are all zero, or of one
    if len(weights) > 1:
        p = stats.permutation_test(
            of_episodes, np.sum, permutation_type="samples", n_resamples=_FLIPS, random_state=0
        ).pvalue
    return Difference(found.mean, found.low, found.high, found.n, float(p))
