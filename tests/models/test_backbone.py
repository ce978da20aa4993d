from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from theia.errors import ConfigError, ShapeError
from theia.models.backbone import StudentOptions
from theia.models.student import Student, build_backbone

SIZE = 64


def built(name, stage=None):
    torch.manual_seed(0)
    return build_backbone(StudentOptions(backbone=f"timm:{name}", image_size=SIZE, backbone_stage=stage)).eval()


def pixels(height=SIZE, width=SIZE):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "stride", "has_cls", "registers"),
    [
        ("test_vit", 16, True, 0),
        ("test_vit4", 16, False, 1),
        ("test_convnext", 32, False, 0),
        ("test_efficientnet", 32, False, 0),
        ("test_resnet", 32, False, 0),
    ],
)
def test_tokens_are_those_of_timm(name, stride, has_cls, registers):
    backbone = built(name)
    torch.manual_seed(0)
    options = {"img_size": SIZE, "dynamic_img_size": True} if "vit" in name else {}
    upstream = timm.create_model(name, num_classes=0, **options).eval()
    given = upstream.forward_features(pixels())
    tokens = backbone.tokens(pixels())

    assert (backbone.stride, backbone.grid_hw) == (stride, (SIZE // stride, SIZE // stride))
    assert (tokens.cls is not None) == has_cls
    assert tokens.registers.shape[1] == registers
    expected = given[:, has_cls + registers :] if "vit" in name else given.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.patches, expected)
    assert backbone.mean == tuple(upstream.pretrained_cfg["mean"])


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_every_parameter_learns_from_the_spatial_tokens(name):
    # Otherwise distributed training would wait for gradients that never come.
    for stage in (None, 1):
        backbone = built(name, stage)
        backbone.tokens(pixels()).patches.square().mean().backward()
        assert [key for key, each in backbone.named_parameters() if each.requires_grad and each.grad is None] == []


def test_a_stage_is_what_timm_gives_for_it():
    torch.manual_seed(0)
    upstream = timm.create_model("test_convnext", num_classes=0).eval()
    expected = upstream.forward_intermediates(pixels(), [1], intermediates_only=True)[0]

    backbone = built("test_convnext", stage=1)

    tokens = backbone.tokens(pixels())
    torch.testing.assert_close(tokens.as_map(), expected)
    assert (backbone.stride, backbone.width) == (8, expected.shape[1])
    assert len(backbone.blocks()) == 2
    assert len(backbone.state_dict()) < len(upstream.state_dict())  # later stages are gone


def test_the_last_blocks_can_be_trained_alone():
    backbone = built("test_convnext")
    for count in (0, 1, 3):
        backbone.requires_grad_(False)
        backbone.unfreeze(count)
        free = {name.split(".")[2] for name, each in backbone.named_parameters() if each.requires_grad}
        assert free == {str(stage) for stage in range(4 - count, 4)}


def test_other_sizes_divide_into_the_stride():
    backbone = built("test_convnext")
    assert backbone.nearest_size(100, 30) == (96, 32)
    assert backbone.tokens(pixels(96, 32)).grid == (3, 1)
    with pytest.raises(ShapeError, match="96x32"):
        backbone.check_size(100, 32)


def test_a_training_size_that_does_not_divide_into_the_stride_is_refused():
    for name in ("test_convnext", "test_vit"):
        with pytest.raises((ShapeError, ConfigError), match="100x100"):
            build_backbone(StudentOptions(backbone=f"timm:{name}", image_size=100))


def test_a_model_of_one_size_says_so():
    backbone = build_backbone(StudentOptions(backbone="timm:tnt_s_patch16_224", image_size=32))
    with pytest.raises(ShapeError, match="32x32 alone"):
        backbone.check_size(48, 32)
    assert backbone.nearest_size(48, 32) == (32, 32)


def test_local_weights_are_taken_whole(tmp_path: Path):
    torch.manual_seed(7)
    upstream = timm.create_model("test_convnext").eval()
    save_file(upstream.state_dict(), tmp_path / "convnext.safetensors")
    options = StudentOptions(
        backbone="timm:test_convnext", image_size=SIZE, weights=str(tmp_path / "convnext.safetensors")
    )

    student = Student(options).eval()

    expected = upstream.forward_features(pixels())
    torch.testing.assert_close(student.backbone.tokens(pixels()).as_map(), expected)


def test_a_model_without_spatial_features_is_refused():
    with pytest.raises(ConfigError, match="cannot be told apart"):
        build_backbone(StudentOptions(backbone="timm:mixer_s32_224"))
