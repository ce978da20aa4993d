"""How alike the tokens of an image are: their cosine to the image's mean token."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from theia.analysis.entropy import Counts

COSINE_BINS = 200  # of [-1, 1]


@dataclass(frozen=True)
class SimilarityFigures:
    """Cosine of patch tokens to the mean token of their image.

    Attributes:
        mean: Mean over images of the mean over an image's tokens; 1 if all tokens of an image are the same. ``None`` if
            no token has a direction.
        std: Standard deviation over images; ``None`` with fewer than two.
        counts: Tokens in each of 200 equal bins of ``[-1, 1]``, over all images.
        without_direction: Tokens left out because they, or the mean of their image, are 0.
    """

    mean: float | None
    std: float | None
    counts: Counts
    without_direction: int


class SimilarityToMean:
    """Collects cosines batch by batch; memory does not grow with the images.

    Source: Theia, appendix G, figure 16.
    """

    def __init__(self) -> None:
        self._images = self._left_out = 0
        self._mean = self._squares = 0.0  # Welford: the mean, and the sum of squared distances to it
        self._counts = np.zeros(COSINE_BINS, np.int64)

    def update(self, patches: Tensor) -> None:
        """Adds patch tokens of shape ``(B, N, C)``."""
        tokens = patches.double()
        mean = tokens.mean(1, keepdim=True)
        lengths = tokens.norm(dim=2) * mean.norm(dim=2)  # (B, N)
        cosines = ((tokens * mean).sum(2) / lengths.clamp(min=1e-300)).clamp(-1, 1)
        directed = lengths > 0
        bins = ((cosines + 1) * (COSINE_BINS / 2)).clamp(max=COSINE_BINS - 1).long()
        self._counts += torch.bincount(bins[directed], minlength=COSINE_BINS).cpu().numpy()
        self._left_out += int((~directed).sum())
        shares = directed.sum(1)
        of_images = (cosines * directed).sum(1)[shares > 0] / shares[shares > 0]
        for value in of_images.tolist():
            self._images += 1
            distance = value - self._mean
            self._mean += distance / self._images
            self._squares += distance * (value - self._mean)

    def compute(self) -> SimilarityFigures:
        """The figures so far."""
        mean = self._mean if self._images else None
        std = math.sqrt(self._squares / (self._images - 1)) if self._images > 1 else None
        return SimilarityFigures(mean, std, self._counts, self._left_out)
