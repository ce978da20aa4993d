"""Metrics of distillation, right on any number of processes: their states are sums."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.regression import ExplainedVariance

from theia.training.losses import cosine_loss, mse_loss, smooth_l1_loss

# The paper gives neither the bins nor the range of its norm entropy. Norms are divided by the root of the
# width, so that widths can be compared; a token straight out of a layer norm then has norm 1, the middle of a
# bin, not an edge on which rounding would decide.
NORM_BINS = 250
NORM_RANGE = 4.0


class SampleMean(Metric):
    """The mean over samples of a score that a function gives as the mean of a batch.

    Args:
        score: ``(prediction, target) -> scalar``, both of shape ``(B, ...)``.
        kwargs: Of torchmetrics' ``Metric``.
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.score = score
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds a batch."""
        self.total = self.total + self.score(prediction, target).detach() * len(target)
        self.samples = self.samples + len(target)

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.samples


class TokenExplainedVariance(ExplainedVariance):
    """Explained variance of every channel over all tokens, averaged over channels.

    1 is a perfect prediction; 0 is what a constant achieves.
    """

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds a batch of shape ``(B, N, C)``, or ``(B, C)`` for CLS tokens."""
        super().update(prediction.detach().float().flatten(0, -2), target.float().flatten(0, -2))


class NormEntropy(Metric):
    """Entropy of the distribution of patch-token norms, ``H = -Σ p log p``, in nats.

    ``p`` is the share of tokens in each of 250 equal bins of ``norm / sqrt(width)`` over ``[0, 4)``; norms
    beyond count in the last bin. Values are comparable only between models and image sets measured with the
    same bins.

    Source: Theia, section 5 and appendix G, without its bins, which it does not state.
    """

    full_state_update = False
    counts: Tensor  # (NORM_BINS,), tokens

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(NORM_BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, patches: Tensor) -> None:
        """Adds patch tokens of shape ``(B, N, C)``."""
        norms = patches.detach().float().norm(dim=-1).flatten() / patches.shape[-1] ** 0.5
        bins = (norms * (NORM_BINS / NORM_RANGE)).clamp(max=NORM_BINS - 1).long()
        bins = bins.clamp(min=0)  # of a NaN too: an index out of range would take the device down
        self.counts = self.counts.scatter_add(0, bins, torch.ones_like(bins))

    def compute(self) -> Tensor:
        """The entropy so far, between 0 and ``log(250)``."""
        shares = self.counts / self.counts.sum()
        entropy: Tensor = torch.special.entr(shares).sum()
        return entropy


def feature_metrics(stage: str, teacher: str, *, alone: bool = False) -> MetricCollection:
    """Metrics of one teacher, on normalised features: cosine, smooth_l1, mse, explained_variance.

    All take ``(prediction, target)`` of shape ``(B, N, C)``. The cosine is that of each sample's whole
    flattened map.

    Args:
        stage: First part of the logged name, such as ``"val"``.
        teacher: Last part.
        alone: Whether only this process has them: merging with the others would wait for them for ever.

    Returns:
        A collection whose results are named ``stage/metric/teacher``.
    """
    options: dict[str, Any] = {"sync_on_compute": not alone}
    metrics: dict[str, Metric | MetricCollection] = {
        "cosine": SampleMean(_cosine, **options),
        "smooth_l1": SampleMean(smooth_l1_loss, **options),
        "mse": SampleMean(mse_loss, **options),
        "explained_variance": TokenExplainedVariance(**options),
    }
    # Compute groups merge metrics whose states happen to be equal after the first batch, as two losses of 0
    # are.
    return MetricCollection(metrics, prefix=f"{stage}/", postfix=f"/{teacher}", compute_groups=False)


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return 1 - cosine_loss(prediction, target)
