"""What heads are asked for: depth, surface normals, classes of pixels."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.probing.depth_metrics import LEAST_DEPTH, depth_metrics
from benchmarks.probing.normal_metrics import known, normal_metrics
from benchmarks.probing.segmentation_metrics import IGNORED, confusion, mean_iou, pixel_accuracy

MAX_DEPTH = 10.0  # metres: what is farther counts as not known

_BINS = 256
_BIN_FLOOR = 0.1
_SIGNED = 0.85  # how much a common factor of depth is forgiven in training
_NOISE = 1e-3
_STEEPEST = 1e-4  # the arccosine's slope is endless at 1


class HeadTask(Protocol):
    """One kind of map. Targets are ``(B, ..., S, S)``, a head's maps ``(B, channels, h, w)``."""

    channels: int

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """What training makes small; a scalar."""

    def measure(self, maps: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Figures of a batch that :meth:`summarise` takes together."""

    def summarise(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Figures of all batches."""


class DepthTask:
    """Depth in metres, of 256 bins from 1 mm to 10 m of equal width.

    The head gives each bin a weight (ReLU, plus 0.1, divided by their sum); depth is the weighted mean of bins. The
    loss is that of AdaBins on the logarithm, times 10; probe3D adds half a loss of gradients, which is left out here.

    Source: probe3D, ``DepthBinPrediction`` and ``sig_loss``; Bhat et al., "AdaBins", 2021.
    """

    channels = _BINS

    def predict(self, maps: Tensor, size: int) -> Tensor:
        """Metres, ``(B, 256, h, w)`` to ``(B, S, S)``."""
        weights = maps.relu() + _BIN_FLOOR
        bins = torch.linspace(LEAST_DEPTH, MAX_DEPTH, _BINS, device=maps.device)
        depth = torch.einsum("bkhw,k->bhw", weights, bins) / weights.sum(1)
        return F.interpolate(depth[:, None], (size, size), mode="bilinear")[:, 0]

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """See :class:`HeadTask`."""
        valid = (target > 0) & (target <= MAX_DEPTH)
        if not valid.any():
            return maps.sum() * 0
        depth = self.predict(maps, target.shape[-1])
        difference = (depth[valid] + _NOISE).log() - (target[valid] + _NOISE).log()
        # Never below zero but for rounding, where the root has no slope.
        return 10 * (difference.square().mean() - _SIGNED * difference.mean().square()).clamp(min=1e-12).sqrt()

    def measure(self, maps: Tensor, target: Tensor) -> dict[str, Tensor]:
        """See :class:`HeadTask`."""
        return depth_metrics(self.predict(maps, target.shape[-1]), torch.where(target <= MAX_DEPTH, target, 0.0))

    def summarise(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """See :class:`HeadTask`."""
        return _mean_over_images(batches)


class NormalTask:
    """Surface normals: three numbers of any length; the loss is the angle (probe3D's without its uncertainty)."""

    channels = 3

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """See :class:`HeadTask`."""
        valid = known(target)
        if not valid.any():
            return maps.sum() * 0
        cosine = F.cosine_similarity(_enlarge(maps, target), target, dim=1)[valid]
        return cosine.clamp(-1 + _STEEPEST, 1 - _STEEPEST).acos().mean()

    def measure(self, maps: Tensor, target: Tensor) -> dict[str, Tensor]:
        """See :class:`HeadTask`."""
        return normal_metrics(_enlarge(maps, target), target)

    def summarise(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """See :class:`HeadTask`."""
        return _mean_over_images(batches)


class SegmentationTask:
    """Classes of pixels, with cross-entropy.

    Args:
        classes: How many.
    """

    def __init__(self, classes: int) -> None:
        self.channels = classes

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """See :class:`HeadTask`."""
        if bool((target == IGNORED).all()):
            return maps.sum() * 0
        return F.cross_entropy(_enlarge(maps, target), target.long(), ignore_index=IGNORED)

    def measure(self, maps: Tensor, target: Tensor) -> dict[str, Tensor]:
        """See :class:`HeadTask`."""
        return {"confusion": confusion(_enlarge(maps, target).argmax(1), target, self.channels).cpu()}

    def summarise(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """See :class:`HeadTask`."""
        counts = torch.stack([batch["confusion"] for batch in batches]).sum(0)
        return {"mean_iou": mean_iou(counts), "pixel_accuracy": pixel_accuracy(counts)}


def _enlarge(maps: Tensor, target: Tensor) -> Tensor:
    return F.interpolate(maps, target.shape[-2:], mode="bilinear")


def _mean_over_images(batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Means over images; those without a valid pixel are left out."""
    batches = list(batches)
    means = {name: float(torch.cat([batch[name] for batch in batches]).nanmean()) for name in batches[0]}
    return {name: value for name, value in means.items() if math.isfinite(value)}
