import copy

import numpy as np
import pytest
import timm.layers
import torch

from theia.data.numbered import _MOST_SIZES
from theia.errors import ConfigError, ShapeError
from theia.models.backbone import StudentOptions
from theia.models.distiller import Distiller, SomePatches
from theia.models.student import Student
from theia.models.translators import on_grid
from theia.training.balance import weighted_mean
from theia.training.losses import FeatureLoss

TEACHERS = {
    "odd": {"channels": 48, "grid_hw": [10, 10], "has_cls": False},
    "clip": {"channels": 12, "grid_hw": [16, 16], "has_cls": True},
}


def small_distiller(teachers=TEACHERS, registers=1, image_size=224, lift=None, wide_last=None, **options):
    torch.manual_seed(0)
    student = Student(
        StudentOptions(
            width=32, depth=2, heads=2, registers=registers, image_size=image_size, lift=lift, wide_last=wide_last
        )
    )
    return Distiller(student, teachers, **options)


def images(count=2, size=224):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.skipif(not hasattr(timm.layers, "calculate_drop_path_rates"), reason="older timm needs values")
@pytest.mark.parametrize(("size", "millions"), [("tiny", 10.04), ("small", 36.66), ("base", 139.68)])
def test_parameters_of_the_default_teachers_total_those_of_the_paper(size, millions):
    channels = {"clip": 1024, "dinov2": 1024, "vit": 1280}
    teachers = {name: {"channels": count, "grid_hw": [16, 16], "has_cls": True} for name, count in channels.items()}
    with torch.device("meta"):
        distiller = Distiller(Student(StudentOptions(backbone=f"theia_{size}")), teachers)
    assert round(sum(p.numel() for p in distiller.parameters()) / 1e6, 2) == millions


def test_one_prediction_per_teacher():
    tokens, patches, cls = small_distiller()(images())
    assert tokens.patches.shape == (2, 196, 32)
    assert {name: tuple(prediction.shape) for name, prediction in patches.items()} == {
        "odd": (2, 100, 48),
        "clip": (2, 256, 12),
    }
    assert cls == {}


@torch.no_grad()
def test_a_ladder_reads_every_block_after_the_final_norm():
    distiller = small_distiller(translator="ladder")
    for parameter in distiller.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vit = distiller.student.backbone.model
    seen = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, given, tokens: seen.append(vit.norm(tokens)[:, 1:]))

    tokens, patches, _ = distiller(images())

    assert len(seen) == 2
    torch.testing.assert_close(tokens.patches, seen[-1])
    side_by_side = torch.cat(seen, -1)
    for name, translator in distiller.translators.items():
        torch.testing.assert_close(patches[name], translator(side_by_side, (14, 14)))
    same = distiller.student(images())
    torch.testing.assert_close(tokens.patches, same.patches)
    torch.testing.assert_close(tokens.cls, same.cls)


@pytest.mark.parametrize("rung", [0, 1])
def test_every_rung_of_a_ladder_sends_a_gradient_into_its_block_and_those_before(rung):
    distiller = small_distiller({"odd": TEACHERS["odd"]}, translator="ladder")
    second = distiller.translators["odd"].last
    with torch.no_grad():  # 32 channels come from the first block, 4 x 32 from the second
        second.weight[:, slice(32, None) if rung == 0 else slice(32)] = 0

    distiller(images())[1]["odd"].square().mean().backward()

    blocks = distiller.student.backbone.blocks()
    reached = [bool(block.mlp.fc1.weight.grad.any()) for block in blocks]
    assert reached == [number <= rung for number in range(len(blocks))]


@pytest.mark.parametrize("stage", [None, 2])
def test_a_ladder_takes_the_blocks_of_timms_transformers_up_to_the_stage_in_use(stage):
    student = Student(StudentOptions(backbone="timm:test_vit", image_size=64, backbone_stage=stage))
    distiller = Distiller(student, {"odd": TEACHERS["odd"]}, translator="ladder")
    tokens, patches, _ = distiller(images(2, 64))
    assert len(distiller.translators["odd"].adapter[1].rungs) == (6 if stage is None else 3)
    assert patches["odd"].shape == (2, 100, 48)
    torch.testing.assert_close(tokens.patches, student(images(2, 64)).patches)


