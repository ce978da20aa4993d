"""How the losses of several teachers become one: fixed weights, weights that follow losses, and dropped teachers."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from theia.errors import ConfigError

Balance = Literal["fixed", "ada"]

_DECAY = 0.99  # of the running mean of a loss: about the last 100 steps


def teacher_weights(names: Collection[str], weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """Gives the weight of each teacher in the mean over teachers.

    Args:
        names: Names of the teachers, at least one.
        weights: Relative weights by teacher name, 1 for a teacher without one; 0 switches a teacher off.

    Returns:
        Weights by name that sum to 1.

    Raises:
        ConfigError: If a weight is for an unknown teacher, negative or not finite, or if all weights are 0.
    """
    given = dict(weights or {})
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise ConfigError(
            f"There are loss weights for {', '.join(unknown)}, but the teachers are "
            f"{', '.join(names) or 'none'}. Correct the names."
        )
    wrong = sorted(name for name, weight in given.items() if not (math.isfinite(weight) and weight >= 0))
    if wrong:
        raise ConfigError(f"The loss weight of {wrong[0]} is {given[wrong[0]]}; it must be 0 or a positive number.")
    relative = {name: float(given.get(name, 1.0)) for name in names}
    total = sum(relative.values())
    if total == 0:
        raise ConfigError("There is nothing to learn: no teacher has a loss weight above 0.")
    return {name: weight / total for name, weight in relative.items()}


def weighted_mean(losses: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
    """The weighted mean of the teachers' losses.

    Args:
        losses: Loss of each teacher by name, a scalar.
        weights: Relative weights by teacher name, as for :func:`teacher_weights`; equal by default.

    Returns:
        A scalar.

    Raises:
        ConfigError: If a weight is wrong, as for :func:`teacher_weights`.
    """
    shares = teacher_weights(losses.keys(), weights)
    return torch.stack([share * losses[name] for name, share in shares.items()]).sum()


def mean_of_some(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted mean over all teachers, estimated from the losses of ``K`` of the ``T`` teachers.

    With the weights ``w`` it is ``T / K`` times the sum of ``w_i L_i`` over the teachers that are there. If each is
    there equally often, its mean over the steps is the mean over all teachers.

    Args:
        losses: Losses of the teachers that are there by name, scalars.
        weights: Weights of all teachers by name, as :func:`teacher_weights` gives them.

    Returns:
        A scalar.
    """
    share = len(weights) / len(losses)
    return torch.stack([share * weights[name] * loss for name, loss in losses.items()]).sum()


class RunningLosses(nn.Module):
    """Running means of the teachers' losses, and weights that make all teachers count alike whatever their loss.

    With ``L_t`` for the losses of a teacher's step ``t``, the mean is ``m_t = 0.99 m_(t-1) + 0.01 L_t``, without the
    bias of its start at 0. The means are buffers, so a checkpoint holds them.

    Args:
        teachers: Number of teachers ``T``.

    Source: AdaLoss (Hu et al., 2019), as PHI-S (Ranzinger et al., 2025) uses it for several teachers.
    """

    mean: Tensor  # (T,)
    steps: Tensor  # (T,), int64

    def __init__(self, teachers: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(teachers))
        self.register_buffer("steps", torch.zeros(teachers, dtype=torch.int64))

    @torch.no_grad()
    def update(self, losses: Tensor, places: Tensor | None = None) -> Tensor:
        """Adds the losses of a step, and gives the factors to multiply them with.

        Args:
            losses: Losses, shape ``(K,)``.
            places: Numbers of their teachers, int64, shape ``(K,)``; by default, they are those of all teachers.

        Returns:
            Factors ``(K,)``, proportional to one over the running means; their mean over all teachers that have had a
            step is 1.
        """
        places = torch.arange(len(self.mean), device=self.mean.device) if places is None else places
        self.steps[places] += 1
        self.mean[places] = self.mean[places].lerp(losses.float(), 1 - _DECAY)
        seen = self.steps > 0
        factors = torch.where(seen, (1 - _DECAY**self.steps) / self.mean, 0)
        return factors[places] / (factors.sum() / seen.sum())


