"""Denoising diffusion: a schedule of noise, and the steps that lead from noise to a sample."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

_OFFSET = 0.008
_MOST_BETA = 0.999


def cosine_schedule(steps: int) -> Tensor:
    """Share of the signal's variance that is left after each step of noising, shape ``(steps,)``, descending.

    Source: Nichol and Dhariwal, Improved denoising diffusion probabilistic models, eq. (17).
    """
    at = torch.arange(steps + 1, dtype=torch.float64) / steps
    left = ((at + _OFFSET) / (1 + _OFFSET) * math.pi / 2).cos().square()
    betas = (1 - left[1:] / left[:-1]).clamp(max=_MOST_BETA)
    return (1 - betas).cumprod(0).float()


class Diffusion(nn.Module):
    """Noises samples in training, and samples from noise by DDIM without randomness of its own.

    Args:
        steps: Number of steps of noising.
        sampled: Number of those that sampling visits.

    Source: Song et al., Denoising diffusion implicit models, eq. (12) with sigma 0.
    """

    left: Tensor  # (steps,), see cosine_schedule

    def __init__(self, steps: int, sampled: int) -> None:
        super().__init__()
        self.steps, self._sampled = steps, sampled
        self.register_buffer("left", cosine_schedule(steps), persistent=False)

    def noised(self, samples: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Samples after some steps of noising.

        Args:
            samples: Values from -1 to 1, shape ``(B, ...)``.
            noise: Standard normal noise, same shape.
            steps: Number of the step of each sample, counted from 0, shape ``(B,)``.
        """
        left = self.left[steps].view(-1, *[1] * (samples.ndim - 1))
        return left.sqrt() * samples + (1 - left).sqrt() * noise

    def sample(self, noise_of: Callable[[Tensor, Tensor], Tensor], noise: Tensor) -> Tensor:
        """Samples from noise, values from -1 to 1.

        Args:
            noise_of: Says what is noise in noised samples ``(B, ...)`` after the steps ``(B,)``.
            noise: Standard normal noise, shape ``(B, ...)``.
        """
        # From the last step down, evenly; the step that would follow the first one is the sample itself.
        visited = torch.linspace(self.steps - 1, -1, self._sampled + 1).round().long().tolist()
        noised = noise
        for now, after in itertools.pairwise(visited):
            left, later = self.left[now], self.left[after] if after >= 0 else torch.ones_like(self.left[now])
            found = noise_of(noised, torch.full((len(noise),), now, device=noise.device))
            clean = ((noised - (1 - left).sqrt() * found) / left.sqrt()).clamp(-1, 1)
            # Of the clipped sample: where it was clipped, the network's own answer does not fit it.
            found = (noised - left.sqrt() * clean) / (1 - left).sqrt()
            noised = later.sqrt() * clean + (1 - later).sqrt() * found
        return noised


def step_embedding(steps: Tensor, size: int) -> Tensor:
    """Sines and cosines of the numbers of steps, shape ``(B, size)``; periods from 6 to 60,000 steps."""
    waves = torch.exp(-math.log(1e4) * torch.arange(size // 2, device=steps.device) / (size // 2 - 1))
    phases = steps.float()[:, None] * waves
    return torch.cat([phases.sin(), phases.cos()], 1)
