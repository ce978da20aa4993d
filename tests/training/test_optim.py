import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from theia.errors import ConfigError
from theia.models.backbone import StudentOptions
from theia.models.distiller import Distiller
from theia.models.student import Student
from theia.training.optim import (
    Course,
    build_optimizer,
    check_optimizer,
    learning_rate_schedule,
    parameter_groups,
    scale_learning_rate,
    warmup_then_constant,
)


@pytest.fixture
def model():
    teachers = {
        "clip": {"channels": 5, "grid_hw": [16, 16], "has_cls": True},
        "sam": {"channels": 5, "grid_hw": [64, 64], "has_cls": False},
        "odd": {"channels": 5, "grid_hw": [10, 10], "has_cls": False},
    }
    return Distiller(Student(StudentOptions(width=8, depth=1, heads=1, registers=4)), teachers, distill_cls=True)


def split_names(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{names[parameter] for parameter in group["params"]} for group in groups]


@pytest.mark.parametrize("rule", ["matrices", "authors"])
def test_every_trainable_parameter_is_in_one_group(model, rule):
    model.student.backbone.model.pos_embed.requires_grad_(False)
    decayed, kept = split_names(model, parameter_groups(model, 0.01, rule))
    assert decayed | kept == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not decayed & kept


def test_matrices_decay_and_nothing_else(model):
    groups = parameter_groups(model, 0.01)
    decayed, kept = split_names(model, groups)
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert decayed >= {
        "student.backbone.model.patch_embed.proj.weight",
        "student.backbone.model.blocks.0.attn.qkv.weight",
        "student.backbone.model.blocks.0.mlp.fc2.weight",
        "translators.clip.pad.weight",
        "translators.clip.adapter.8.weight",
        "translators.sam.adapter.4.weight",
        "cls_translators.clip.weight",
    }
    assert all(name.endswith(".weight") for name in decayed)
    assert kept >= {
        "student.backbone.model.pos_embed",
        "student.backbone.model.cls_token",
        "student.backbone.model.reg_token",
        "student.backbone.model.norm.weight",
        "translators.clip.adapter.0.weight",
        "translators.odd.adapter.4.weight",
    }


def test_authors_rule_goes_by_dimensions_and_name(model):
    decayed, _ = split_names(model, parameter_groups(model, 0.01, "authors"))
    expected = {n for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(".bias")}
    assert decayed == expected
    assert decayed >= {
        "student.backbone.model.pos_embed",
        "student.backbone.model.cls_token",
        "translators.clip.adapter.0.weight",
    }
    assert "translators.clip.adapter.0.bias" not in decayed


def test_unknown_rule_is_refused(model):
    with pytest.raises(ConfigError, match="matrices, authors"):
        parameter_groups(model, 0.01, "none")


def test_weight_decay_shrinks_what_decays_only():
    layer = nn.Linear(3, 3)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    optimizer = build_optimizer(layer, learning_rate=0.5, weight_decay=0.1)
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, torch.full((3, 3), 1 - 0.5 * 0.1))
    assert (layer.bias == 1).all()


def rates(warmup_steps, steps):
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=5e-4)
    schedule = warmup_then_constant(optimizer, warmup_steps)
    out = []
    for _ in range(steps):
        out.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    assert all(len(groups) == 1 for groups in out)
    return [groups.pop() for groups in out]


def test_warmup_is_linear_from_a_hundredth_and_then_constant():
    expected = [5e-4 * (0.01 + 0.99 * min(step / 10, 1)) for step in range(30)]
    assert rates(10, 30) == pytest.approx(expected, rel=1e-9)


def test_no_warmup_starts_at_the_full_rate():
    assert rates(0, 5) == pytest.approx([5e-4] * 5)


def test_negative_warmup_is_refused():
    with pytest.raises(ConfigError, match="0 or more"):
        rates(-1, 1)


def scheduled(schedule, optimizer, steps):
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


@pytest.mark.parametrize("warmup", [0, 1, 10, 39])
def test_a_cosine_is_that_of_torch_and_then_zero(warmup):
    theirs, ours = (SGD([nn.Parameter(torch.zeros(1))], lr=2e-3) for _ in range(2))
    rising = LinearLR(theirs, 0.01, total_iters=max(warmup, 1))
    falling = CosineAnnealingLR(theirs, 40 - warmup)
    expected = scheduled(SequentialLR(theirs, [rising, falling], [warmup]), theirs, 41)

    rates = scheduled(learning_rate_schedule(ours, Course("cosine", 40, warmup)), ours, 45)

    assert rates[:41] == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert rates[40:] == [0] * 5
    assert all(rates[:40])


