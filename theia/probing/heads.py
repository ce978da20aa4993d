"""Linear heads on the frozen patch tokens of an encoder's last layer.

Losses, optimiser, schedule, and the bins of depth are probe3D's. Its published figures come from larger heads (DPT:
convolutions over four layers of the encoder), which learn much by themselves. Here the head is its linear one on the
one layer that teachers, concatenations and students all have: figures of encoders compare with each other, not with
probe3D's.

Unlike there, tokens are whitened first. What a linear head can tell does not change with a linear map of the channels,
but how near it comes to it in a few hundred steps does: channels that go together, as those of trained encoders do more
than those of untrained ones, are learned slowly. Whitened, they all start alike.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from theia.probing.datasets import MAX_DEPTH, DenseData, DenseSplit, Task
from theia.probing.dense_metrics import (
    IGNORED,
    LEAST_DEPTH,
    confusion,
    depth_metrics,
    known,
    mean_iou,
    normal_metrics,
    pixel_accuracy,
)
from theia.probing.embedding import Features
from theia.utils.progress import Progress

_UPSAMPLING = 4  # of the tokens' grid, before what a head gives becomes depth
_LEAST_RATE = 0.01  # of the learning rate
_CHUNK = 16  # images, to bound memory
_LEAST_STD = 1e-6
_LEAST_VARIANCE = 1e-3  # of a direction, where that of a channel is 1: what lies far below is rounding


@dataclass(frozen=True)
class Fit:
    """How heads are fitted.

    Attributes:
        epochs: Passes over the training images.
        warmup: Number of epochs in which the learning rate rises.
        batch_size: Number of images per step.
        learning_rate: Highest learning rate of AdamW.
    """

    epochs: int
    warmup: float
    batch_size: int
    learning_rate: float


class LinearHead(nn.Module):
    """Whitened tokens, one linear layer, and a bilinear enlargement of what it gives.

    A 1x1 convolution after a bilinear enlargement, as in probe3D, gives the same: both are linear and the weights of an
    interpolation add up to one.

    Args:
        mean: Mean of each channel, shape ``(C,)``.
        whitening: Matrix that centred tokens are multiplied by from the right, shape ``(C, C)``.
        out: Number of channels of the maps.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, mean: Tensor, whitening: Tensor, out: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("whitening", whitening)
        self.linear = nn.Linear(len(mean), out)

    def forward(self, tokens: Tensor, grid: tuple[int, int], size: int) -> Tensor:
        """Gives maps four times as large as the grid, but not larger than pictures.

        Args:
            tokens: Patch tokens, shape ``(B, N, C)``.
            grid: Rows and columns of the tokens.
            size: Height and width of pictures, in pixels.

        Returns:
            Shape ``(B, out, h, w)``.
        """
        given = self.linear((tokens - self.mean) @ self.whitening)
        maps = given.transpose(1, 2).reshape(len(tokens), -1, *grid)
        larger = [max(edge, min(_UPSAMPLING * edge, size)) for edge in grid]
        return F.interpolate(maps, larger, mode="bilinear")


def fit_head(
    features: Features,
    white: tuple[Tensor, Tensor],
    targets: NDArray[Any],
    out: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    fit: Fit,
    seed: int,
    device: torch.device,
    label: str,
) -> LinearHead:
    """Fits a head.

    AdamW; the learning rate rises linearly from a hundredth, then falls along a quarter of a cosine, step by step.

    Args:
        features: Features of the training images.
        white: Result of :func:`whitening` for these features.
        targets: True maps of the training images, shape ``(n, ..., S, S)``.
        out: Number of channels of the head's maps.
        loss: Loss of the head's maps and a batch of targets.
        fit: How the head is fitted.
        seed: Seed of the first weights and of the order of images.
        device: Device to fit it on.
        label: Text for the progress bar.

    Source: probe3D, ``train_depth.py`` and ``cosine_decay_linear_warmup``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = LinearHead(*white, out).to(device)
    random = np.random.default_rng(seed)
    count = len(features.tokens)
    per_epoch = math.ceil(count / fit.batch_size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=fit.learning_rate)
    schedule = LambdaLR(optimizer, lambda step: rate(step, fit.epochs * per_epoch, fit.warmup * per_epoch))
    with Progress(label, fit.epochs * per_epoch, unit="step") as progress:
        for _ in range(fit.epochs):
            order = random.permutation(count)
            for start in range(0, count, fit.batch_size):
                places = np.sort(order[start : start + fit.batch_size])
                target = torch.from_numpy(targets[places]).to(device)
                maps = head(torch.from_numpy(features.tokens[places]).to(device), features.grid, target.shape[-1])
                optimizer.zero_grad()
                loss(maps, target).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                progress.advance(1)
    return head.eval()


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at a step.

    Args:
        step: Number of the step, from 0.
        steps: Number of all steps.
        warmup: Number of steps in which the learning rate rises.
    """
    if step <= warmup:
        share = step / warmup if warmup else 1.0
    else:
        share = math.cos(math.pi / 2 * (step - warmup) / (steps - warmup))
    return _LEAST_RATE + (1 - _LEAST_RATE) * share


