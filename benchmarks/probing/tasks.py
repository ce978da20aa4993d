"""What heads are asked for: depth, surface normals, classes of pixels."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.probing.data import MAX_DEPTH, DenseData, DenseSplit, Task
from benchmarks.probing.depth_metrics import LEAST_DEPTH, depth_metrics
from benchmarks.probing.normal_metrics import known, normal_metrics
from benchmarks.probing.segmentation_metrics import IGNORED, confusion, mean_iou, pixel_accuracy

_BINS = 256
_BIN_FLOOR = 0.1
_SIGNED = 0.85  # how much a common factor of depth is forgiven in training
_NOISE = 1e-3
_STEEPEST = 1e-4  # the arccosine's slope is endless at 1


class HeadTask(Protocol):
    """One kind of map. Targets are ``(B, ..., S, S)``, a head's maps ``(B, channels, h, w)``."""

    channels: int

    def targets(self, split: DenseSplit) -> NDArray[Any]:
        """What is true, of all pictures of a split."""

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """What training makes small; a scalar."""

    def predict(self, maps: Tensor, size: int) -> Tensor:
        """What a head's maps say at every pixel: metres ``(B, S, S)``, vectors ``(B, 3, S, S)``, or class indices."""

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Figures of a batch that :meth:`summarise` takes together."""

    def summarise(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Figures of all batches."""

    def usual(self, targets: NDArray[Any]) -> Tensor:
        """What is usual at each place of a picture: one prediction that looks at no picture."""


def head_task(name: Task, data: DenseData) -> HeadTask:
    """The task of a name; correspondence has no head."""
    if name == "depth":
        return DepthTask()
    return NormalTask() if name == "normals" else SegmentationTask(len(data.classes))


class DepthTask:
    """Depth in metres, of 256 bins from 1 mm to 10 m of equal width.

    The head gives each bin a weight (ReLU, plus 0.1, divided by their sum); depth is the weighted mean of bins. The
    loss is that of AdaBins on the logarithm, times 10; probe3D adds half a loss of gradients, which is left out here.

    Source: probe3D, ``DepthBinPrediction`` and ``sig_loss``; Bhat et al., "AdaBins", 2021.
    """

    channels = _BINS

    def targets(self, split: DenseSplit) -> NDArray[Any]:
        """See :class:`HeadTask`."""
        return _present(split.depth)

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

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """See :class:`HeadTask`."""
        return depth_metrics(prediction, torch.where(target <= MAX_DEPTH, target, 0.0))

    def summarise(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """See :class:`HeadTask`."""
        return _mean_over_images(batches)

    def usual(self, targets: NDArray[Any]) -> Tensor:
        """The mean of what is known at each place, or of all where nothing ever is; shape ``(S, S)``."""
        total, count = np.zeros(targets.shape[1:]), np.zeros(targets.shape[1:])
        for target in targets:
            valid = (target > 0) & (target <= MAX_DEPTH)
            total += np.where(valid, target, 0)
            count += valid
        mean = total.sum() / max(count.sum(), 1)
        return torch.from_numpy(np.where(count > 0, total / count.clip(1), mean)).float()


class NormalTask:
    """Surface normals: three numbers of any length; the loss is the angle (probe3D's without its uncertainty)."""

    channels = 3

    def targets(self, split: DenseSplit) -> NDArray[Any]:
        """See :class:`HeadTask`."""
        return _present(split.normals)

    def predict(self, maps: Tensor, size: int) -> Tensor:
        """Vectors, ``(B, 3, h, w)`` to ``(B, 3, S, S)``."""
        return _enlarge(maps, size)

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """See :class:`HeadTask`."""
        valid = known(target)
        if not valid.any():
            return maps.sum() * 0
        cosine = F.cosine_similarity(_enlarge(maps, target.shape[-1]), target, dim=1)[valid]
        return cosine.clamp(-1 + _STEEPEST, 1 - _STEEPEST).acos().mean()

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """See :class:`HeadTask`."""
        return normal_metrics(prediction, target)

    def summarise(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """See :class:`HeadTask`."""
        return _mean_over_images(batches)

    def usual(self, targets: NDArray[Any]) -> Tensor:
        """The mean direction at each place, or of all where there is none; shape ``(3, S, S)``."""
        mean = targets.mean(0, dtype=np.float64)
        return torch.from_numpy(np.where(mean.any(0), mean, mean.mean((1, 2), keepdims=True))).float()


class SegmentationTask:
    """Classes of pixels, with cross-entropy.

    Args:
        classes: How many.
    """

    def __init__(self, classes: int) -> None:
        self.channels = classes

    def targets(self, split: DenseSplit) -> NDArray[Any]:
        """See :class:`HeadTask`."""
        return _present(split.labels)

    def predict(self, maps: Tensor, size: int) -> Tensor:
        """Class indices, ``(B, classes, h, w)`` to ``(B, S, S)``."""
        return _enlarge(maps, size).argmax(1)

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """See :class:`HeadTask`."""
        if bool((target == IGNORED).all()):
            return maps.sum() * 0
        return F.cross_entropy(_enlarge(maps, target.shape[-1]), target.long(), ignore_index=IGNORED)

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """See :class:`HeadTask`."""
        return {"confusion": confusion(prediction, target, self.channels).cpu()}

    def summarise(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """See :class:`HeadTask`."""
        counts = torch.stack([batch["confusion"] for batch in batches]).sum(0)
        return {"mean_iou": mean_iou(counts), "pixel_accuracy": pixel_accuracy(counts)}

    def usual(self, targets: NDArray[Any]) -> Tensor:
        """The most frequent class at each place; shape ``(S, S)``."""
        shape = targets.shape[1:]
        starts = np.arange(math.prod(shape)) * self.channels
        counts = np.zeros(len(starts) * self.channels, np.int64)
        for target in targets:
            valid = target.ravel() != IGNORED
            counts[starts[valid] + target.ravel()[valid]] += 1
        return torch.from_numpy(counts.reshape(*shape, self.channels).argmax(-1))


def _present(values: NDArray[Any] | None) -> NDArray[Any]:
    if values is None:
        raise ValueError("A task without data must not be probed.")
    return values


def _enlarge(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps, (size, size), mode="bilinear")


def _mean_over_images(batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Means over images; those without a valid pixel are left out. There is one with: who reads data sees to it."""
    batches = list(batches)
    return {name: float(torch.cat([batch[name] for batch in batches]).nanmean()) for name in batches[0]}
