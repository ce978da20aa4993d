import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from encoder.published import CDDSV, CDIV, Published, write
from safetensors.torch import load_file, save_file

import theia
from theia.errors import ConfigError, ExportError, WeightsError
from theia.export.export import export


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    with torch.random.fork_rng():
        yield write(tmp_path_factory.mktemp("published"), teachers=CDDSV)


def images(height: int = 224, width: int = 224, count: int = 2) -> torch.Tensor:
    return torch.randint(
        256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height)
    )


@pytest.mark.parametrize("size", [(224, 224), (160, 272), (288, 224)])
@torch.no_grad()
def test_tokens_are_those_of_transformers_vit_at_any_size(published: Published, size: tuple[int, int]) -> None:
    tokens = theia.load(published.folder).forward_features(images(*size))
    expected = published.tokens(images(*size))
    torch.testing.assert_close(tokens.cls, expected[:, 0], atol=2e-4, rtol=0)
    torch.testing.assert_close(tokens.patches, expected[:, 1:], atol=2e-4, rtol=0)


@torch.no_grad()
def test_translations_are_those_of_the_written_out_layers(published: Published) -> None:
    translations = theia.load(published.folder).translate(images())
    maps = published.tokens(images())[:, 1:].transpose(1, 2).reshape(2, -1, 14, 14)
    assert list(translations) == list(CDDSV)
    for name, head in published.heads.items():
        torch.testing.assert_close(translations[name], head(maps), atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "base"])
@torch.no_grad()
def test_the_larger_sizes_load_alike(size: str, tmp_path: Path) -> None:
    published = write(tmp_path, size, {"facebook/dinov2-large": (16, 16), "facebook/sam-vit-huge": (8, 64)})
    encoder = theia.load(tmp_path)
    expected = published.tokens(images(count=1))
    torch.testing.assert_close(encoder.forward_features(images(count=1)).patches, expected[:, 1:], atol=2e-4, rtol=0)
    maps = expected[:, 1:].transpose(1, 2).reshape(1, -1, 14, 14)
    for name, value in encoder.translate(images(count=1)).items():
        torch.testing.assert_close(value, published.heads[name](maps), atol=2e-4, rtol=0)


def test_theirs_to_ours_to_theirs_is_bit_exact(published: Published, tmp_path: Path) -> None:
    export(published.folder, tmp_path / "ours", ["safetensors"])
    export(tmp_path / "ours", tmp_path / "theirs", ["authors"])

    before, after = (load_file(path / "model.safetensors") for path in (published.folder, tmp_path / "theirs/authors"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [
        json.loads((path / "config.json").read_text()) for path in (published.folder, tmp_path / "theirs/authors")
    ]
    assert configs[0].items() <= configs[1].items()


def test_names_with_underscores_for_slashes_load_too(tmp_path: Path) -> None:
    published = write(tmp_path / "one", teachers=CDIV)
    tensors = load_file(published.folder / "model.safetensors")
    write(tmp_path / "two", teachers=CDIV)
    save_file({name.replace("/", "_"): value for name, value in tensors.items()}, tmp_path / "two/model.safetensors")
    one, two = (theia.load(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_published_model_has_no_statistics_to_denormalise_with(published: Published) -> None:
    with pytest.raises(ConfigError, match="no statistics"):
        theia.load(published.folder).translate(images(), denormalize=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "facebook/deit-huge-patch16-224"}, "deit-huge"),
        ({"num_reg_tokens": 7}, "num_reg_tokens 7"),
        ({"translator_type": "mlp"}, "translator_type 'mlp'"),
        ({"feature_reduce_method": "median"}, "median"),
        ({"target_feature_sizes": {"facebook/dinov2-large": [1024, 24, 24]}}, "24x24"),
        ({"feature_reduce_method": ["mean_pooling"]}, "mean_pooling"),
        ({"target_feature_sizes": None}, "target_feature_sizes None"),
        ({"target_feature_sizes": {"facebook/dinov2-large": "big"}}, "must be .channels, rows, columns"),
    ],
)
def test_a_variant_that_was_never_released_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    write(tmp_path, teachers={"facebook/dinov2-large": (8, 16)}, **change)
    with pytest.raises(WeightsError, match=message):
        theia.load(tmp_path)


def test_the_released_pooling_is_the_default(tmp_path: Path) -> None:
    write(tmp_path, teachers={"facebook/dinov2-large": (8, 16)}, feature_reduce_method="mean_pooling")
    encoder = theia.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images()), encoder(images(), pool="none").mean(1))


@pytest.mark.parametrize("what", ["missing", "left over", "shape"])
def test_every_tensor_counts(what: str, tmp_path: Path) -> None:
    published = write(tmp_path, teachers={"facebook/dinov2-large": (8, 16)})
    tensors = load_file(published.folder / "model.safetensors")
    name = "backbone.model.encoder.layer.3.attention.attention.key.bias"
    if what == "missing":
        del tensors[name]
    elif what == "left over":
        tensors["pooler.dense.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(5)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError,
        match={
            "missing": f"{name} is missing",
            "left over": "pooler.dense.weight is left",
            "shape": "attn.qkv.bias has shape",
        }[what],
    ):
        theia.load(tmp_path)


def test_a_model_that_their_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    from theia.models.architecture import Architecture

    teachers = {"odd": {"channels": 4, "grid_hw": [7, 9], "has_cls": False}}
    architecture = Architecture(teachers=teachers, registers=4, weights="pretrained")
    state = {f"distiller.{name}": value for name, value in theia.Encoder(architecture).distiller.state_dict().items()}
    torch.save({"hyper_parameters": architecture.as_dict(), "state_dict": state}, tmp_path / "last.ckpt")
    with pytest.raises(ExportError, match=r"CLS token; .*started from DeiT.*; teacher 'odd' has a grid of 7x9"):
        export(tmp_path / "last.ckpt", tmp_path / "out", ["safetensors", "authors"])
    assert not (tmp_path / "out").exists()
