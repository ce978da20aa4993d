"""Norm entropy: its value, how it depends on the bins, and how far other images might move it."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from theia.training.metrics import NORM_BINS, NORM_RANGE

# Odd numbers of pairs: each puts a norm of 1, that of a token straight out of a layer norm, into the middle of a bin.
BIN_COUNTS = (50, 150, NORM_BINS, 750, 1250)
REPLICATES = 500
CONFIDENCE = 0.95
_FINE = 3750  # bins of which every one of BIN_COUNTS is made

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EntropyFigures:
    """Entropy of the distribution of patch-token norms, in nats.

    Attributes:
        value: As :class:`theia.training.metrics.NormEntropy`: 250 bins of ``norm / sqrt(width)`` over ``[0, 4)``.
        low: Lower end of the 95 % interval over images; ``None`` for a single image.
        high: Upper end.
        by_bins: The same entropy with other numbers of bins over the same range.
        beyond: Share of tokens whose norm lies beyond the range. They count in the last bin: where this is not small,
            the entropy says little, and only that of norms relative to their median compares.
        counts: Tokens in each of the 250 bins.
    """

    value: float
    low: float | None
    high: float | None
    by_bins: dict[int, float]
    beyond: float
    counts: Counts


class EntropyOfNorms:
    """Collects histograms of norms batch by batch; memory does not grow with the images.

    The interval is that of a Poisson bootstrap: in each of 500 replicates every image counts as often as a Poisson
    variable of mean 1 says, so that a stream can be resampled as it passes. An image's tokens stay together. Resampled
    histograms are rougher than the one they come from and have less entropy, so the replicates are moved to have the
    value as their mean. The interval says how the value would vary over other image sets of this size.

    Args:
        seed: Seed of the bootstrap: encoders with the same seed see the same resampled images.

    Source: Theia, section 5 and appendix G; Hanley and MacGibbon, "Creating non-parametric bootstrap samples using
    Poisson frequencies", 2006.
    """

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._counts = np.zeros(NORM_BINS, np.int64)
        self._fine = np.zeros(_FINE, np.int64)
        self._replicates = np.zeros((REPLICATES, NORM_BINS), np.int64)
        self._beyond = self._images = 0

    def update(self, norms: Tensor) -> None:
        """Adds a batch.

        Args:
            norms: L2 norms of patch tokens divided by the root of their width, finite, shape ``(B, N)``.
        """
        histograms = _histograms(norms, NORM_BINS)
        self._counts += histograms.sum(0)
        self._fine += _histograms(norms.reshape(1, -1), _FINE)[0]
        # One row of draws per image, so that the size of a batch changes nothing.
        weights = self._rng.poisson(1.0, (len(norms), REPLICATES)).astype(np.float64)
        # float64 counts exactly up to 2^53, and multiplies matrices a hundred times faster than int64.
        self._replicates += (weights.T @ histograms).astype(np.int64)
        self._beyond += int((norms >= NORM_RANGE).sum())
        self._images += len(norms)

    def compute(self) -> EntropyFigures:
        """The figures so far; at least one image must have been added."""
        value = entropy(self._counts)
        low = high = None
        if self._images > 1:
            resampled = np.array([entropy(row) for row in self._replicates if row.any()])
            centred = resampled - resampled.mean() + value
            tail = (1 - CONFIDENCE) / 2
            low, high = (max(0.0, float(end)) for end in np.quantile(centred, (tail, 1 - tail)))
        by_bins = {bins: entropy(self._fine.reshape(bins, -1).sum(1)) for bins in BIN_COUNTS} | {NORM_BINS: value}
        beyond = self._beyond / int(self._counts.sum())
        return EntropyFigures(value, low, high, by_bins, beyond, self._counts.copy())


def entropy(counts: npt.NDArray[np.integer]) -> float:
    """``-Σ p log p`` of the shares ``p`` of counts, in nats.

    Args:
        counts: Counts, not all 0; empty bins add nothing.
    """
    shares = counts[counts > 0] / counts.sum()
    return float(max(0.0, -(shares * np.log(shares)).sum()))


def _histograms(norms: Tensor, count: int) -> Counts:
    """Histogram of each row, shape ``(B, count)``."""
    bins = (norms * (count / NORM_RANGE)).clamp(max=count - 1).long()
    places = bins + count * torch.arange(len(norms), device=norms.device)[:, None]
    counts: Counts = torch.bincount(places.flatten(), minlength=count * len(norms)).cpu().numpy()
    return counts.reshape(len(norms), count)


# How many medians long a token must be to count as an outlier.
OUTLIER_FACTOR = 3.0

_STEP = 5e-4  # of the natural logarithm: the precision of every quantile
_LOWEST, _HIGHEST = math.log(1e-8), math.log(1e8)
_BINS = math.ceil((_HIGHEST - _LOWEST) / _STEP)


@dataclass(frozen=True)
class RelativeNorms:
    """Norms in units of the encoder's own median norm, to a relative precision of 0.05 %.

    Attributes:
        median: Median of ``norm / sqrt(width)`` over all tokens of all images.
        entropy: Entropy of 250 bins of ``norm / median`` over ``[0, 4)``, in nats. It does not depend on the scale of
            the features, as that of :class:`~theia.analysis.norms.EntropyFigures` does; ``None`` if the median is 0.
        outliers: Share of tokens with ``norm > 3 median``; ``None`` if the median is 0.
        counts: Tokens in each of the 250 bins; ``None`` if the median is 0.
    """

    median: float
    entropy: float | None
    outliers: float | None
    counts: Counts | None


class NormSketch:
    """Counts norms in 73,683 bins of equal width in the logarithm; memory does not grow with the images.

    High-norm tokens on patches that show little are what Darcet et al. call artifacts. They cut DINOv2-g's norms at a
    fixed 150; a multiple of the median takes any encoder.

    Source: Darcet et al., "Vision Transformers Need Registers", 2024, section 2.1; the bins are those of Masson et al.,
    "DDSketch", 2019.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS, np.int64)

    def update(self, norms: Tensor) -> None:
        """Adds a batch.

        Args:
            norms: Norms as for :meth:`theia.analysis.norms.EntropyOfNorms.update`.
        """
        places = ((norms.double().log() - _LOWEST) / _STEP).clamp(0, _BINS - 1).long()
        self._counts += torch.bincount(places.flatten(), minlength=_BINS).cpu().numpy()

    def compute(self) -> RelativeNorms:
        """The figures so far; at least one image must have been added."""
        total = int(self._counts.sum())
        middle = int(np.searchsorted(np.cumsum(self._counts), (total + 1) // 2))
        centres = _centres()
        median = float(centres[middle])
        if median == 0:
            return RelativeNorms(0.0, None, None, None)
        relative = centres / median
        bins = np.minimum(relative * (NORM_BINS / NORM_RANGE), NORM_BINS - 1).astype(np.int64)
        counts = np.zeros(NORM_BINS, np.int64)
        np.add.at(counts, bins, self._counts)
        outliers = int(self._counts[relative > OUTLIER_FACTOR].sum()) / total
        return RelativeNorms(median, entropy(counts), outliers, counts)


def _centres() -> npt.NDArray[np.float64]:
    centres: npt.NDArray[np.float64] = np.exp(_LOWEST + _STEP * (np.arange(_BINS) + 0.5))
    centres[0] = 0  # what is shorter than 1e-8 has no length
    return centres
