"""The schedule and the sampler against closed forms."""

import math

import pytest
import torch

from theia.policies.diffusion import Diffusion, cosine_schedule, step_embedding


def test_the_signal_left_follows_the_cosine_until_the_last_step():
    left = cosine_schedule(100).double()
    cosine = torch.tensor([math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(101)])
    torch.testing.assert_close(left[:-1], (cosine[1:-1] / cosine[0]).double(), rtol=1e-5, atol=1e-8)
    assert float(left[-1]) == pytest.approx(1e-3 * float(left[-2]), rel=1e-3)  # the largest share that a step takes


def test_noised_samples_have_the_variance_of_signal_and_noise():
    diffusion = Diffusion(100, 10)
    torch.manual_seed(0)
    samples = torch.full((20_000, 1, 1), 0.5)
    noised = diffusion.noised(samples, torch.randn_like(samples), torch.full((20_000,), 60))
    left = float(diffusion.left[60])
    assert float(noised.mean()) == pytest.approx(0.5 * left**0.5, abs=0.02)
    assert float(noised.var()) == pytest.approx(1 - left, rel=0.03)


@pytest.mark.parametrize(("mean", "deviation"), [(0.2, 0.1), (-0.4, 0.05)])
def test_sampling_turns_noise_into_the_normal_distribution_whose_noise_is_known(mean, deviation):
    """For normal data, the expected noise is linear, and the flow of DDIM maps z to mean + deviation * z."""
    diffusion = Diffusion(1000, 500)

    def noise_of(noised, steps):
        left = diffusion.left[steps].view(-1, 1, 1)
        return (1 - left).sqrt() * (noised - left.sqrt() * mean) / (left * deviation**2 + 1 - left)

    noise = torch.linspace(-2, 2, 9).view(-1, 1, 1)
    torch.testing.assert_close(diffusion.sample(noise_of, noise), mean + deviation * noise, rtol=0, atol=0.01)


def test_a_network_that_knows_the_sample_leads_to_it_in_any_number_of_steps():
    sample = torch.tensor([[[0.3, -0.9]]])
    for sampled in (1, 3, 10):
        diffusion = Diffusion(100, sampled)

        def noise_of(noised, steps, diffusion=diffusion):
            left = diffusion.left[steps].view(-1, 1, 1)
            return (noised - left.sqrt() * sample) / (1 - left).sqrt()

        torch.testing.assert_close(diffusion.sample(noise_of, torch.randn(1, 1, 2)), sample, rtol=0, atol=1e-4)


def test_what_is_sampled_never_leaves_the_range():
    sampled = Diffusion(100, 10).sample(lambda noised, steps: -5 * torch.ones_like(noised), torch.randn(4, 2, 2))
    assert float(sampled.abs().max()) <= 1


def test_steps_are_told_apart():
    told = step_embedding(torch.arange(100), 64)
    distances = torch.cdist(told, told) + 100 * torch.eye(100)
    assert float(distances.min()) > 0.5