def dropping_mean(
    losses: Tensor, weights: Tensor, kept: Tensor, mean: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    """The mean over a batch in which some teachers are dropped for some images.

    The teacher with the highest weighted loss is never dropped for an image.

    Args:
        losses: Losses of images and teachers, shape ``(B, T)``.
        weights: Weights of the teachers, shape ``(T,)``.
        kept: Whether the draw keeps a teacher for an image, bool, shape ``(B, T)``; see :func:`keep_teachers`.
        mean: Function that gives the mean of a scalar over all processes, each of which has a part of the batch.

    Returns:
        A scalar: the weighted mean of all losses that are kept. Its own mean over the processes is that of the whole
        batch.

    Source: teacher dropping of UNIC (Sariyildiz et al., 2024).
    """
    weighted = losses * weights
    highest = nn.functional.one_hot(weighted.detach().argmax(1), losses.shape[1]).bool()
    coefficients = (kept | highest) * weights
    return (losses * coefficients).sum() / mean(coefficients.sum())


def total_loss(
    losses: Mapping[str, Tensor],
    weights: Mapping[str, float],
    running: RunningLosses | None,
    dropping: float | None,
    seed: int,
    step: int,
    rows: Tensor | None,
    mean: Callable[[Tensor], Tensor],
) -> Tensor:
    """The loss of a step.

    Args:
        losses: Losses of the teachers that the step has by name: scalars, or of each image ``(B,)`` for dropping.
        weights: Weights of all teachers by name, as :func:`teacher_weights` gives them.
        running: Running means of all teachers' losses, which are updated; ``None`` for fixed weights.
        dropping: Probability with which a teacher is dropped for an image; ``None`` for none.
        seed: Seed of the draws.
        step: Number of optimisation steps taken before.
        rows: Numbers of the images, int64, shape ``(B,)``; their places in the batch by default.
        mean: Function that gives the mean of a tensor over all processes.

    Returns:
        A scalar.
    """
    if running is None and dropping is None:
        return mean_of_some(losses, weights)
    every = list(weights)
    places = torch.tensor([every.index(name) for name in losses])
    by_image = torch.stack(list(losses.values()), -1)  # (K,) or (B, K)
    share = len(every) / len(losses)
    factors = torch.tensor([share * weights[name] for name in losses], device=by_image.device)
    if running is not None:
        of_batch = mean(by_image.detach().reshape(-1, len(factors)).mean(0))
        factors = factors * running.update(of_batch, places.to(of_batch.device, non_blocking=True))
    if dropping is None:
        return (by_image * factors).sum()
    numbers = torch.arange(len(by_image)) if rows is None else rows
    kept = keep_teachers(seed, step, numbers, len(every), dropping)[:, places]
    total = dropping_mean(by_image, factors, kept.to(by_image.device, non_blocking=True), mean)
    # A mean of those that the step has; heavy teachers must count more over the steps, too.
    return total if share == 1 else total * (share * sum(weights[name] for name in losses))


def keep_teachers(seed: int, step: int, rows: Tensor, teachers: int, probability: float) -> Tensor:
    """Draws the teachers that are kept for each image. The draw depends on nothing but seed, step, image and teacher.

    Args:
        seed: Seed of the draws.
        step: Number of optimisation steps taken before.
        rows: Numbers of the images, int64, shape ``(B,)``, on the CPU.
        teachers: Number of teachers ``T``.
        probability: Probability with which a teacher is dropped for an image.

    Returns:
        Whether a teacher is kept, bool, shape ``(B, T)``, on the CPU.

    Source: the mixing of the bits is that of SplitMix64 (Steele et al., 2014).
    """
    cells = rows[:, None] * teachers + torch.arange(teachers)
    bits: NDArray[np.uint64] = cells.numpy().astype(np.uint64)
    for more in (0, step, seed):
        bits = _mixed(bits + np.asarray(more, np.uint64))
    return torch.from_numpy(bits.astype(np.float64) / 2.0**64 >= probability)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = np.bitwise_xor(bits, np.right_shift(bits, np.uint64(shift))) * np.uint64(factor)
    return np.bitwise_xor(bits, np.right_shift(bits, np.uint64(31)))
