"""Metrics of distillation. Their states are sums, so they are correct on any number of processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.regression import ExplainedVariance

from theia.training.losses import cosine_loss, mse_loss, smooth_l1_loss

# The paper gives neither the bins nor the range of its norm entropy. Norms are divided by the square root of the width,
# so that students of different widths can be compared. A token straight out of a layer norm then has norm 1, which is
# the middle of a bin and not an edge, where rounding would decide.
NORM_BINS = 250
NORM_RANGE = 4.0

_LEAST_VARIANCE = 1e-3  # of a normalised channel


class SampleMean(Metric):
    """The mean over all samples of a score that a function gives as the mean over a batch.

    Args:
        score: Function ``(prediction, target) -> scalar`` of two tensors of shape ``(B, ...)``.
        kwargs: Options of torchmetrics' ``Metric``.
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
        """Adds a batch of shape ``(B, ...)``."""
        self.total = self.total + self.score(prediction, target).detach() * len(target)
        self.samples = self.samples + len(target)

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.samples


class TokenExplainedVariance(ExplainedVariance):
    """Explained variance of every channel over all tokens, averaged over the channels that vary.

    A perfect prediction has 1; the best constant has 0. A channel that the teacher hardly uses may be still in all the
    images that are scored. Where its variance is below a thousandth of that in training, which is 1, it is left out:
    a share of next to nothing may be any number.

    Args:
        kwargs: Options of torchmetrics' ``Metric``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(multioutput="raw_values", **kwargs)

    def compute(self) -> Tensor:
        """The mean over channels so far; 0 if none varies."""
        variance = self.sum_squared_target / self.num_obs - (self.sum_target / self.num_obs).square()
        varies = variance > _LEAST_VARIANCE
        scores = torch.where(varies, torch.as_tensor(super().compute()), 0)
        return scores.sum() / varies.sum().clamp(min=1)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds a batch of shape ``(B, N, C)``, or ``(B, C)`` for CLS tokens."""
        super().update(prediction.detach().float().flatten(0, -2), target.float().flatten(0, -2))


class NormEntropy(Metric):
    """Entropy of the distribution of patch-token norms, ``H = -Σ p log p``, in nats.

    ``p`` is the share of tokens in each of 250 equal bins of ``norm / sqrt(width)`` over ``[0, 4)``; larger norms
    count in the last bin. Values are comparable only between models and image sets measured with the
    same bins.

    Source: Theia, section 5 and appendix G, which do not state the bins.
    """

    full_state_update = False
    counts: Tensor  # (NORM_BINS,), number of tokens

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(NORM_BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, patches: Tensor) -> None:
        """Adds patch tokens of shape ``(B, N, C)``."""
        norms = patches.detach().float().norm(dim=-1).flatten() / patches.shape[-1] ** 0.5
        bins = (norms * (NORM_BINS / NORM_RANGE)).clamp(max=NORM_BINS - 1).long()
        bins = bins.clamp(min=0)  # for NaN too: an index out of range would break the device
        self.counts = self.counts.scatter_add(0, bins, torch.ones_like(bins))

    def compute(self) -> Tensor:
        """The entropy so far, between 0 and ``log(250)``."""
        shares = self.counts / self.counts.sum()
        entropy: Tensor = torch.special.entr(shares).sum()
        return entropy


def feature_metrics(stage: str, teacher: str, *, alone: bool = False) -> MetricCollection:
    """Metrics of one teacher, on normalised features: cosine, smooth_l1, mse, explained_variance.

    All take ``(prediction, target)`` of shape ``(B, N, C)``. The cosine is taken over each sample's whole flattened
    feature map.

    Args:
        stage: First part of the logged name, such as ``"val"``.
        teacher: Last part of the logged name, the name of the teacher.
        alone: Whether only this process computes the metrics. Merging would wait for the other processes for ever.

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
    # Compute groups would merge metrics whose states happen to be equal after the first batch, such as two losses of 0.
    return MetricCollection(metrics, prefix=f"{stage}/", postfix=f"/{teacher}", compute_groups=False)


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return 1 - cosine_loss(prediction, target)
