from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from theia.errors import ConfigError, ShapeError
from theia.models.translators import Translator, TranslatorKind, on_grid

WIDTHS = {"tiny": 192, "small": 384, "base": 768}
HEADS = {  # channels, side of the grid, parameters for tiny, small, base
    "vit": (1280, 16, (1_537_856, 5_065_088, 18_091_520)),
    "clip": (1024, 16, (1_488_448, 4_966_528, 17_894_656)),
    "sam": (256, 64, (3_085_504, 8_161_408, 24_285_184)),
    "depth_anything": (32, 64, (3_042_272, 8_075_168, 24_112_928)),
}


@pytest.mark.parametrize("size", range(3), ids=list(WIDTHS))
@pytest.mark.parametrize("head", HEADS)
def test_parameter_count_is_that_of_the_paper(head, size):
    channels, side, counts = HEADS[head]
    with torch.device("meta"):
        translator = Translator(list(WIDTHS.values())[size], (14, 14), channels, (side, side))
    assert sum(p.numel() for p in translator.parameters()) == counts[size]


class Tokens(nn.Module):
    def forward(self, maps):
        return maps.permute(0, 2, 3, 1).flatten(1, 2)


def published_16x16(width, channels):
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 3),
        nn.LayerNorm([width, 16, 16]),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.LayerNorm([width, 16, 16]),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.LayerNorm([width, 16, 16]),
        Tokens(),
        nn.Linear(width, channels),
    )


def published_64x64(width, channels):
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 3),
        nn.LayerNorm([width, 16, 16]),
        nn.ConvTranspose2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.LayerNorm([width, 31, 31]),
        nn.ConvTranspose2d(width, width, 3, stride=2, output_padding=1),
        nn.ReLU(),
        nn.LayerNorm([width, 64, 64]),
        Tokens(),
        nn.Linear(width, channels),
    )


@pytest.mark.parametrize(("side", "published"), [(16, published_16x16), (64, published_64x64)])
def test_predictions_equal_the_published_layers(side, published):
    torch.manual_seed(0)
    expected = published(6, 5)
    for parameter in expected.parameters():
        nn.init.normal_(parameter)
    translator = Translator(6, (14, 14), 5, (side, side))
    # the published names: 0 is their pad, n + 1 their adapter.n
    state = {f"pad.{leaf}": getattr(expected[0], leaf) for leaf in ("weight", "bias")}
    for index in (0, 1, 3, 4, 6, 8):
        state |= {f"adapter.{index}.{leaf}": getattr(expected[index + 1], leaf) for leaf in ("weight", "bias")}
    translator.load_state_dict(state)

    patches = torch.randn(2, 196, 6)
    maps = patches.reshape(2, 14, 14, 6).permute(0, 3, 1, 2)
    torch.testing.assert_close(translator(patches, (14, 14)), expected(maps))


@pytest.mark.parametrize("kind", get_args(TranslatorKind))
@pytest.mark.parametrize("student_grid", [(14, 14), (6, 6), (5, 8)])
@pytest.mark.parametrize("grid", [(10, 10), (37, 37), (14, 14), (16, 20), (1, 1), (16, 16), (6, 6)])
def test_any_pair_of_grids_works(kind, student_grid, grid):
    tokens = student_grid[0] * student_grid[1]
    translator = Translator(8, student_grid, 48, grid, kind)
    prediction = translator(torch.randn(2, tokens, 8), student_grid)
    assert prediction.shape == (2, grid[0] * grid[1], 48)
    prediction.sum().backward()
    assert all(parameter.grad is not None for parameter in translator.parameters())


@pytest.mark.parametrize(("student_grid", "grid"), [((14, 14), (10, 10)), ((6, 6), (16, 20)), ((6, 6), (6, 6))])
def test_linear_translator_is_a_resize_and_one_linear_layer(student_grid, grid):
    translator = Translator(8, student_grid, 5, grid, "linear")
    layers = [layer for layer in translator.modules() if list(layer.parameters(recurse=False))]
    assert [type(layer) for layer in layers] == [nn.Linear]
    patches = torch.randn(2, student_grid[0] * student_grid[1], 8)
    maps = F.linear(patches, layers[0].weight, layers[0].bias).mT.unflatten(2, student_grid)
    # bilinear weights sum to one, so resizing after the layer is the same as before it
    expected = F.interpolate(maps, grid, mode="bilinear", antialias=True).flatten(2).mT
    torch.testing.assert_close(translator(patches, student_grid), expected, atol=1e-5, rtol=1e-5)


