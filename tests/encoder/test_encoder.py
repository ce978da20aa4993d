import copy

import numpy as np
import pytest
import torch
from encoder.small import small

from theia.encoder.encoder import Encoder
from theia.errors import ConfigError, ImageError, ShapeError, UnknownTeacherError


def images(height: int = 224, width: int = 224, count: int = 2) -> torch.Tensor:
    return torch.randint(256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "given",
    [
        lambda batch: batch.permute(0, 3, 1, 2),
        lambda batch: batch / 255,
        lambda batch: (batch / 255).permute(0, 3, 1, 2),
        lambda batch: (batch / 255).double(),
        lambda batch: batch.numpy(),
    ],
    ids=["NCHW", "float", "float NCHW", "double", "numpy"],
)
@torch.no_grad()
def test_the_same_images_in_any_form_give_the_same_features(encoder: Encoder, given) -> None:
    torch.testing.assert_close(encoder(given(images())), encoder(images()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (images().float(), ImageError, "from 0 to 255: they look like 0 to 255"),
        (images() / 127.5 - 1, ImageError, "from -1 to 1: they look normalised already"),
        (images().float() * 1000, ImageError, "they are no images"),
        (torch.full((1, 16, 16, 3), float("nan")), ImageError, "not numbers"),
        (images().int(), ImageError, "type torch.int32"),
        (images()[0], ShapeError, r"\(224, 224, 3\).*images\[None\]"),
        (torch.zeros(1, 4, 32, 32, dtype=torch.uint8), ShapeError, "Drop the fourth channel"),
        (torch.zeros(1, 32, 32, 1, dtype=torch.uint8), ShapeError, "Repeat the grey channel"),
        (torch.zeros(1, 3, 32, 3, dtype=torch.uint8), ShapeError, r"\(B, H, W, 3\) or \(B, 3, H, W\)"),
        ([[1]], ShapeError, "list"),
        (images(100, 224), ShapeError, "nearest sizes: 96x224, 112x224"),
    ],
)
def test_anything_else_is_refused_with_what_it_got(encoder: Encoder, given, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        encoder(given)


@torch.no_grad()
def test_tokens_and_their_map_agree(encoder: Encoder) -> None:
    tokens = encoder.forward_features(images(96, 160))
    assert tokens.grid == (6, 10)
    assert tokens.cls.shape == (2, 32)
    assert tokens.registers.shape == (2, 0, 32)
    assert tokens.as_map().shape == (2, 32, 6, 10)
    assert torch.equal(tokens.as_map()[1, :, 4, 7], tokens.patches[1, 4 * 10 + 7])


@torch.no_grad()
def test_pooling(encoder: Encoder) -> None:
    tokens = encoder.forward_features(images())
    assert torch.equal(encoder(images()), tokens.patches)
    assert torch.equal(encoder(images(), pool="mean"), tokens.patches.mean(1))
    assert torch.equal(encoder(images(), pool="max"), tokens.patches.max(1).values)
    assert torch.equal(encoder(images(), pool="cls"), tokens.cls)
    with pytest.raises(ConfigError, match=r"'median'.*none, mean, max, cls"):
        encoder(images(), pool="median")
    with pytest.raises(ConfigError, match="no CLS token"):
        Encoder(small(registers=0))(images(), pool="cls")


@torch.no_grad()
def test_intermediates_are_the_blocks_own_outputs(encoder: Encoder) -> None:
    seen = {}
    for number, block in enumerate(encoder.distiller.student.vit.blocks):
        block.register_forward_hook(lambda _, __, output, number=number: seen.__setitem__(number, output))
    tokens = encoder.forward_features(images())
    found = encoder.forward_intermediates(images(), indices=[2, 0, -2])
    for given, number in zip(found, (2, 0, 1), strict=True):
        torch.testing.assert_close(torch.cat([given.cls[:, None], given.patches], 1), seen[number])
    torch.testing.assert_close(encoder.forward_intermediates(images(), [-1], norm=True)[0].patches, tokens.patches)
    assert len(encoder.forward_intermediates(images())) == 3
    with pytest.raises(ConfigError, match=r"no block 3.*has 3"):
        encoder.forward_intermediates(images(), [3])


@torch.no_grad()
def test_translations_in_both_scales(encoder: Encoder) -> None:
    normal, raw = (encoder.translate(images(), denormalize=flag) for flag in (False, True))
    assert {name: value.shape for name, value in normal.items()} == {"clip": (2, 256, 12), "odd": (2, 21, 5)}
    for name, value in normal.items():
        channels = torch.arange(value.shape[-1])
        torch.testing.assert_close(raw[name], value * (channels + 1) + channels * 10)
    assert list(encoder.translate(images(), teachers=["odd"])) == ["odd"]
    with pytest.raises(UnknownTeacherError, match=r"'sam'.*clip, odd"):
        encoder.translate(images(), teachers=["sam"])


def test_the_nearest_size(encoder: Encoder) -> None:
    assert encoder.nearest_size(480, 640) == (480, 640)
    assert encoder.nearest_size(231, 233) == (224, 240)
    assert encoder.nearest_size(3, 1000) == (16, 1008)


def test_freezing_leaves_what_was_asked_for(encoder: Encoder) -> None:
    def free() -> set[str]:
        return {name.split("student.vit.")[-1] for name, p in encoder.named_parameters() if p.requires_grad}

    assert encoder.freeze() is encoder
    assert not free()
    encoder.unfreeze(last_n_blocks=2)
    assert {name.rsplit(".", 3)[0] if "." not in name else ".".join(name.split(".")[:2]) for name in free()} == {
        "blocks.1", "blocks.2", "norm.weight", "norm.bias",
    }  # fmt: skip
    encoder.unfreeze()
    assert {"pos_embed", "cls_token", "patch_embed.proj.weight"} <= free()
    assert not any("translators" in name for name in free())
    with pytest.raises(ConfigError, match="has 3 blocks"):
        encoder.unfreeze(last_n_blocks=4)


@torch.no_grad()
def test_a_copy_is_independent(encoder: Encoder) -> None:
    other = copy.deepcopy(encoder)
    other.distiller.student.vit.norm.bias.add_(1)
    assert not torch.equal(other(images()), encoder(images()))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_encoder_gives_the_same(encoder: Encoder) -> None:
    del encoder.distiller.student.vit.blocks[1:]  # they are alike, and take long to compile
    expected = encoder(images())
    encoder.compile()
    torch.testing.assert_close(encoder(images()), expected, atol=1e-4, rtol=0)


def test_half_precision_and_gradients(encoder: Encoder) -> None:
    encoder.to(torch.bfloat16)
    features = encoder(images(), pool="mean")
    assert features.dtype == torch.bfloat16
    features.float().square().sum().backward()
    assert encoder.distiller.student.vit.patch_embed.proj.weight.grad.abs().sum() > 0


def test_numpy_images_are_not_changed(encoder: Encoder) -> None:
    batch = np.asarray(images())
    before = batch.copy()
    encoder(batch)
    assert np.array_equal(batch, before)