@pytest.mark.parametrize(("steps", "warmup", "decay_from"), [(100, 10, 80), (7, 0, 6), (100, 80, 80), (3, 1, 2)])
def test_wsd_is_flat_until_the_last_fifth_and_falls_linearly_to_zero(steps, warmup, decay_from):
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    corners = ([0, warmup, decay_from, steps], [0.01 if warmup else 1, 1, 1, 0])
    expected = 2e-3 * np.interp(range(steps + 5), *corners)

    rates = scheduled(learning_rate_schedule(optimizer, Course("wsd", steps, warmup)), optimizer, steps + 5)

    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_a_constant_rate_is_that_of_its_course():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=5e-4)
    course = Course("constant", 30, 10)

    rates = scheduled(learning_rate_schedule(optimizer, course), optimizer, 30)

    assert rates == pytest.approx([5e-4 * course.share(step) for step in range(30)], rel=1e-9)


def test_betas_reach_the_optimiser():
    assert build_optimizer(nn.Linear(2, 2), 1e-3, betas=(0.9, 0.95)).defaults["betas"] == (0.9, 0.95)


def test_learning_rate_is_linear_in_the_global_batch():
    assert scale_learning_rate(5e-4, 128) == 5e-4
    assert scale_learning_rate(5e-4, 1024) == pytest.approx(4e-3)
    assert scale_learning_rate(1e-3, 32, reference=64) == pytest.approx(5e-4)


def test_muon_is_given_the_matrices_and_adamw_within_it_the_rest():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    theirs = copy.deepcopy(ours)
    optimizers = [
        build_optimizer(ours, 0.02, 0.1, name="timm.optim.Muon", options={"ns_coefficients": "original"}),
        torch.optim.Muon([theirs[0].weight], lr=0.02, weight_decay=0.1, nesterov=False, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [theirs[0].bias, *theirs[1].parameters()], lr=0.02, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-7
        ),
    ]
    inputs = torch.randn(8, 4)
    for _ in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            model(inputs).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    # Both iterate in bfloat16, in another order; an update of AdamW would be three times as large.
    torch.testing.assert_close(ours[0].weight, theirs[0].weight, rtol=0, atol=3e-3)
    torch.testing.assert_close(ours[0].bias, theirs[0].bias, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours[1].weight, theirs[1].weight, rtol=1e-3, atol=1e-4)


def test_any_optimiser_of_torch_takes_the_groups():
    optimizer = build_optimizer(nn.Linear(2, 2), 0.1, 0.5, name="torch.optim.SGD", options={"momentum": 0.9})
    assert type(optimizer) is torch.optim.SGD
    assert [(group["lr"], group["momentum"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, 0.9, 0.5),
        (0.1, 0.9, 0.0),
    ]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("muon", {}, "such as timm.optim.Muon"),
        ("torch.optim.Moun", {}, "cannot be imported"),
        ("torch.nn.Linear", {}, "no class of torch.optim.Optimizer"),
        ("torch.optim.SGD", {"momentun": 0.9}, "momentun"),
        ("torch.optim.SGD", {"momentum": -1.0}, "momentum"),
        ("torch.optim.LBFGS", {}, "parameter groups"),
        ("torch.optim.SparseAdam", {}, "dense gradients"),
        ("torch.optim.AdamW", {"weight_decay": 0.3}, "--model.weight_decay"),
        ("torch.optim.AdamW", {"betas": (0.9, 0.9)}, "--model.betas"),
        ("torch.optim.SGD", {"lr": 0.3}, "--model.learning_rate"),
        ("torch.optim.Muon", {}, "timm.optim.Muon gives the other parameters to AdamW"),
    ],
)
def test_an_unknown_optimiser_or_option_is_refused(name, options, said):
    with pytest.raises(ConfigError, match=said):
        check_optimizer(name, options)


def test_betas_are_adamws_alone():
    with pytest.raises(ConfigError, match="optimizer_options"):
        check_optimizer("timm.optim.Lion", {}, (0.9, 0.95))
    lion = build_optimizer(nn.Linear(2, 2), 1e-3, name="timm.optim.Lion", options={"betas": (0.9, 0.98)})
    assert lion.defaults["betas"] == (0.9, 0.98)
    check_optimizer("timm.optim.Adan", {})  # which has three


def test_a_check_of_the_optimiser_draws_no_random_numbers():
    torch.manual_seed(0)
    check_optimizer("timm.optim.Muon", {"nesterov": True})
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