def resized(tokens, student_grid, grid):
    maps = tokens.mT.unflatten(2, student_grid)
    return F.interpolate(maps, grid, mode="bilinear", antialias=True).flatten(2).mT


def randomised(translator):
    for parameter in translator.parameters():
        nn.init.normal_(parameter, std=0.3)
    return translator


def with_parameters_of(expected, translator):
    """The module with the parameters of the translator, in their order."""
    given = list(translator.parameters())
    assert [p.shape for p in given] == [p.shape for p in expected.parameters()]
    for parameter, value in zip(expected.parameters(), given, strict=True):
        parameter.data = value.data
    return expected


GRIDS = [((14, 14), (10, 10)), ((6, 6), (16, 20)), ((6, 6), (6, 6))]


@pytest.mark.parametrize(("student_grid", "grid"), GRIDS)
def test_mlp_is_two_layers_for_each_resized_token(student_grid, grid):
    translator = randomised(Translator(8, student_grid, 5, grid, "mlp"))
    layers = with_parameters_of(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 5)), translator)
    patches = torch.randn(2, student_grid[0] * student_grid[1], 8)
    expected = layers(resized(patches, student_grid, grid))
    torch.testing.assert_close(translator(patches, student_grid), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("student_grid", "grid"), GRIDS)
def test_ladder_is_the_sum_of_an_mlp_for_each_block(student_grid, grid):
    translator = randomised(Translator(8, student_grid, 5, grid, "ladder", blocks=3))
    blocks = [torch.randn(2, student_grid[0] * student_grid[1], 8) for _ in range(3)]
    *weights, second, bias = translator.parameters()
    firsts = list(zip(weights[::2], weights[1::2], strict=True))
    assert [len(first_bias) for _, first_bias in firsts] == [8, 8, 32]
    seconds = second.split([8, 8, 32], 1)
    total = bias + sum(
        F.gelu(tokens @ first.T + shift) @ second.T
        for tokens, (first, shift), second in zip(blocks, firsts, seconds, strict=True)
    )
    expected = resized(total, student_grid, grid)
    torch.testing.assert_close(translator(torch.cat(blocks, -1), student_grid), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("student_grid", "grid"), GRIDS)
def test_transformer_is_torchs_pre_norm_layer_with_layer_scale_and_a_linear_layer(student_grid, grid):
    translator = randomised(Translator(128, student_grid, 5, grid, "transformer")).eval()
    own = translator.state_dict()
    block = {name.removeprefix("adapter.1."): value for name, value in own.items() if name.startswith("adapter.1.")}
    expected = nn.TransformerEncoderLayer(
        128, 2, 512, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )  # fmt: skip
    attended, grown = block["ls1.gamma"], block["ls2.gamma"]
    theirs = {
        "self_attn.in_proj_weight": block["attn.qkv.weight"], "self_attn.in_proj_bias": block["attn.qkv.bias"],
        "self_attn.out_proj.weight": attended[:, None] * block["attn.proj.weight"],
        "self_attn.out_proj.bias": attended * block["attn.proj.bias"],
        "linear1.weight": block["mlp.fc1.weight"], "linear1.bias": block["mlp.fc1.bias"],
        "linear2.weight": grown[:, None] * block["mlp.fc2.weight"], "linear2.bias": grown * block["mlp.fc2.bias"],
        **{f"{norm}.{leaf}": block[f"{norm}.{leaf}"] for norm in ("norm1", "norm2") for leaf in ("weight", "bias")},
    }  # fmt: skip
    expected.load_state_dict(theirs)
    patches = torch.randn(2, student_grid[0] * student_grid[1], 128)
    tokens = expected.eval()(patches)
    expected = F.linear(resized(tokens, student_grid, grid), translator.last.weight, translator.last.bias)
    torch.testing.assert_close(translator(patches, student_grid), expected, atol=1e-3, rtol=1e-3)


def test_a_new_transformer_is_nearly_a_linear_translator():
    translator = Translator(8, (6, 6), 5, (6, 6), "transformer")
    patches = torch.randn(2, 36, 8)
    torch.testing.assert_close(translator(patches, (6, 6)), translator.last(patches), atol=1e-2, rtol=0)
    for scale in (translator.adapter[1].ls1, translator.adapter[1].ls2):
        assert (scale.gamma == 1e-4).all()