@pytest.mark.parametrize("kind", ["mlp", "ladder", "transformer"])
def test_other_translators_are_compiled_without_a_break(kind):
    distiller = small_distiller(image_size=64, translator=kind)
    compiled = torch.compile(distiller.forward, dynamic=False, fullgraph=True, backend="eager")
    for given, expected in zip(compiled(images(2, 64))[1].values(), distiller(images(2, 64))[1].values(), strict=True):
        torch.testing.assert_close(given, expected)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["theia_tiny", "timm:test_vit"])
def test_patches_that_are_left_out_are_not_seen_and_the_translators_get_the_mask(backbone):
    size = {"width": 32, "depth": 2, "heads": 2} if backbone == "theia_tiny" else {}
    student = Student(StudentOptions(backbone=backbone, image_size=64, **size)).eval()
    distiller = Distiller(student, {"odd": TEACHERS["odd"] | {"grid_hw": [4, 4]}}, translator="linear").eval()
    kept, mask = torch.tensor([[1, 2, 7, 12], [0, 3, 8, 15]]), torch.randn(student.width)
    seen = images(2, 64)
    changed = seen.clone()
    changed[0, :, 16:32, :48] = 0  # patches 4 to 6
    changed[1, :, 48:, :48] = 255  # patches 12 to 14

    tokens, patches, _ = distiller(seen, SomePatches(kept, mask))
    again, _, _ = distiller(changed, SomePatches(kept, mask))

    assert tokens.grid == (4, 4)
    assert torch.equal(tokens.patches, again.patches)
    gone = torch.ones(2, 16, dtype=torch.bool).scatter(1, kept, False)
    assert (tokens.patches[gone] == mask).all()
    last = distiller.translators["odd"].last
    torch.testing.assert_close(patches["odd"], tokens.patches @ last.weight.T + last.bias)
    changed[0, :, :16, 16:32] = 0  # patch 1, which is kept, and which those beside it attend to
    other = distiller(changed, SomePatches(kept, mask))[0].patches
    assert (other[0, [2, 7, 12]] != tokens.patches[0, [2, 7, 12]]).any(-1).all()


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 1, 4])
def test_a_student_that_is_given_all_patches_in_any_order_is_the_whole_one(registers):
    distiller = small_distiller(registers=registers, image_size=64).eval()
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    expected, translated, _ = distiller(images(2, 64))

    tokens, patches, _ = distiller(images(2, 64), SomePatches(order, torch.full((32,), torch.nan)))

    torch.testing.assert_close(tokens.patches, expected.patches)
    torch.testing.assert_close(tokens.registers, expected.registers)
    torch.testing.assert_close(patches, translated)


def test_patches_are_left_out_of_compiled_code_without_a_break():
    distiller, some = small_distiller(image_size=64), SomePatches(torch.tensor([[3, 5], [0, 9]]), torch.ones(32))
    compiled = torch.compile(distiller.forward, dynamic=False, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(2, 64), some)[1], distiller(images(2, 64), some)[1])


def test_a_ladder_needs_blocks():
    student = Student(StudentOptions(backbone="timm:test_convnext", image_size=64))
    with pytest.raises(ConfigError, match=r"'ladder' takes the tokens of every transformer block.*no such blocks"):
        Distiller(student, TEACHERS, translator="ladder")


def test_other_sizes_are_translated_onto_the_same_grids():
    distiller = small_distiller()
    _, usual, _ = distiller(images())
    tokens, others, _ = distiller(images(size=288))
    assert tokens.grid == (18, 18)
    assert {name: x.shape for name, x in others.items()} == {name: x.shape for name, x in usual.items()}
    head = distiller.translators["clip"]
    torch.testing.assert_close(others["clip"], head(on_grid(tokens.patches, (18, 18), (14, 14)), (14, 14)))


