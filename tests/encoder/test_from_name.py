from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resize

import theia
from theia import registry
from theia.encoder.encoder import Encoder
from theia.encoder.from_name import open_encoder
from theia.errors import ConfigError, FeatureError, UnknownTeacherError, WeightsError
from theia.export.export import export
from theia.extraction.images import to_square


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


IMAGES = random_images(2, 3, 224, 224)


def timms_own(name: str, pixels: torch.Tensor) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model of timm with the weights of seed 0, and its features of normalised pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    config = timm.data.resolve_data_config(model=model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        return model, model.forward_features((pixels.float() / 255 - mean) / std)


# Prefix tokens: CLS alone, CLS and registers, CLS and a distillation token, CLS of another class of models.
@pytest.mark.parametrize(
    ("name", "prefix", "grid"),
    [
        ("vit_tiny_patch16_224", 1, (14, 14)),
        ("vit_small_patch16_dinov3", 5, (16, 16)),
        ("deit_tiny_distilled_patch16_224", 2, (14, 14)),
        ("tnt_s_patch16_224", 1, (14, 14)),
    ],
)
def test_timms_tokens_are_timms(name: str, prefix: int, grid: tuple[int, int]) -> None:
    images = random_images(1, 3, 16 * grid[0], 16 * grid[1])
    _, expected = timms_own(name, images)
    tokens = open_encoder(f"timm:{name}@random")(images)

    assert tokens.grid == grid
    assert tokens.cls is not None
    torch.testing.assert_close(tokens.patches, expected[:, prefix:])
    torch.testing.assert_close(tokens.cls, expected[:, 0])


@pytest.mark.parametrize(("name", "channels_last"), [("resnet10t", False), ("swin_tiny_patch4_window7_224", True)])
def test_timms_maps_are_read_row_by_row(name: str, channels_last: bool) -> None:
    size = timm.create_model(name, num_classes=0).default_cfg["input_size"][-1]
    images = random_images(1, 3, size, size)
    _, expected = timms_own(name, images)
    tokens = open_encoder(f"timm:{name}@random")(images)

    assert tokens.cls is None
    torch.testing.assert_close(tokens.as_map(), expected.permute(0, 3, 1, 2) if channels_last else expected)


def test_other_sizes_are_resized_for_timm() -> None:
    tokens = open_encoder("timm:vit_tiny_patch16_224@random")(random_images(1, 3, 96, 160))
    assert tokens.patches.shape == (1, 196, 192)


def test_a_teacher_gives_its_own_features() -> None:
    tokens = open_encoder("teacher:hog")(IMAGES)
    assert tokens.grid == (14, 14)
    assert torch.equal(tokens.patches, registry.create("hog")(IMAGES).patches)
    assert tokens.cls is None


def test_a_teacher_takes_options_and_weights() -> None:
    small = "{weights: random, architecture: {num_hidden_layers: 1, hidden_size: 8, num_attention_heads: 2}}"
    tokens = open_encoder(f"teacher:dinov2@{small}")(IMAGES)
    assert tokens.patches.shape == (2, 256, 8)
    both = open_encoder(f"concat:dinov2@{small},hog")(IMAGES)
    assert torch.equal(both.patches[..., :8], tokens.patches)
    assert both.patches.shape == (2, 256, 8 + 108)


@pytest.mark.parametrize("name", ["teacher:clip@~/w", "concat:hog,clip@~/w", "teacher:clip@{weights: ~/w}"])
def test_weights_lie_in_the_home_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere/home")
    with pytest.raises(WeightsError, match="'/somewhere/home/w'"):
        open_encoder(name)


def test_concatenated_teachers_lie_on_the_grid_of_the_first() -> None:
    hog, color = registry.create("hog")(IMAGES).patches, registry.create("color")(IMAGES).patches
    as_map = color.transpose(1, 2).reshape(2, 6, 16, 16)
    resampled = F.interpolate(as_map, (14, 14), mode="bilinear", antialias=True)
    expected = torch.cat([hog, resampled.flatten(2).transpose(1, 2)], 2)

    tokens = open_encoder("concat:hog,color")(IMAGES)
    assert tokens.grid == (14, 14)
    torch.testing.assert_close(tokens.patches, expected)
    assert open_encoder("concat:color,hog")(IMAGES).grid == (16, 16)


def test_a_checkpoint_and_an_exported_folder_are_what_load_gives(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint()
    export(str(path), tmp_path / "exported", ["safetensors"])
    images = random_images(2, 3, 224, 224)
    expected = theia.load(path).forward_features(images)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(path), str(tmp_path / "exported"), "~/exported"):
        encoder = open_encoder(name)
        tokens = encoder(images)
        assert isinstance(encoder.source, Encoder)
        assert encoder.name == name
        assert torch.equal(tokens.patches, expected.patches)
        assert tokens.grid == expected.grid
        assert not tokens.patches.requires_grad
    assert open_encoder(path).name == str(path)


def test_a_model_as_it_was_before_training(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint()
    images = random_images(1, 3, 224, 224)
    trained, untrained = theia.load(path), open_encoder(f"{path}@random")
    assert isinstance(untrained.source, Encoder)
    assert untrained.source.architecture == trained.architecture
    torch.manual_seed(0)
    expected = Encoder(trained.architecture).forward_features(images)
    assert torch.equal(untrained(images).patches, expected.patches)
    assert not torch.equal(expected.patches, trained.forward_features(images).patches)


def test_a_model_on_pictures_of_another_size(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint()
    pictures = random_images(2, 3, 224, 224)
    for size in (112, 224, 448):
        # Pillow is what the images of a store are resized by.
        resized = [to_square(Image.fromarray(p.permute(1, 2, 0).numpy()), size, "squash") for p in pictures]
        expected = theia.load(path).forward_features(torch.from_numpy(np.stack(resized)))
        encoder = open_encoder(f"{path}@{size}")
        tokens = encoder(pictures)
        assert tokens.grid == (size // 16, size // 16)
        assert encoder.name == f"{path}@{size}"
        torch.testing.assert_close(tokens.patches, expected.patches, atol=0.1, rtol=0)
        assert encoder.distilled
    untrained = open_encoder(f"{path}@random")(resize(pictures, [112, 112], InterpolationMode.BICUBIC, antialias=True))
    torch.testing.assert_close(open_encoder(f"{path}@random@112")(pictures).patches, untrained.patches)
    assert not open_encoder(f"{path}@random@112").distilled
    # A path may end as a size does.
    folder = tmp_path / "student@112"
    export(str(path), folder, ["safetensors"])
    assert open_encoder(folder)(pictures).grid == (14, 14)
    assert open_encoder(f"{folder}@448")(pictures).grid == (28, 28)
    for wrong in ("abc", "112x112", "448@random", ""):
        with pytest.raises(ConfigError, match="After @ there can be 'random' or a size"):
            open_encoder(f"{path}@{wrong}")
    with pytest.raises(ConfigError, match=r"@100'.*100x100 pixels do not divide .*96x96, 112x112"):
        open_encoder(f"{path}@100")
    with pytest.raises(ConfigError, match=r"@0'.*nearest sizes: 16x16"):
        open_encoder(f"{path}@0")
    with pytest.raises(ConfigError, match="at most"):
        open_encoder(f"{path}@1600000")


def test_untrained_students_are_the_same_each_time_and_leave_the_random_stream_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = open_encoder("random:vit_tiny")(IMAGES)
    assert torch.equal(torch.rand(3), expected)
    assert first.patches.shape == (2, 196, 192)
    assert torch.equal(first.patches, open_encoder("random:vit_tiny")(IMAGES).patches)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere/at/all", WeightsError, "no file or folder"),
        ("clip:large", ConfigError, "The forms are:\n.*FOLDER"),
        ("timm:", ConfigError, "names no encoder"),
        ("", ConfigError, "'' names no encoder"),
        ("timm:vit_tinny_patch16_224", ConfigError, "no model 'vit_tinny_patch16_224'"),
        ("timm:vit_tiny_patch16_224@mine", ConfigError, "can only be 'random'"),
        ("random:vit_huge", ConfigError, r"theia_tiny, theia_small, theia_base\.$"),
        ("random:theia_tiny@448", ConfigError, "A size can only follow a path or an id"),
        ("hog@448", ConfigError, "names no encoder; teacher:hog does"),
        ("teacher:nobody", UnknownTeacherError, "nobody"),
        ("concat:hog,nobody", UnknownTeacherError, "nobody"),
        ("hog", ConfigError, "names no encoder; teacher:hog does"),
        ("vit_tiny_patch16_224", ConfigError, "names no encoder; timm:vit_tiny_patch16_224 does"),
        ("teachers:hog", ConfigError, "names no encoder; teacher:hog does"),
        ("hog,color", ConfigError, "put blanks between several"),
        ("teacher:hog,teacher:color", ConfigError, "Put blanks between encoders"),
        ("teacher:hog@random", ConfigError, "'hog' has no weights to choose"),
        ("concat:hog,,color", ConfigError, "empty name"),
        ("concat:teacher:hog,color", ConfigError, "Leave out the prefix: hog."),
        ("concat:hog,timm:vit_tiny_patch16_224", ConfigError, r"only teachers go side by side, by bare names\.$"),
        ("teacher:clip@{weights: [}", ConfigError, "cannot be read"),
        ("teacher:clip@{}{", ConfigError, "cannot be read"),
        ("teacher:clip@", ConfigError, "nothing after @. Is a shell variable unset"),
        ("concat:hog,clip@", ConfigError, "nothing after @"),
        ("timm:vit_tiny_patch16_224@", ConfigError, "can only be 'random'"),
        ("teacher:hog@{sides: 3}", ConfigError, "no option 'sides'"),
        ("timm:vit_tinny_patch16_224", ConfigError, "Similar names: vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.mine@random", WeightsError, r"cannot build .*tag \(mine\) .*\)\.$"),
    ],
)
def test_what_names_no_encoder_says_so(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_encoder(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixer_s32_224", r"tokens of shape \(1, 49, 512\) and does not tell how many of them are prefix"),
        ("pit_ti_224", "cannot be told apart"),
        ("crossvit_tiny_240", "no spatial features"),
    ],
)
def test_models_without_spatial_features_say_so(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_encoder(f"timm:{name}@random")


def test_a_teacher_whose_features_differ_from_its_spec_is_refused() -> None:
    encoder = open_encoder("teacher:hog")
    encoder.source.spec = replace(encoder.source.spec, grid_hw=(7, 28))
    assert encoder(IMAGES).grid == (7, 28)
    encoder.source.spec = replace(encoder.source.spec, grid_hw=(7, 7))
    with pytest.raises(FeatureError, match="Correct its spec"):
        encoder(IMAGES)