@pytest.mark.parametrize(
    ("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (64, 1), (96, 1), (272, 4), (8, 1)]
)
def test_heads_of_a_transformer_are_as_wide_as_those_of_the_students(width, heads):
    with torch.device("meta"):
        translator = Translator(width, (14, 14), 5, (14, 14), "transformer")
    assert translator.adapter[1].attn.num_heads == heads


@pytest.mark.parametrize("grid", [(16, 16), (64, 64)])
def test_parameters_by_kind(grid):
    c, channels, blocks = 192, 1024, 12
    out = channels + channels * c
    rungs, hidden = (blocks - 1) * (c * c + c) + 4 * (c * c + c), (blocks - 1) * c + 4 * c
    expected = {
        "linear": out,
        "mlp": c * c + 3 * c + out,  # a linear layer and a norm
        "ladder": rungs + hidden * channels + channels,
        "transformer": 12 * c * c + 15 * c + out,  # four matrices, two norms, two scales
    }
    for kind, count in expected.items():
        with torch.device("meta"):
            translator = Translator(c, (14, 14), channels, grid, kind, blocks)
        assert sum(p.numel() for p in translator.parameters()) == count, kind


@pytest.mark.parametrize("kind", get_args(TranslatorKind))
@pytest.mark.parametrize("grid", [(6, 6), (4, 9)])
def test_the_last_layer_can_be_had_apart(kind, grid):
    translator = randomised(Translator(8, (6, 6), 5, grid, kind))
    patches = torch.randn(2, 36, 8)
    prediction = translator.resize(translator.last(translator.before_last(patches, (6, 6))))
    torch.testing.assert_close(prediction, translator(patches, (6, 6)))


def test_every_student_token_counts_when_the_grid_shrinks():
    translator = Translator(4, (14, 14), 3, (3, 3), "linear")
    patches = torch.randn(1, 196, 4, requires_grad=True)
    translator(patches, (14, 14)).sum().backward()
    assert (patches.grad.norm(dim=-1) > 0).all()


def test_general_rule_has_the_layers_of_the_16x16_head_where_the_grids_are_equal():
    torch.manual_seed(0)
    translator = Translator(6, (16, 16), 5, (16, 16))
    expected = nn.Sequential(*list(published_16x16(6, 5))[1:])
    expected.load_state_dict({name.removeprefix("adapter."): p for name, p in translator.state_dict().items()})
    patches = torch.randn(2, 256, 6)
    torch.testing.assert_close(translator(patches, (16, 16)), expected(patches.mT.unflatten(2, (16, 16))))


def test_tokens_on_another_grid_are_refused():
    translator = Translator(8, (14, 14), 5, (16, 16))
    with pytest.raises(ShapeError, match="7x28"):
        translator(torch.randn(1, 196, 8), (7, 28))


def ramp(side):
    """Tokens whose two channels are the row and the column of their centre, from 0 to 1."""
    centre = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.stack(torch.meshgrid(centre, centre, indexing="ij"), -1).flatten(0, 1)[None].float()


@pytest.mark.parametrize("given", [10, 28])
def test_tokens_keep_their_place_on_another_grid(given):
    """Bilinear interpolation, and a symmetric filter over two tokens, give a linear function back within the edges."""
    found, expected = (
        tokens.unflatten(1, (14, 14))[:, 1:-1, 1:-1]
        for tokens in (on_grid(ramp(given), (given, given), (14, 14)), ramp(14))
    )
    torch.testing.assert_close(found, expected)


def test_every_token_counts_on_a_smaller_grid():
    tokens = torch.randn(1, 28 * 28, 3, requires_grad=True)
    on_grid(tokens, (28, 28), (14, 14)).sum().backward()
    torch.testing.assert_close(tokens.grad.sum(1)[0], torch.full((3,), 14.0 * 14))
    assert (tokens.grad > 0).all()


def test_tokens_on_the_wanted_grid_are_left_alone():
    tokens = torch.randn(1, 6, 3)
    assert on_grid(tokens, (2, 3), (2, 3)) is tokens


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="cnn, linear, mlp, ladder, transformer"):
        Translator(8, (14, 14), 5, (16, 16), "perceptron")


@pytest.mark.parametrize("kind", get_args(TranslatorKind))
@pytest.mark.parametrize("grid", [(16, 16), (10, 10)])
def test_runs_under_bfloat16_autocast(grid, kind):
    translator = Translator(8, (14, 14), 5, grid, kind)
    patches = torch.randn(2, 196, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prediction = translator(patches, (14, 14))
    with torch.no_grad():
        torch.testing.assert_close(prediction.float(), translator(patches, (14, 14)), atol=0.1, rtol=0)
