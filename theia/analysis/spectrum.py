"""PCA of all tokens of all images: which share of their variance the first components explain."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from theia.utils.estimates import FEATURE_ROUNDING

# What is left of a component without variance, as a part of the largest, by rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class SpectrumFigures:
    """Explained-variance ratio of the principal components.

    Attributes:
        ratio: Share of the variance that each component explains, from the largest, shape ``(C,)``, sum 1. With fewer
            tokens than channels the last ones are 0. ``None`` if all tokens are the same but for rounding.
        area: Area below the cumulative curve over the share of components, from (0, 0) to (1, 1), by the trapezoid
            rule: 0.5 if all components are alike, ``1 - 1 / (2 C)`` if there is but one. A low one says that variance
            is spread over many components.
        for_90: Components that explain 90 % of the variance together.
        for_99: Likewise 99 %.
    """

    ratio: npt.NDArray[np.float64] | None
    area: float | None
    for_90: int | None
    for_99: int | None

    @property
    def cumulative(self) -> npt.NDArray[np.float64] | None:
        """Share that the first ``k`` components explain, ``k`` from 0, shape ``(C + 1,)``."""
        return None if self.ratio is None else np.concatenate([[0.0], np.cumsum(self.ratio)])


class Spectrum:
    """Collects the covariance of tokens in float64: exact, and of the size of one covariance matrix.

    Args:
        channels: Width ``C`` of a token.
        device: Where the tokens are; they are summed up there.

    Source: Theia, appendix G, figures 15 and 16; the area's scale is ours, since the paper gives none.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self._tokens = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def update(self, patches: Tensor) -> None:
        """Adds patch tokens of shape ``(B, N, C)``."""
        tokens = patches.flatten(0, 1).double()
        if self._shift is None:
            # Any constant gives the same covariance. A token is near the mean, which keeps digits, and is exact where
            # all tokens are the same.
            self._shift = tokens[0].clone()
        centred = tokens - self._shift
        self._tokens += len(tokens)
        self._sum += centred.sum(0)
        self._products.addmm_(centred.T, centred)

    def compute(self) -> SpectrumFigures:
        """The figures so far; at least one image must have been added."""
        mean = self._sum / self._tokens
        covariance = (self._products / self._tokens - torch.outer(mean, mean)).cpu().numpy()
        variances = np.linalg.eigvalsh(covariance)[::-1]
        length = 0.0 if self._shift is None else float((self._shift + mean).square().sum())  # squared, of the mean
        if variances[0] <= 0 or variances.sum() <= FEATURE_ROUNDING**2 * length:
            return SpectrumFigures(None, None, None, None)
        variances = np.where(variances > _ROUNDING * variances[0], variances, 0.0)
        ratio = variances / variances.sum()
        cumulative = np.concatenate([[0.0], np.cumsum(ratio)])
        area = float((cumulative[1:] + cumulative[:-1]).mean() / 2)
        for_90, for_99 = (int(np.argmax(cumulative >= share)) for share in (0.9, 0.99))
        return SpectrumFigures(ratio, area, for_90, for_99)
