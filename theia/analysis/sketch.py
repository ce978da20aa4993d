"""Norms in units of their own median, of which there is no telling before the last image has been seen."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from theia.analysis.entropy import Counts, entropy
from theia.training.metrics import NORM_BINS, NORM_RANGE

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
            the features, as that of :class:`~theia.analysis.entropy.EntropyFigures` does; ``None`` if the median is 0.
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
            norms: As :meth:`theia.analysis.entropy.EntropyOfNorms.update`.
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
