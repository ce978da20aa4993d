"""How losses of several teachers become one, against closed forms."""

import math

import pytest
import torch

from theia.errors import ConfigError
from theia.training.balance import (
    RunningLosses,
    dropping_mean,
    keep_teachers,
    mean_of_some,
    teacher_weights,
    weighted_mean,
)


def test_teachers_count_equally_by_default():
    losses = {"clip": torch.tensor(1.0), "sam": torch.tensor(4.0)}
    assert weighted_mean(losses).item() == 2.5


def test_weights_are_relative():
    losses = {"clip": torch.tensor(1.0), "sam": torch.tensor(4.0), "vit": torch.tensor(7.0)}
    assert weighted_mean(losses, {"sam": 2.0, "vit": 0.0}).item() == pytest.approx((1 * 1 + 2 * 4) / 3)
    assert teacher_weights(losses, {"sam": 2.0, "vit": 0.0}) == {"clip": 1 / 3, "sam": 2 / 3, "vit": 0.0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"dino": 1.0}, "dino, but the teachers are clip, sam"),
        ({"clip": -1.0}, "weight of clip"),
        ({"clip": math.nan}, "weight of clip"),
        ({"clip": 0.0, "sam": 0.0}, "nothing to learn"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        teacher_weights(["clip", "sam"], weights)


def test_no_teachers_is_an_error():
    with pytest.raises(ConfigError, match="nothing to learn"):
        weighted_mean({})


def test_running_losses_make_teachers_of_different_losses_count_alike():
    running = RunningLosses(3)
    losses = torch.tensor([0.1, 1.0, 10.0])
    for _ in range(5):
        factors = running.update(losses)
    torch.testing.assert_close(factors * losses, (factors * losses).mean().expand(3))
    assert factors.mean().item() == pytest.approx(1)


def test_running_losses_are_an_exponential_mean_without_bias():
    running = RunningLosses(1)
    losses = [1.0, 3.0, 2.0, 5.0]
    for value in losses:
        running.update(torch.tensor([value]))
    powers = [0.99 ** (3 - step) for step in range(4)]
    expected = sum(power * value for power, value in zip(powers, losses, strict=True)) / sum(powers)
    assert running.mean.item() / (1 - 0.99**4) == pytest.approx(expected, rel=1e-4)


def test_the_losses_of_some_teachers_estimate_the_mean_of_all():
    losses = {name: torch.tensor(value) for name, value in {"clip": 1.0, "sam": 4.0, "vit": 9.0}.items()}
    weights = teacher_weights(losses, {"sam": 2.0})
    estimates = [
        mean_of_some({name: losses[name] for name in pair}, weights)
        for pair in (("clip", "sam"), ("sam", "vit"), ("vit", "clip"))
    ]
    assert estimates[0].item() == pytest.approx(3 / 2 * (1 / 4 * 1 + 1 / 2 * 4))
    torch.testing.assert_close(torch.stack(estimates).mean(), weighted_mean(losses, weights))


def test_running_losses_follow_the_steps_of_each_teacher():
    running, alone = RunningLosses(3), RunningLosses(1)
    factors = [
        running.update(torch.tensor([value]), torch.tensor([place]))
        for place, value in ((0, 4.0), (2, 1.0), (0, 2.0), (1, 8.0))
    ]
    for value in (4.0, 2.0):
        alone.update(torch.tensor([value]))

    assert running.steps.tolist() == [2, 1, 1]
    assert running.mean[0] == alone.mean[0]
    first = (0.99 * 4 + 2) / 1.99
    reciprocals = torch.tensor([1 / first, 1 / 8, 1.0])
    assert factors[0].item() == pytest.approx(1)  # of the only teacher so far
    assert factors[1].item() == pytest.approx(1 / ((1 / 4 + 1) / 2))
    assert factors[3].item() == pytest.approx(float(reciprocals[1] / reciprocals.mean()), rel=1e-5)


def test_the_worst_teacher_of_an_image_is_never_dropped():
    losses = torch.tensor([[1.0, 2.0], [4.0, 3.0]], requires_grad=True)
    weights = torch.tensor([0.5, 0.5])

    nothing = dropping_mean(losses, weights, torch.zeros(2, 2, dtype=torch.bool))
    one = dropping_mean(losses, weights, torch.tensor([[True, False], [False, False]]))

    assert nothing.item() == (2 + 4) / 2
    assert one.item() == pytest.approx((1 + 2 + 4) / 3)
    nothing.backward()
    assert losses.grad.tolist() == [[0, 0.5], [0.5, 0]]


def test_parts_of_a_batch_have_the_mean_of_the_whole():
    losses, weights, kept = torch.rand(6, 3), torch.tensor([0.5, 0.25, 0.25]), torch.rand(6, 3) < 0.4
    sums = []
    for rows in (slice(4), slice(4, 6)):  # what each process would give to the mean over processes
        dropping_mean(losses[rows], weights, kept[rows], lambda value: sums.append(value) or value)
    mean = torch.stack(sums).mean()
    parts = [dropping_mean(losses[rows], weights, kept[rows], lambda _: mean) for rows in (slice(4), slice(4, 6))]
    torch.testing.assert_close(torch.stack(parts).mean(), dropping_mean(losses, weights, kept))


def test_nothing_dropped_is_the_weighted_mean():
    losses, weights = torch.rand(5, 3), torch.tensor([0.5, 0.25, 0.25])
    everything = dropping_mean(losses, weights, torch.ones(5, 3, dtype=torch.bool))
    torch.testing.assert_close(everything, (losses.mean(0) * weights).sum())


def test_a_draw_depends_on_seed_step_image_and_teacher_only_and_has_the_probability():
    rows = torch.arange(20000)
    kept = keep_teachers(5, 7, rows, 3, 0.3)
    shuffled = torch.randperm(20000)
    assert torch.equal(keep_teachers(5, 7, rows[shuffled], 3, 0.3), kept[shuffled])
    assert kept.float().mean(0) == pytest.approx([0.7] * 3, abs=0.015)  # four deviations

    others = {"step": keep_teachers(5, 8, rows, 3, 0.3), "far step": keep_teachers(5, 10, rows - 1, 3, 0.3)}
    others |= {"seed": keep_teachers(6, 7, rows, 3, 0.3), "seed for step": keep_teachers(7, 5, rows, 3, 0.3)}
    others |= {"image": kept.roll(1, 0), "teacher": kept.roll(1, 1)}
    for name, other in others.items():
        # Independent draws agree with the probability 0.7^2 + 0.3^2.
        assert (kept == other).float().mean().item() == pytest.approx(0.58, abs=0.01), name
    assert keep_teachers(5, 1, rows, 2, 0.0).all()
    assert not keep_teachers(5, 1, rows, 2, 1.0).any()
