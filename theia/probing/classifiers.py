"""Classes by a linear layer on frozen vectors: the linear probe of MAE, for ImageNet.

With few images its steps end long before it has converged; :mod:`theia.probing.classifiers` is for those.
"""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.optim.lars import Lars
from torch import Tensor, nn
from tqdm import tqdm

_MOMENTUM = 0.9
_TRUST = 0.001
_INITIAL_STD = 0.01
_BATCH_NORM_EPS = 1e-6
_CHUNK = 4096  # vectors told at a time


@dataclass(frozen=True)
class Schedule:
    """How a probe is trained.

    Attributes:
        batch_size: Images per step, or all if there are fewer.
        base_rate: Learning rate per 256 images of a step.
        epochs: Turns over the training images.
        warmup: Epochs of them in which the rate rises.
    """

    batch_size: int
    base_rate: float
    epochs: int = 90
    warmup: int = 10


class LinearProbe(nn.Module):
    """Batch norm without weights, and a linear layer.

    Args:
        channels: Of the vectors.
        classes: How many.

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


def lars(probe: LinearProbe, rate: float) -> Lars:
    """LARS as in MAE: momentum 0.9, no weight decay, no scaling of the bias's steps.

    Args:
        probe: What to train.
        rate: Learning rate.

    Source: You et al., "Large Batch Training of Convolutional Networks", 2017; MAE's ``util/lars.py``.
    """
    groups = [
        {"params": [probe.linear.weight], "always_adapt": True},
        {"params": [probe.linear.bias], "always_adapt": False},
    ]
    return Lars(groups, lr=rate, momentum=_MOMENTUM, trust_coeff=_TRUST)


def rate_at(epoch: float, peak: float, epochs: float, warmup: float) -> float:
    """Learning rate at a moment: linear from 0 to the peak, then half a cosine to 0.

    Args:
        epoch: From 0, with its fraction.
        peak: The greatest rate.
        epochs: All.
        warmup: Epochs of them in which it rises.

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
    device: str,
    what: str,
) -> LinearProbe:
    """Trains a probe; the last, incomplete batch of an epoch is left out, as in MAE.

    MAE crops and flips images anew every epoch; vectors that are computed once cannot be.

    Args:
        vectors: Shape ``(n, C)``.
        labels: Class indices, shape ``(n,)``.
        classes: How many.
        schedule: How.
        seed: Of the weights and the order of images.
        device: Where.
        what: For the progress bar.

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
    for epoch in tqdm(range(schedule.epochs), desc=what, unit="epoch"):
        order = random.permutation(count)
        for step in range(steps):
            rate = rate_at(epoch + step / steps, peak, schedule.epochs, schedule.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # In the order of the file that they may lie in.
            places = np.sort(order[step * batch_size : (step + 1) * batch_size])
            scores = probe(torch.from_numpy(vectors[places]).to(device))
            loss = F.cross_entropy(scores, torch.from_numpy(labels[places]).to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()  # type: ignore[no-untyped-call]
    return probe.eval()


@torch.no_grad()
def linear_classes(
    train: NDArray[np.float32],
    labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    classes: int,
    schedule: Schedule,
    seed: int,
    device: str,
    what: str,
) -> NDArray[np.int64]:
    """What a trained probe says of other vectors; arguments as of :func:`train_probe`.

    Args:
        train: Shape ``(n, C)``.
        labels: Class index of each, shape ``(n,)``.
        queries: Shape ``(m, C)``.
        classes: How many.
        schedule: How the probe is trained.
        seed: Of it.
        device: Where.
        what: For the progress bar.

    Returns:
        Class indices, shape ``(m,)``.
    """
    with torch.enable_grad():
        probe = train_probe(train, labels, classes, schedule, seed, device, what)
    starts = range(0, len(queries), _CHUNK)
    parts = (torch.from_numpy(queries[start : start + _CHUNK]).to(device) for start in starts)
    return torch.cat([probe(part).argmax(1).cpu() for part in parts]).numpy()


_ITERATIONS = 1000


def logistic_classes(
    train: NDArray[np.float32], labels: NDArray[np.int64], queries: NDArray[np.float32]
) -> NDArray[np.int64]:
    """What multinomial logistic regression says of vectors.

    Channels are standardised on the training vectors; the L2 penalty is scikit-learn's own (C = 1). The protocol of
    :mod:`theia.scoring.classification`; nothing in it is chosen by the score, and nothing is left to chance. It is
    fitted until it has converged; scikit-learn warns if that takes more than a thousand iterations.

    Args:
        train: Shape ``(n, C)``.
        labels: Class index of each, shape ``(n,)``.
        queries: Shape ``(m, C)``.

    Returns:
        Class indices, shape ``(m,)``.
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    return cast(NDArray[np.int64], probe.fit(train, labels).predict(queries))


_QUERIES = 256  # queries at a time


def nearest_classes(train: Tensor, labels: Tensor, queries: Tensor, neighbours: int) -> Tensor:
    """The class that most of the nearest training vectors have.

    The vectors of greatest cosine have one vote each, whatever their cosine; of classes with as many votes the first
    wins. The protocol of :mod:`theia.scoring.classification`; nothing in it is chosen by the score.

    Args:
        train: Shape ``(n, C)``.
        labels: Class index of each, int64, shape ``(n,)``.
        queries: Shape ``(m, C)``.
        neighbours: How many vote, at most ``n``.

    Returns:
        Class indices, shape ``(m,)``.
    """
    directions = F.normalize(train, dim=1)
    classes = int(labels.max()) + 1
    found = []
    for start in range(0, len(queries), _QUERIES):
        chunk = queries[start : start + _QUERIES]
        nearest = (F.normalize(chunk, dim=1) @ directions.T).topk(neighbours, dim=1).indices
        votes = torch.zeros(len(chunk), classes, device=train.device)
        votes.scatter_add_(1, labels[nearest], torch.ones_like(nearest, dtype=votes.dtype))
        found.append(votes.argmax(1))
    return torch.cat(found)