@torch.no_grad()
def apply_head(head: LinearHead, features: Features, size: int, batch_size: int) -> Iterator[tuple[slice, Tensor]]:
    """A head's maps of all images, in order.

    Args:
        head: Fitted head.
        features: Features of the images.
        size: Height and width of pictures, in pixels.
        batch_size: Number of images at a time.

    Yields:
        Places of some images, and their maps, shape ``(B, out, h, w)``.
    """
    for start in range(0, len(features.tokens), batch_size):
        part = slice(start, start + batch_size)
        tokens = torch.from_numpy(features.tokens[part]).to(head.mean.device)
        yield part, head(tokens, features.grid, size)


def whitening(tokens: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Finds the map that gives all tokens of all images a mean of 0 and a covariance of 1, in bounded memory.

    Channels are standardised, then turned into the principal axes of their correlations, then each axis is divided by
    the root of its variance plus a thousandth.

    Args:
        tokens: Patch tokens, shape ``(n, N, C)``.

    Returns:
        Mean of each channel, shape ``(C,)``, and the matrix, shape ``(C, C)``.
    """
    channels = tokens.shape[2]
    count = tokens.shape[0] * tokens.shape[1]
    parts = [tokens[start : start + _CHUNK] for start in range(0, len(tokens), _CHUNK)]
    mean = sum((part.sum((0, 1), dtype=np.float64) for part in parts), np.zeros(channels)) / count
    covariance = np.zeros((channels, channels))
    for part in parts:
        centred = part.reshape(-1, channels) - mean
        covariance += centred.T @ centred / count
    std = np.sqrt(covariance.diagonal()).clip(_LEAST_STD)
    variance, axes = np.linalg.eigh(covariance / std / std[:, None])
    matrix = axes / std[:, None] / np.sqrt(variance.clip(0) + _LEAST_VARIANCE)
    return torch.from_numpy(mean).float(), torch.from_numpy(matrix).float()


_BINS = 256
_BIN_FLOOR = 0.1
_SIGNED = 0.85  # how much a common factor of depth is forgiven in training
_NOISE = 1e-3
_STEEPEST = 1e-4  # the arccosine's slope is endless at 1


class HeadTask(Protocol):
    """One kind of map. Targets are ``(B, ..., S, S)``, a head's maps ``(B, channels, h, w)``."""

    channels: int

    def targets(self, split: DenseSplit) -> NDArray[Any]:
        """True maps of all pictures of a split."""

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """The loss that training makes small, a scalar."""

    def predict(self, maps: Tensor, size: int) -> Tensor:
        """Prediction at every pixel: metres ``(B, S, S)``, vectors ``(B, 3, S, S)``, or class indices ``(B, S, S)``."""

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Figures of a batch, for :meth:`summarise`."""

    def summarise(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Figures of all batches."""

    def usual(self, targets: NDArray[Any]) -> Tensor:
        """What is usual at each place of a picture: one prediction that looks at no picture."""


def head_task(name: Task, data: DenseData) -> HeadTask:
    """The task of this name, which is not correspondence: that has no head."""
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
        classes: Number of classes.
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
