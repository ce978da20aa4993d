import copy
import io
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
from encoder.small import small
from torch.nn.parallel import DistributedDataParallel

import theia
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
        (images().float() * 1000, ImageError, "they are not images"),
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
    with pytest.raises(ConfigError, match="'median'"):
        encoder.pooled(tokens, "median")
    with pytest.raises(ConfigError, match="no CLS token"):
        Encoder(small(registers=0))(images(), pool="cls")


@torch.no_grad()
def test_intermediates_are_the_blocks_own_outputs(encoder: Encoder) -> None:
    seen = {}
    for number, block in enumerate(encoder.distiller.student.backbone.model.blocks):
        block.register_forward_hook(lambda _, __, output, number=number: seen.__setitem__(number, output))
    tokens = encoder.forward_features(images())
    found = encoder.forward_intermediates(images(), indices=[2, 0, -2])
    for given, number in zip(found, (2, 0, 1), strict=True):
        torch.testing.assert_close(torch.cat([given.cls[:, None], given.patches], 1), seen[number])
    torch.testing.assert_close(encoder.forward_intermediates(images(), [-1], norm=True)[0].patches, tokens.patches)
    assert len(encoder.forward_intermediates(images())) == 3


@pytest.mark.parametrize(
    ("indices", "blocks"),
    [
        ((index for index in (0, 2)), [0, 2]),
        (range(1, 3), [1, 2]),
        (np.array([2, 0]), [2, 0]),
        (torch.tensor([1]), [1]),
        ((1, 1, -2), [1, 1, 1]),
        (-1, [2]),
        (np.int64(1), [1]),
        (torch.tensor(1), [1]),
        ([], []),
    ],
    ids=["iterator", "range", "numpy", "torch", "twice and negative", "one", "one of numpy", "one of torch", "none"],
)
@torch.no_grad()
def test_blocks_are_named_by_any_numbers(encoder: Encoder, indices, blocks: list[int]) -> None:
    every = encoder.forward_intermediates(images(32, 32))
    found = encoder.forward_intermediates(images(32, 32), indices)
    for given, number in zip(found, blocks, strict=True):
        assert torch.equal(given.patches, every[number].patches)


@pytest.mark.parametrize("indices", [[3], [-4], [1.0], ["1"], "1", 1.5, [None]], ids=repr)
def test_what_is_no_block_is_named(encoder: Encoder, indices) -> None:
    wrong = re.escape(repr(indices[0] if isinstance(indices, list | str) else indices))
    with pytest.raises(ConfigError, match=rf"block or stage {wrong}; .* 3"):
        encoder.forward_intermediates(images(32, 32), indices)


@torch.no_grad()
def test_translations_in_both_scales(encoder: Encoder) -> None:
    normal, raw = (encoder.translate(images(), denormalize=flag) for flag in (False, True))
    assert {name: value.shape for name, value in normal.items()} == {"clip": (2, 256, 12), "odd": (2, 21, 5)}
    for name, value in normal.items():
        channels = torch.arange(value.shape[-1])
        torch.testing.assert_close(raw[name], value * (channels + 1) + channels * 10)
    for teachers in (["odd"], "odd", (name for name in ["odd"]), {"odd": 1}):
        assert list(encoder.translate(images(), teachers)) == ["odd"]
    for teachers in (["sam"], "sam", ["odd", "sam"]):
        with pytest.raises(UnknownTeacherError, match=r"'sam'.*clip, odd"):
            encoder.translate(images(), teachers)


def test_the_nearest_size(encoder: Encoder) -> None:
    assert encoder.nearest_size(480, 640) == (480, 640)
    assert encoder.nearest_size(231, 233) == (224, 240)
    assert encoder.nearest_size(3, 1000) == (16, 1008)


def test_freezing_leaves_what_was_asked_for(encoder: Encoder) -> None:
    def free() -> set[str]:
        return {name.split("student.backbone.model.")[-1] for name, p in encoder.named_parameters() if p.requires_grad}

    assert encoder.freeze() is encoder
    assert not free()
    encoder.unfreeze(last_n_blocks=2)
    assert {name.rsplit(".", 3)[0] if "." not in name else ".".join(name.split(".")[:2]) for name in free()} == {
        "blocks.1", "blocks.2", "norm.weight", "norm.bias",
    }  # fmt: skip
    encoder.unfreeze()
    assert {"pos_embed", "cls_token", "patch_embed.proj.weight"} <= free()
    assert not any("translators" in name for name in free())
    for wrong in (4, -1, 1.0, "1"):
        with pytest.raises(ConfigError, match=f"last_n_blocks is {wrong!r}; .* 3 blocks"):
            encoder.unfreeze(last_n_blocks=wrong)


