"""MAE's linear probe of classes: a linear layer on frozen vectors, trained as for ImageNet.

With few images its steps end long before it has converged; :mod:`theia.analysis.classifiers` is for those.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.optim.lars import Lars
from torch import Tensor, nn

from theia.utils.progress import Progress

_MOMENTUM = 0.9
_TRUST = 0.001
_INITIAL_STD = 0.01
_BATCH_NORM_EPS = 1e-6
_CHUNK = 4096  # vectors classified at a time, to bound memory


@dataclass(frozen=True)
class Schedule:
    """How a probe is trained.

    Attributes:
        batch_size: Images per step; all of them if there are fewer.
        base_rate: Learning rate per 256 images of a step.
        epochs: Passes over the training images.
        warmup: Number of epochs in which the learning rate rises.
    """

    batch_size: int
    base_rate: float
    epochs: int = 90
    warmup: int = 10


class LinearProbe(nn.Module):
    """Batch norm without weights, then a linear layer.

    Args:
        channels: Channels of a vector.
        classes: Number of classes.

    Source: He et al., "Masked Autoencoders", 2022, appendix A.1; ``main_linprobe.py``.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        # Running statistics are plain means over steps: after MAE's moving ones, few steps leave some of their start.
        self.norm = nn.BatchNorm1d(channels, affine=False, eps=_BATCH_NORM_EPS, momentum=None)
        self.linear = nn.Linear(channels, classes)
        nn.init.trunc_normal_(self.linear.weight, std=_INITIAL_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """Scores of classes, ``(B, C)`` to ``(B, classes)``."""
        scores: Tensor = self.linear(self.norm(vectors))
        return scores

    @torch.no_grad()
    def classify(self, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Finds the most likely class of each vector, some vectors at a time to bound memory.

        Args:
            vectors: Vectors to classify, shape ``(m, C)``.

        Returns:
            Class indices, shape ``(m,)``.
        """
        device = self.linear.weight.device
        starts = range(0, len(vectors), _CHUNK)
        parts = (torch.from_numpy(vectors[start : start + _CHUNK]).to(device) for start in starts)
        return torch.cat([self(part).argmax(1).cpu() for part in parts]).numpy()


def lars(probe: LinearProbe, rate: float) -> Lars:
    """LARS as in MAE: momentum 0.9, no weight decay, no scaling of the bias's steps.

    Args:
        probe: The probe to train.
        rate: Learning rate.

    Source: You et al., "Large Batch Training of Convolutional Networks", 2017; MAE's ``util/lars.py``.
    """
    groups = [
        {"params": [probe.linear.weight], "always_adapt": True},
        {"params": [probe.linear.bias], "always_adapt": False},
    ]
    return Lars(groups, lr=rate, momentum=_MOMENTUM, trust_coeff=_TRUST)


def rate_at(epoch: float, peak: float, epochs: float, warmup: float) -> float:
    """Learning rate at a point of the training: linear from 0 to the peak, then half a cosine down to 0.

    Args:
        epoch: Number of epochs done so far, with their fraction.
        peak: Highest learning rate.
        epochs: Length of the training, in epochs.
        warmup: Number of epochs in which the learning rate rises.

    Source: MAE's ``util/lr_sched.py``.
    """
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def train_probe(
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: int,
    schedule: Schedule,
    seed: int,
    device: torch.device,
    label: str,
) -> LinearProbe:
    """Trains a probe; the last, incomplete batch of an epoch is left out, as in MAE.

    MAE crops and flips images anew every epoch; vectors that are computed once cannot be.

    Args:
        vectors: Training vectors, shape ``(n, C)``.
        labels: Class index of each vector, shape ``(n,)``.
        classes: Number of classes.
        schedule: How the probe is trained.
        seed: Seed of the first weights and of the order of images.
        device: Device to train on.
        label: Text for the progress bar.

    Returns:
        The probe in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        probe = LinearProbe(vectors.shape[1], classes).to(device)
    random = np.random.default_rng(seed)
    count = len(vectors)
    batch_size = min(schedule.batch_size, count)
    steps = count // batch_size
    peak = schedule.base_rate * batch_size / 256
    optimizer = lars(probe, peak)
    with Progress(label, schedule.epochs, unit="epoch") as progress:
        for epoch in range(schedule.epochs):
            order = random.permutation(count)
            for step in range(steps):
                rate = rate_at(epoch + step / steps, peak, schedule.epochs, schedule.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # Sorted, as they may be read from a file.
                places = np.sort(order[step * batch_size : (step + 1) * batch_size])
                scores = probe(torch.from_numpy(vectors[places]).to(device))
                loss = F.cross_entropy(scores, torch.from_numpy(labels[places]).to(device))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()  # type: ignore[no-untyped-call]
            progress.advance(1)
    return probe.eval()