def counted(distiller, **options):
    """The compiled forward pass, and a list of the graphs that were compiled."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    return torch.compile(distiller.forward, dynamic=False, backend=backend, **options), compiled


@pytest.mark.slow
def test_each_size_is_compiled_once():
    """As many as data.image_sizes may name, and that of validation: torch.compile would run more of them uncompiled."""
    distiller = small_distiller(image_size=64)
    forward, compiled = counted(distiller)
    for _ in range(2):
        for size in range(32, 32 + 16 * _MOST_SIZES, 16):
            forward(images(size=size))
    distiller.eval()
    with torch.no_grad():
        forward(images(size=64))
    assert len(compiled) == _MOST_SIZES + 1


@pytest.mark.slow
def test_each_choice_of_teachers_is_compiled_once_and_computes_those_alone():
    distiller = small_distiller(image_size=64)
    forward, compiled = counted(distiller, fullgraph=True)
    _, whole, _ = distiller(images(size=64))
    for _ in range(2):
        for chosen in (None, ("odd",), ("clip",)):
            _, found, _ = forward(images(size=64), None, chosen)
            assert found.keys() == set(chosen or distiller.teachers)
            for name, values in found.items():
                torch.testing.assert_close(values, whole[name])
    assert len(compiled) == 3


def test_cls_is_distilled_for_the_teachers_that_have_one():
    distiller = small_distiller(distill_cls=True)
    tokens, _, cls = distiller(images())
    assert distiller.cls_teachers == list(cls) == ["clip"]
    head = distiller.cls_translators["clip"]
    torch.testing.assert_close(cls["clip"], tokens.cls @ head.weight.T + head.bias)


@pytest.mark.parametrize("end", ["lift", "wide_last"])
def test_translators_are_given_wider_tokens_and_a_ladder_has_none(end):
    distiller = small_distiller(**{end: 48}, distill_cls=True)
    tokens, patches, cls = distiller(images())
    assert tokens.patches.shape[-1] == tokens.cls.shape[-1] == 48
    head = distiller.translators["clip"]
    torch.testing.assert_close(patches["clip"], head(tokens.patches, tokens.grid))
    torch.testing.assert_close(cls["clip"], distiller.cls_translators["clip"](tokens.cls))
    with pytest.raises(ConfigError, match=rf"'ladder' takes the tokens of .*model\.{end}"):
        small_distiller(**{end: 48}, translator="ladder")


def test_cls_distillation_needs_a_cls_token_on_both_sides():
    with pytest.raises(ConfigError, match="none of these teachers gives a CLS token: odd"):
        small_distiller({"odd": TEACHERS["odd"]}, distill_cls=True)
    with pytest.raises(ConfigError, match="registers must be"):
        small_distiller(registers=0, distill_cls=True)


@pytest.mark.parametrize(
    "teachers",
    [
        {},
        {"clip": {"channels": 8}},
        {"clip": {**TEACHERS["clip"], "grid_hw": 16}},
        {"clip": {**TEACHERS["clip"], "channels": 0}},
    ],
    ids=["none", "incomplete", "grid", "channels"],
)
def test_teachers_that_cannot_be_distilled_are_refused(teachers):
    with pytest.raises(ConfigError, match="eacher"):
        small_distiller(teachers)


def test_normalised_features_have_mean_0_and_deviation_1_and_back():
    raw = np.random.default_rng(0).normal(size=(6, 256, 12)) * np.arange(1, 13) + 100
    distiller = small_distiller()
    distiller.set_statistics("clip", raw.mean((0, 1)), raw.std((0, 1)))
    stored = torch.from_numpy(raw.astype(np.float16))
    normal = distiller.normalize("clip", stored)
    assert normal.dtype == torch.float32
    expected = (stored.numpy().astype(np.float64) - raw.mean((0, 1))) / raw.std((0, 1))
    np.testing.assert_allclose(normal.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(distiller.denormalize("clip", normal).numpy(), stored.float().numpy(), rtol=1e-6)


def test_int8_features_are_scaled_per_image_and_channel():
    rng = np.random.default_rng(0)
    values, scale = rng.integers(-127, 128, (2, 256, 12), dtype=np.int8), rng.random((2, 2, 12), dtype=np.float32)
    mean, std = rng.normal(size=12), rng.random(12) + 0.5
    distiller = small_distiller()
    distiller.set_statistics("clip", mean, std)
    normal = distiller.normalize("clip", torch.from_numpy(values), torch.from_numpy(scale))
    np.testing.assert_allclose(normal.numpy(), (values * scale[:, :1] + scale[:, 1:] - mean) / std, atol=1e-3)


def test_int8_without_a_scale_per_channel_is_refused():
    distiller = small_distiller()
    distiller.set_statistics("clip", torch.zeros(12), torch.ones(12))
    quantised = torch.zeros(2, 256, 12, dtype=torch.int8)
    with pytest.raises(ShapeError, match="without scales"):
        distiller.normalize("clip", quantised)
    with pytest.raises(ShapeError, match="for each channel"):
        distiller.normalize("clip", quantised, torch.ones(2))
    with pytest.raises(ShapeError, match="with scales"):
        distiller.normalize("clip", quantised.half(), torch.ones(2, 2, 12))


def test_nothing_is_normalised_before_statistics_are_set():
    distiller = small_distiller(distill_cls=True)
    with pytest.raises(ConfigError, match="'clip' has no statistics"):
        distiller.normalize("clip", torch.zeros(1, 256, 12))
    with pytest.raises(ConfigError, match="'clip' has no statistics"):
        distiller.denormalize("clip", torch.zeros(1, 256, 12))
    with pytest.raises(ConfigError, match="CLS of teacher 'clip' has no statistics"):
        distiller.normalize_cls("clip", torch.zeros(1, 12))
    with pytest.raises(ConfigError, match="no statistics of it"):
        distiller.set_statistics("clip", torch.zeros(12), torch.ones(12))


def test_statistics_travel_with_the_weights():
    distiller, other = small_distiller(distill_cls=True), small_distiller(distill_cls=True)
    distiller.set_statistics("clip", torch.full((12,), 3.0), torch.full((12,), 2.0), torch.ones(12), torch.ones(12))
    other.load_state_dict(distiller.state_dict())
    for copied in (other, copy.deepcopy(distiller)):
        assert (copied.normalize("clip", torch.full((1, 256, 12), 7.0)) == 2).all()
        assert (copied.normalize_cls("clip", torch.full((1, 12), 7.0)) == 6).all()
    with pytest.raises(ConfigError, match="'odd' has no statistics"):
        other.normalize("odd", torch.zeros(1, 100, 48))


@pytest.mark.parametrize(
    ("name", "mean", "std", "error", "message"),
    [
        ("dinov2", torch.zeros(12), torch.ones(12), ConfigError, "odd, clip"),
        ("clip", torch.zeros(13), torch.ones(13), ShapeError, "12 channels"),
        ("clip", torch.zeros(12), torch.zeros(12), ConfigError, "positive"),
        ("clip", torch.full((12,), torch.nan), torch.ones(12), ConfigError, "finite"),
    ],
)
def test_unusable_statistics_are_refused(name, mean, std, error, message):
    with pytest.raises(error, match=message):
        small_distiller().set_statistics(name, mean, std)


def test_the_loss_falls_on_a_tiny_fit():
    teachers = {
        "a": {"channels": 6, "grid_hw": [4, 4], "has_cls": True},
        "b": {"channels": 3, "grid_hw": [2, 5], "has_cls": False},
    }
    distiller = small_distiller(teachers, image_size=64, distill_cls=True)
    targets = {"a": torch.randn(4, 16, 6), "b": torch.randn(4, 10, 3)}
    cls_target = torch.randn(4, 6)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        _, patches, cls = distiller(images(4, 64))
        losses = {name: FeatureLoss()(patches[name], target) for name, target in targets.items()}
        loss = weighted_mean(losses) + FeatureLoss()(cls["a"], cls_target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.2 * history[0]
    assert all(parameter.grad is not None for parameter in distiller.parameters())