def test_a_loaded_encoder_trains_what_its_features_come_from(checkpoint: Callable[..., Path]) -> None:
    for encoder in (theia.load(checkpoint()), Encoder(small(registers=4, distill_cls=True))):
        encoder(images(), pool="mean").sum().backward()
        free = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        assert free == {f"distiller.student.{name}" for name, _ in encoder.distiller.student.named_parameters()}
        assert free == {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
        encoder.zero_grad()
        encoder.distiller.translators.requires_grad_()
        encoder.translate(images(), "odd")["odd"].sum().backward()
        assert encoder.distiller.translators["odd"].last.weight.grad is not None


def train_in_parallel(rank: int, world: int, folder: Path | str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        encoder = Encoder(small(registers=4, distill_cls=True))
        model = DistributedDataParallel(encoder)
        optimizer = torch.optim.SGD(encoder.distiller.student.parameters(), 0.1)
        before = encoder.distiller.student.backbone.model.pos_embed.clone()
        # What a parameter lacks after one step is found out in the next one.
        for step in range(2):
            optimizer.zero_grad()
            torch.autograd.backward(model(images(32, 32)[rank:] / (step + 1) / 255, pool="mean").square().mean())
            optimizer.step()
        assert not torch.equal(encoder.distiller.student.backbone.model.pos_embed, before)
        torch.save(encoder.state_dict(), f"{folder}/{rank}-of-{world}.pt")
    finally:
        dist.destroy_process_group()


def test_distributed_training_waits_for_no_gradient_that_never_comes(tmp_path: Path) -> None:
    train_in_parallel(0, 1, tmp_path)


@pytest.mark.slow
def test_two_processes_train_the_same_encoder(tmp_path: Path) -> None:
    module, name = "encoder.test_encoder", train_in_parallel.__name__
    ranks = [forked.function(module, name, rank, 2, str(tmp_path)) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.err for rank in ranks]
    first, second = (torch.load(tmp_path / f"{rank}-of-2.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_a_pickled_encoder_gives_the_same() -> None:
    encoder = Encoder(small(depth=1))
    encoder.compile(backend="eager")
    expected = encoder(images(32, 32))
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(encoder)), torch.load(file, weights_only=False)):
        assert torch.equal(other(images(32, 32)), expected)


@torch.no_grad()
def test_threads_get_what_one_gets(encoder: Encoder) -> None:
    batches = [images(32, 32) // divisor for divisor in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        for given, batch in zip(pool.map(encoder, batches), batches, strict=True):
            assert torch.equal(given, encoder(batch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_parameters_of_other_types(encoder: Encoder, dtype: torch.dtype) -> None:
    expected = encoder(images(), pool="mean")
    encoder.to(dtype)
    for given in (images(), images() / 255, (images() / 255).double()):
        features = encoder(given, pool="mean")
        assert features.dtype == dtype
        torch.testing.assert_close(features.float(), expected, atol=0.1, rtol=0)
    assert encoder.translate(images())["odd"].dtype == dtype


@torch.no_grad()
def test_a_copy_is_independent(encoder: Encoder) -> None:
    other = copy.deepcopy(encoder)
    other.distiller.student.backbone.model.norm.bias.add_(1)
    assert not torch.equal(other(images()), encoder(images()))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_encoder_gives_the_same(encoder: Encoder) -> None:
    del encoder.distiller.student.backbone.model.blocks[1:]  # they are alike, and take long to compile
    expected = encoder(images())
    encoder.compile()
    torch.testing.assert_close(encoder(images()), expected, atol=1e-4, rtol=0)


def test_half_precision_and_gradients(encoder: Encoder) -> None:
    encoder.to(torch.bfloat16)
    features = encoder(images(), pool="mean")
    assert features.dtype == torch.bfloat16
    features.float().square().sum().backward()
    assert encoder.distiller.student.backbone.model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_numpy_images_are_not_changed(encoder: Encoder) -> None:
    batch = np.asarray(images())
    before = batch.copy()
    encoder(batch)
    assert np.array_equal(batch, before)
