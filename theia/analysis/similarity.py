"""How alike tokens are (principal components, cosine to the mean token), and how alike encoders are (CKA)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from theia.analysis.norms import Counts
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
        for_99: Components that explain 99 % of it together.
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
        device: Device of the tokens, on which they are summed up.

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


Matrix = npt.NDArray[np.float64]

MINIBATCH = 256
MIN_IMAGES = 4  # that HSIC_1 is defined for


class CKA:
    """Linear CKA between all pairs of encoders, unbiased and over minibatches; memory does not grow with the images.

    ``CKA = Σ HSIC_1(K, L) / sqrt(Σ HSIC_1(K, K) Σ HSIC_1(L, L))``, summed over minibatches, each weighted with its
    images. ``K`` and ``L`` are the products of all pairs of a minibatch's features. The estimate does not depend on the
    size of minibatches except by chance, if images come in random order; images that are sorted, by class for instance,
    must be shuffled before. An encoder has a CKA of 1 to itself and to any rotation or scaling of itself; unrelated
    ones are near 0, and may be below.

    Args:
        names: Names of the encoders.
        minibatch: Number of images of one minibatch, whatever the batches in which they arrive.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019; Nguyen et al., "Do Wide
    and Deep Networks Learn the Same Things?", 2021, equations 2 to 4; HSIC_1 by Song et al., 2012.
    """

    def __init__(self, names: list[str], minibatch: int = MINIBATCH) -> None:
        self._names = names
        self._minibatch = minibatch
        self._waiting: dict[str, Matrix] = {}
        self._products = np.zeros((len(names), len(names)))  # Σ n HSIC_1
        self._sizes = np.zeros(len(names))  # Σ n (mean squared length)²

    def update(self, features: Mapping[str, Tensor]) -> None:
        """Adds a batch.

        Args:
            features: For each encoder, one vector per image, such as the mean of its patch tokens, shape
                ``(B, C)``; widths may differ.
        """
        for name in self._names:
            rows = features[name].double().cpu().numpy()
            self._waiting[name] = np.concatenate([self._waiting[name], rows]) if name in self._waiting else rows
        while self._waiting_images >= self._minibatch:
            products, sizes = self._contribution(self._minibatch)
            self._products += products
            self._sizes += sizes
            self._waiting = {name: rows[self._minibatch :] for name, rows in self._waiting.items()}

    def compute(self) -> list[list[float | None]]:
        """CKA of all pairs so far, in the order of the names.

        The last minibatch may be smaller; of fewer than four images nothing can be said, and they are left out.

        Returns:
            A symmetric matrix; ``None`` where an encoder gives the same vector for every image, or there are fewer than
            four images.
        """
        products, sizes = self._products, self._sizes
        if self._waiting_images >= MIN_IMAGES:
            more_products, more_sizes = self._contribution(self._waiting_images)
            products, sizes = products + more_products, sizes + more_sizes
        variances = np.diag(products)
        defined = variances > FEATURE_ROUNDING**4 * sizes
        scale = np.sqrt(np.where(defined, variances, 1))
        values = np.clip(products / np.outer(scale, scale), -1, 1)
        usable = np.outer(defined, defined)
        return [
            [float(value) if good else None for value, good in zip(row, line, strict=True)]
            for row, line in zip(values, usable, strict=True)
        ]

    @property
    def _waiting_images(self) -> int:
        return len(next(iter(self._waiting.values()), ()))

    def _contribution(self, images: int) -> tuple[Matrix, Matrix]:
        """What the first of the waiting images add to products and sizes."""
        kernels, sizes = [], []
        for name in self._names:
            features = self._waiting[name][:images]
            sizes.append(images * float((features**2).sum(1).mean()) ** 2)
            centred = features - features.mean(0)  # changes nothing, but keeps digits
            kernels.append(u_centred(centred @ centred.T).ravel())
        stacked = np.stack(kernels)
        return stacked @ stacked.T / (images - 3), np.array(sizes)


def noise(images: int) -> float:
    """Standard deviation of the CKA of two unrelated encoders, whose mean is 0.

    With few images it is not small: 0.71 with 4, 0.22 with 8, 0.098 with 16, 0.022 with 64.

    Args:
        images: Number of images, at least 4 and at most one minibatch.

    Source: Székely and Rizzo, "The distance correlation t-test of independence in high dimension", 2013: there are
    ``n (n - 3) / 2`` degrees of freedom.
    """
    return math.sqrt(2 / (images * (images - 3)))


def u_centred(kernel: Matrix) -> Matrix:
    """A kernel matrix whose inner products with others of its kind are unbiased HSIC.

    ``HSIC_1(K, L) = Σ_ij A_ij B_ij / (n (n - 3))`` with the U-centred ``A`` of ``K`` and ``B`` of ``L``, which is the
    formula of Song et al. in other words.

    Args:
        kernel: Symmetric, shape ``(n, n)``, ``n >= 4``.

    Returns:
        The same shape, with zeros on the diagonal.

    Source: Székely and Rizzo, "Partial distance correlation with methods for dissimilarities", 2014, equation 3.4.
    """
    count = len(kernel)
    off = kernel - np.diag(np.diag(kernel))
    sums = off.sum(0) / (count - 2)
    centred = off - sums[:, None] - sums[None, :] + off.sum() / ((count - 1) * (count - 2))
    np.fill_diagonal(centred, 0)
    result: Matrix = centred
    return result
