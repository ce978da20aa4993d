import pytest
import timm.layers
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from theia.errors import ConfigError, ShapeError
from theia.models.backbone import StudentOptions
from theia.models.student import Student


def small_student(**options):
    return Student(StudentOptions(**{"width": 32, "depth": 2, "heads": 2, **options})).eval()


def images(height=224, width=224, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.skipif(not hasattr(timm.layers, "calculate_drop_path_rates"), reason="older timm needs values")
@pytest.mark.parametrize(("size", "count"), [("tiny", 5_524_416), ("small", 21_665_664), ("base", 85_798_656)])
def test_parameter_count_is_that_of_the_paper(size, count):
    with torch.device("meta"):
        student = Student(StudentOptions(backbone=f"theia_{size}"))
    assert sum(p.numel() for p in student.parameters()) == count


def test_tokens_equal_those_of_transformers_vit():
    student = small_student()
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
    )
    upstream = ViTModel(config, add_pooling_layer=False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in upstream.parameters():  # norms and biases too, or their order would not show
        nn.init.normal_(parameter, std=0.2, generator=generator)
    student.backbone.model.load_state_dict(to_timm(upstream.state_dict()))

    with torch.no_grad():
        tokens = student(images())
        expected = upstream(pixel_values=images() / 127.5 - 1).last_hidden_state

    torch.testing.assert_close(tokens.cls, expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.patches, expected[:, 1:], atol=1e-5, rtol=0)


def test_layer_norms_have_the_epsilon_of_the_released_models():
    assert {m.eps for m in small_student().modules() if isinstance(m, nn.LayerNorm)} == {1e-12}


def to_timm(state):
    parts = {"layernorm_before": "norm1", "layernorm_after": "norm2"}
    if any(name.startswith("layers.") for name in state):
        layers, projection = "layers", "attention.{}_proj"
        parts |= {"attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        query_key_value = "qkv"
    else:  # the names of older transformers
        layers, projection = "encoder.layer", "attention.attention.{}"
        parts |= {
            "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"
        }  # fmt: skip
        query_key_value = ("query", "key", "value")
    out = {"cls_token": state["embeddings.cls_token"], "pos_embed": state["embeddings.position_embeddings"]}
    for leaf in ("weight", "bias"):
        out[f"patch_embed.proj.{leaf}"] = state[f"embeddings.patch_embeddings.projection.{leaf}"]
        out[f"norm.{leaf}"] = state[f"layernorm.{leaf}"]
        for layer in range(2):
            qkv = [state[f"{layers}.{layer}.{projection.format(part)}.{leaf}"] for part in query_key_value]
            out[f"blocks.{layer}.attn.qkv.{leaf}"] = torch.cat(qkv)
            for theirs, ours in parts.items():
                out[f"blocks.{layer}.{ours}.{leaf}"] = state[f"{layers}.{layer}.{theirs}.{leaf}"]
    return out


@pytest.mark.parametrize(("registers", "has_cls", "others"), [(0, False, 0), (1, True, 0), (4, True, 3), (8, True, 7)])
def test_cls_counts_as_one_of_the_registers(registers, has_cls, others):
    student = small_student(registers=registers)
    tokens = student(images())
    assert (tokens.cls.shape == (2, 32)) if has_cls else tokens.cls is None
    assert tokens.registers.shape == (2, others, 32)
    assert tokens.patches.shape == (2, 196, 32)
    assert student.backbone.model.pos_embed.shape[1] == registers + 196


@pytest.mark.parametrize("registers", [0, 1, 4])
def test_tokens_are_sliced_in_the_order_cls_registers_patches(registers):
    student = small_student(registers=registers)
    tokens = student(images())
    parts = (
        [tokens.registers, tokens.patches]
        if registers == 0
        else [tokens.cls[:, None], tokens.registers, tokens.patches]
    )
    every = student.backbone.model.forward_features(images() / 127.5 - 1)
    torch.testing.assert_close(torch.cat(parts, dim=1), every)
    mean = every.mean(dim=-1)  # the final norm, of offset 0, has been applied to all of them
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)


@pytest.mark.parametrize("registers", [0, 1, 4, 8])
def test_every_variant_starts_from_the_same_distribution(registers):
    torch.manual_seed(0)
    for name, parameter in Student(StudentOptions(registers=registers, depth=1)).backbone.model.named_parameters():
        if parameter.ndim > 1:
            # cls_token has 192 values: three standard errors of their deviation are 15 %
            tolerance = 0.15 if parameter.numel() < 2000 else 0.05
            assert parameter.std().item() == pytest.approx(0.02, rel=tolerance), name
            assert abs(parameter.mean().item()) < 0.005, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("registers", [0, 1, 4])
@pytest.mark.parametrize(("height", "width"), [(96, 160), (448, 224), (16, 16)])
def test_other_image_sizes_give_their_own_grid(registers, height, width):
    tokens = small_student(registers=registers)(images(height, width))
    assert tokens.grid == (height // 16, width // 16)
    assert tokens.patches.shape == (2, height * width // 256, 32)


def test_training_size_sets_the_grid():
    student = small_student(image_size=96)
    assert student.grid_hw == (6, 6)
    assert student.backbone.model.pos_embed.shape == (1, 37, 32)


def test_patches_run_row_by_row():
    student = small_student(depth=1)
    student.backbone.model.pos_embed.data.zero_()
    dark = torch.zeros(1, 3, 48, 64, dtype=torch.uint8)
    bright = dark.clone()
    bright[:, :, 16:32, 48:64] = 255  # row 1, column 3
    change = (student(bright).patches - student(dark).patches).norm(dim=-1)[0]
    assert change.argmax().item() == 1 * 4 + 3


@pytest.mark.parametrize(("height", "width", "nearest"), [(225, 224, "224x224, 240x224"), (8, 8, "sizes: 16x16.$")])
def test_image_size_that_does_not_fit_names_the_nearest(height, width, nearest):
    with pytest.raises(ShapeError, match=nearest):
        small_student()(images(height, width))
    with pytest.raises(ShapeError, match="224x224, 240x240"):
        small_student(image_size=230)


@pytest.mark.parametrize(
    "wrong", [images().float(), images().permute(0, 2, 3, 1), images()[0]], ids=["float", "NHWC", "no batch"]
)
def test_images_of_another_kind_are_refused(wrong):
    with pytest.raises(ShapeError, match="uint8"):
        small_student()(wrong)


@pytest.mark.parametrize(
    "options", [{"backbone": "huge"}, {"registers": 2}, {"width": 33, "heads": 2}, {"depth": 0}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        Student(StudentOptions(**options))


def test_every_parameter_learns_from_the_patches_alone():
    # Otherwise distributed training would wait for gradients that never come.
    student = small_student(registers=4)
    student(images()).patches.square().mean().backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("registers", [0, 4])
def test_a_lift_is_one_more_linear_layer_on_every_token(registers):
    student, plain = (small_student(registers=registers, lift=lift) for lift in (80, None))
    plain.load_state_dict({name: value for name, value in student.state_dict().items() if "lift" not in name})
    weight, bias = student.lift.linear.weight, student.lift.linear.bias
    nn.init.normal_(bias)

    tokens, before = student(images()), plain(images())

    assert student.width == 80
    assert tokens.grid == before.grid
    for part in ("patches", "registers", "cls"):
        if (given := getattr(before, part)) is not None:
            torch.testing.assert_close(getattr(tokens, part), given @ weight.T + bias)
    kept = torch.tensor([[0, 7, 100], [3, 4, 195]])
    some, some_before = (one.forward_kept(images(), kept).patches for one in (student, plain))
    torch.testing.assert_close(some, some_before @ weight.T + bias)
    blocks, blocks_before = (one.forward_intermediates(images(), [0, 1]) for one in (student, plain))
    assert all(torch.equal(one.patches, other.patches) for one, other in zip(blocks, blocks_before, strict=True))


def test_a_lift_of_another_backbone_begins_with_a_layer_norm():
    student = Student(StudentOptions(backbone="timm:test_convnext", image_size=64, lift=80)).eval()
    found = student(images(64, 64))
    before = student.backbone.tokens(student._pixels(images(64, 64)))
    normed = torch.nn.functional.layer_norm(before.patches, before.patches.shape[-1:])
    torch.testing.assert_close(found.patches, normed @ student.lift.linear.weight.T)
    assert found.cls is None


def test_a_lift_has_a_norm_where_a_transformer_has_it_behind_the_pooling():
    name, size = "timm:vit_medium_patch16_reg4_gap_256", 256
    student = Student(StudentOptions(backbone=name, image_size=size, lift=80)).eval()
    with torch.no_grad():
        before = student.backbone.tokens(student._pixels(images(size, size))).patches
        normed = torch.nn.functional.layer_norm(before, before.shape[-1:])
        torch.testing.assert_close(student(images(size, size)).patches, normed @ student.lift.linear.weight.T)


def test_there_is_no_lift_by_default():
    assert not [name for name in small_student().state_dict() if name.startswith("lift")]


def wide_and_torchs(registers, depth=2):
    """A student with a wide last block, and torch's own layers with the weights of its end."""
    student = small_student(registers=registers, depth=depth, wide_last=80)
    state = student.backbone.model.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():  # norms and biases too, or their order would not show
        if name.startswith((f"blocks.{depth - 1}.", "norm.")):
            nn.init.normal_(value, std=0.2, generator=generator)
    last = {name.removeprefix(f"blocks.{depth - 1}."): value for name, value in state.items()}
    parts = {"norm1": "norm1", "norm2": "norm2", "linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    parts["self_attn.out_proj"] = "attn.proj"
    block = nn.TransformerEncoderLayer(80, 5, 320, 0.0, "gelu", 1e-12, batch_first=True, norm_first=True).eval()
    given = {f"{mine}.{kind}": last[f"block.{theirs}.{kind}"]
             for mine, theirs in parts.items() for kind in ("weight", "bias")}  # fmt: skip
    given |= {f"self_attn.in_proj_{kind}": last[f"block.attn.qkv.{kind}"] for kind in ("weight", "bias")}
    block.load_state_dict(given)

    def end(tokens):
        wide = block(tokens @ last["widen.weight"].T + last["widen.bias"])
        return nn.functional.layer_norm(wide, (80,), state["norm.weight"], state["norm.bias"], 1e-12), wide

    return student, end


def together(tokens):
    return torch.cat([*([] if tokens.cls is None else [tokens.cls[:, None]]), tokens.registers, tokens.patches], 1)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 1, 4])
def test_a_wide_last_block_is_a_linear_layer_and_torchs_block_of_that_width(registers):
    student, end = wide_and_torchs(registers)
    plain = small_student(registers=registers, depth=1)
    own, others = student.backbone.model.state_dict(), plain.backbone.model.state_dict()
    plain.backbone.model.load_state_dict(
        {name: value if name.startswith("norm.") else own[name] for name, value in others.items()}
    )
    (first,) = plain.forward_intermediates(images(), [0])
    expected, unnormed = end(together(first))

    tokens = student(images())
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(together(tokens), expected, **close)
    assert (student.width, tokens.patches.shape) == (80, (2, 196, 80))
    assert (tokens.cls is None) == (registers == 0)
    one, other = student.forward_intermediates(images(), [0, 1])
    assert torch.equal(one.patches, first.patches)
    torch.testing.assert_close(together(other), unnormed, **close)
    (normed,) = student.forward_intermediates(images(), [-1], norm=True)
    torch.testing.assert_close(together(normed), expected, **close)
    small, (first,) = images(96, 128), plain.forward_intermediates(images(96, 128), [0])
    torch.testing.assert_close(together(student(small)), end(together(first))[0], **close)


@torch.no_grad()
def test_a_wide_last_block_is_given_the_patches_that_are_kept():
    student, end = wide_and_torchs(1, depth=1)  # so that what it is given are embedded patches
    kept = torch.tensor([[0, 7, 100], [3, 4, 195]])
    model = student.backbone.model
    embedded = model._pos_embed(model.patch_embed(student._pixels(images())))
    there = torch.stack([torch.cat([one[:1], one[1 + rows]]) for one, rows in zip(embedded, kept, strict=True)])
    tokens = student.forward_kept(images(), kept)
    torch.testing.assert_close(together(tokens), end(there)[0], atol=1e-4, rtol=1e-4)


def test_a_wide_last_block_is_unfrozen_with_the_layer_before_it():
    student = small_student(wide_last=80)
    student.requires_grad_(False)
    student.unfreeze(1)
    free = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert free == {name for name, _ in student.named_parameters() if "blocks.1." in name or "model.norm." in name}
    assert "backbone.model.blocks.1.widen.weight" in free


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wide_last": 40}, "cannot have 40 channels: its heads have 16"),
        ({"wide_last": 0}, "cannot have 0 channels"),
        ({"wide_last": 64, "lift": 80}, "wide_last and lift both widen"),
        ({"wide_last": 64, "backbone": "timm:test_vit", "width": None, "depth": None, "heads": None},
         r"model\.wide_last do not apply to timm:test_vit"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wide_last_block_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        small_student(**options)


def test_the_norm_of_a_wide_last_block_is_for_no_other():
    with pytest.raises(ConfigError, match="final norm has the 80 channels of the wide last block"):
        small_student(wide_last=80).forward_intermediates(images(), [0, 1], norm=True)


def test_runs_under_bfloat16_autocast():
    student = small_student()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = student(images())
    with torch.no_grad():
        exact = student(images())
    torch.testing.assert_close(tokens.patches.float(), exact.patches, atol=0.1, rtol=0)


def test_compiles_without_graph_breaks():
    student = small_student(registers=4)
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()).patches, student(images()).patches)
