import hashlib
import logging
import shutil
from pathlib import Path
from typing import Literal

import huggingface_hub
import pytest
import skimage.data
import skimage.transform
import torch
from segment_anything import sam_model_registry
from segment_anything.build_sam import _build_sam
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from theia.errors import ConfigError, WeightsError
from theia.teacher import check_features
from theia_teachers.sam import SAM

SMALL = {"depth": 8, "width": 8, "heads": 1}


@pytest.fixture(scope="module")
def upstream() -> Sam:
    """A small SAM by the package's own builder, every weight random (position embeddings start at zero)."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        sam = _build_sam(
            encoder_embed_dim=8,
            encoder_depth=8,
            encoder_num_heads=1,
            encoder_global_attn_indexes=[1, 3, 5, 7],
        )
        for weight in sam.image_encoder.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return sam


@pytest.fixture(scope="module")
def checkpoint(upstream: Sam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "small.pth"
    torch.save(upstream.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def teacher(checkpoint: Path) -> SAM:
    return SAM(str(checkpoint), "vit_b", SMALL).requires_grad_(False)


def photograph(height: int, width: int) -> Tensor:
    image = skimage.transform.resize(skimage.data.astronaut(), (height, width), anti_aliasing=True)
    return torch.from_numpy((image * 255).round()).to(torch.uint8).permute(2, 0, 1)[None]


def upstream_pixels(upstream: Sam, image: Tensor) -> Tensor:
    resized = ResizeLongestSide(1024).apply_image(image[0].permute(1, 2, 0).numpy())
    return upstream.preprocess(torch.from_numpy(resized).permute(2, 0, 1)[None])


@pytest.mark.parametrize(("height", "width"), [(224, 224), (301, 451), (1400, 1100), (1024, 700)])
def test_preprocessing_equals_upstream_within_a_grey_level(
    teacher: SAM, upstream: Sam, height: int, width: int
) -> None:
    image = photograph(height, width)
    difference = teacher.preprocess(image) - upstream_pixels(upstream, image)
    grey_levels = difference.abs() * upstream.pixel_std
    assert grey_levels.max() < 1.01
    assert (grey_levels > 0.01).float().mean() < 1e-3


@torch.no_grad()
def test_features_equal_upstream(teacher: SAM, upstream: Sam) -> None:
    image = photograph(224, 224)
    wanted = upstream.image_encoder(upstream_pixels(upstream, image))  # (1, 256, 64, 64)
    features = teacher(image)
    check_features(SAM.spec, features, 1)
    grid = features.patches.reshape(1, 64, 64, 256)
    torch.testing.assert_close(grid, wanted.permute(0, 2, 3, 1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (224, 160)])
def test_an_image_in_a_corner_gives_what_upstream_gives_there(
    upstream: Sam, checkpoint: Path, height: int, width: int
) -> None:
    small = SAM(str(checkpoint), "vit_b", SMALL, canvas="corner").requires_grad_(False)
    image = photograph(height, width)
    resized = ResizeLongestSide(224).apply_image(image[0].permute(1, 2, 0).numpy())
    pixels = upstream.preprocess(torch.from_numpy(resized).permute(2, 0, 1)[None])  # which pads to 1024
    with torch.no_grad():
        expected = upstream.image_encoder(pixels)[..., :14, :14].flatten(2).transpose(1, 2)
    features = small(image)
    check_features(small.spec, features, 1)
    assert small.spec.grid_hw == (14, 14)
    assert small.spec.preprocessing["canvas"] == 1024
    torch.testing.assert_close(features.patches, expected, atol=1e-3, rtol=1e-3)
    assert small.decode(features.patches, image) is None


def test_a_corner_needs_room() -> None:
    with pytest.raises(ConfigError, match="does not fit into a corner of an input of 128 pixels"):
        SAM("random", "vit_b", {**SMALL, "image_size": 128}, canvas="corner")


@pytest.mark.parametrize(("model", "depth"), [("vit_b", 12), ("vit_l", 24), ("vit_h", 32)])
def test_a_changed_architecture_keeps_the_layout_of_the_registry(
    model: Literal["vit_b", "vit_l", "vit_h"], depth: int
) -> None:
    with torch.device("meta"):
        wanted = sam_model_registry[model]().image_encoder
        given = SAM("random", model, {"depth": depth}).image_encoder
    shapes = {name: weight.shape for name, weight in given.state_dict().items()}
    assert shapes == {name: weight.shape for name, weight in wanted.state_dict().items()}
    assert str(given) == str(wanted)
    assert [block.window_size for block in given.blocks] == [block.window_size for block in wanted.blocks]


def test_image_size_sets_the_grid() -> None:
    teacher = SAM("random", "vit_b", {**SMALL, "image_size": 96})
    assert teacher.spec.grid_hw == (6, 6)
    check_features(teacher.spec, teacher(photograph(224, 224)), 1)


def test_random_weights_are_announced_and_the_same_each_time(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        one, two = (SAM("random", "vit_b", {**SMALL, "image_size": 64}) for _ in range(2))
    assert "random weights" in caplog.text
    assert torch.equal(before, torch.get_rng_state())
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name])
    assert one.spec.weights == "random"
    assert one.spec.revision == "seed 0, vit_b, depth 8, heads 1, image_size 64, width 8"


def test_spec_names_the_file_and_its_digest(teacher: SAM, checkpoint: Path) -> None:
    assert teacher.spec.weights == str(checkpoint)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert teacher.spec.revision == f"sha256:{digest}"


def test_a_half_precision_checkpoint_gives_float32(upstream: Sam, tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    torch.save({name: weight.half() for name, weight in upstream.state_dict().items()}, path)
    teacher = SAM(str(path), "vit_b", SMALL)
    assert {weight.dtype for weight in teacher.parameters()} == {torch.float32}


def test_a_truncated_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "truncated.pth"
    path.write_bytes(checkpoint.read_bytes()[:-5000])
    with pytest.raises(WeightsError, match=r"truncated\.pth cannot be read"):
        SAM(str(path), "vit_b", SMALL)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x80\x02]q\x00."])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "corrupt.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"corrupt\.pth"):
        SAM(str(path), "vit_b", SMALL)


def test_a_checkpoint_of_another_size_is_refused(checkpoint: Path) -> None:
    with pytest.raises(WeightsError, match=r"does not fit the architecture 'vit_b'.*--sam\.model"):
        SAM(str(checkpoint), "vit_b", {**SMALL, "depth": 4})


def test_a_checkpoint_without_the_rest_of_sam_is_refused(upstream: Sam, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pth"
    torch.save(upstream.image_encoder.state_dict(), path)
    with pytest.raises(WeightsError, match="Missing key"):
        SAM(str(path), "vit_b", SMALL)


def test_a_file_that_only_has_the_name_of_metas_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "sam_vit_b_01ec64.pth"
    shutil.copy(checkpoint, path)
    with pytest.raises(WeightsError, match=r"differs from it.*dl\.fbaipublicfiles\.com"):
        SAM(str(path), "vit_b", SMALL)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no checkpoint file at .*absent\.pth"):
        SAM(str(tmp_path / "absent.pth"))


def test_the_default_is_the_file_of_the_model_on_the_hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    teacher = SAM(model="vit_l", architecture=SMALL)
    assert asked == [("ybelkada/segment-anything", "checkpoints/sam_vit_l_0b3195.pth")]
    assert teacher.spec.weights == SAM.spec.weights


def test_an_unreachable_hub_names_model_cause_and_alternative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        SAM()
    message = str(error.value)
    assert "'ybelkada/segment-anything'" in message
    assert "offline" in message.lower()
    assert "--sam.weights /path/to/sam_vit_h_4b8939.pth" in message


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ({"layers": 2}, r"unknown architecture option \['layers'\]"),
        ({"width": 10, "heads": 4}, "not possible"),
        ({"image_size": 100}, "not possible"),
        ({"depth": 0}, "not possible"),
    ],
)
def test_an_impossible_architecture_is_refused(architecture: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        SAM("random", "vit_b", architecture)
