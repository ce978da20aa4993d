import math

import pytest
import torch
import torch.nn.functional as F

from theia.errors import ConfigError, ShapeError
from theia.training.losses import (
    PAPER,
    FeatureLoss,
    RunningMean,
    angle,
    cosine_loss,
    mse_loss,
    smooth_l1_loss,
)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 16, 5, generator=generator).mul(2).unbind()


def test_cosine_is_that_of_the_whole_flattened_map(pair):
    prediction, target = pair
    cosines = [(p * t).sum() / (p.norm() * t.norm()) for p, t in zip(prediction, target, strict=True)]
    torch.testing.assert_close(cosine_loss(prediction, target), 1 - sum(cosines) / 3)


def test_cosine_per_token(pair):
    expected = 1 - F.cosine_similarity(*pair, dim=-1).mean()
    torch.testing.assert_close(cosine_loss(*pair, per_token=True), expected)
    assert not torch.isclose(cosine_loss(*pair), expected)


@pytest.mark.parametrize(("factor", "expected"), [(3.0, 0.0), (-0.5, 2.0)])
def test_cosine_ignores_length(pair, factor, expected):
    assert cosine_loss(pair[0] * factor, pair[0]).item() == pytest.approx(expected, abs=1e-6)


def test_cosine_of_an_empty_prediction_is_finite_with_its_gradient(pair):
    prediction = torch.zeros_like(pair[0], requires_grad=True)
    loss = cosine_loss(prediction, pair[1])
    loss.backward()
    assert loss.item() == 1
    assert prediction.grad.isfinite().all()


def test_smooth_l1_and_mse_equal_their_closed_forms(pair):
    error = (pair[0] - pair[1]).abs()
    expected = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
    torch.testing.assert_close(smooth_l1_loss(*pair), expected)
    torch.testing.assert_close(mse_loss(*pair), error.square().mean())


def test_a_loss_is_the_weighted_sum_of_its_terms(pair):
    cosine = 1 - F.cosine_similarity(pair[0].flatten(1), pair[1].flatten(1)).mean()
    per_token = 1 - F.cosine_similarity(*pair, dim=-1).mean()
    smooth_l1 = F.smooth_l1_loss(*pair)
    for weights, expected in (
        (PAPER, 0.9 * cosine + 0.1 * smooth_l1),
        ({"cosine": 0.25, "smooth_l1": 2}, 0.25 * cosine + 2 * smooth_l1),
        ({"cosine_per_token": 1, "cosine": 0}, per_token),
        ({"mse": 1}, F.mse_loss(*pair)),
    ):
        torch.testing.assert_close(FeatureLoss(weights)(*pair), expected)


@pytest.mark.parametrize("loss", [cosine_loss, smooth_l1_loss, mse_loss, FeatureLoss()])
def test_losses_are_float32_inside_autocast(loss, pair):
    rounded = [tensor.bfloat16() for tensor in pair]
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(*rounded)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, loss(*(tensor.float() for tensor in rounded)), atol=0, rtol=0)


@pytest.mark.parametrize("loss", [cosine_loss, smooth_l1_loss, mse_loss, FeatureLoss()])
def test_losses_take_cls_tokens_and_refuse_shapes_that_would_broadcast(loss):
    assert loss(torch.randn(4, 8), torch.randn(4, 8)).ndim == 0
    with pytest.raises(ShapeError, match=r"\(4, 16, 8\).*\(4, 1, 8\)"):
        loss(torch.randn(4, 16, 8), torch.randn(4, 1, 8))


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.5, math.pi / 2, 3.0, math.pi - 1e-3])
def test_angles_are_those_of_a_plane_at_any_lengths(size):
    turned = 7 * torch.tensor([math.cos(size), math.sin(size), 0.0]).expand(4, 3)
    found = angle(turned, torch.tensor([0.01, 0.0, 0.0]).expand(4, 3))
    torch.testing.assert_close(found, torch.full((4,), size), rtol=1e-5, atol=1e-9)


def test_an_angle_is_the_arc_cosine_and_its_square_has_a_finite_gradient_everywhere():
    first, second = torch.randn(50, 9, dtype=torch.float64), torch.randn(50, 9, dtype=torch.float64)
    expected = torch.arccos(F.cosine_similarity(first, second))
    torch.testing.assert_close(angle(first, second).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(angle(first, second).double(), 2 * torch.asin(
        (F.normalize(first) - F.normalize(second)).norm(dim=1) / 2), rtol=1e-5, atol=1e-6)  # fmt: skip

    for sign in (1.0, -1.0):  # at 0 and at pi
        at = (3 * sign * second[:1].float()).requires_grad_()
        angle(at, second[:1].float()).square().sum().backward()
        assert at.grad.isfinite().all()
    # Elsewhere, an angle changes by one radian for each length of the vector that it is turned by.
    at = first.float().requires_grad_()
    angle(at, second.float()).sum().backward()
    torch.testing.assert_close(at.grad.norm(dim=1) * first.float().norm(dim=1), torch.ones(50), rtol=1e-4, atol=1e-4)


def test_a_vector_without_a_direction_is_at_a_right_angle():
    assert angle(torch.zeros(1, 3), torch.ones(1, 3)).item() == pytest.approx(math.pi / 2)


def test_a_running_mean_is_that_of_all_numbers():
    running = RunningMean()
    numbers = [3.0, 1.0, 7.0, 4.5]
    means = [running.update(torch.tensor(number)).item() for number in numbers]
    assert means == pytest.approx([3, 2, 11 / 3, 31 / 8])
    assert running.state_dict()["steps"].item() == 4


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"huber": 1.0}, "huber.*cosine, cosine_per_token, smooth_l1, mse"),
        ({"cosine": -0.5}, "cosine is -0.5"),
        ({"mse": float("nan")}, "mse is nan"),
        ({"mse": 0.0}, "nothing to learn"),
        ({}, "nothing to learn"),
    ],
)
def test_unknown_terms_and_weights_out_of_range_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        FeatureLoss(weights)


@pytest.mark.parametrize("name", ["cosine", "cosine_per_token", "smooth_l1", "mse"])
def test_the_loss_of_each_image_is_that_of_a_batch_of_one(pair, name):
    loss = FeatureLoss({name: 0.7})
    for prediction, target in (pair, [value[:, 0] for value in pair]):  # of patch tokens, and of CLS tokens
        alone = [loss(p[None], t[None]) for p, t in zip(prediction, target, strict=True)]
        torch.testing.assert_close(loss.of_images(prediction, target), torch.stack(alone))
