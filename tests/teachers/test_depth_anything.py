import pytest
import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from theia.errors import ConfigError
from theia_teachers.depth_anything import DepthAnything

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "fusion_hidden_size": 16,
    "head_hidden_size": 8,
}
# Of preprocessor_config.json beside the published weights.
PROCESSOR = {
    "size": {"height": 518, "width": 518},
    "ensure_multiple_of": 14,
    "keep_aspect_ratio": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def build_upstream() -> DepthAnythingForDepthEstimation:
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=518,
        patch_size=14,
        out_indices=[1, 2, 4, 5],
        reshape_hidden_states=False,
    )
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 16, 24, 32],
            fusion_hidden_size=16,
            head_hidden_size=8,
        )
    )


@torch.no_grad()
def test_features_are_the_second_convolution_of_upstreams_head(
    tmp_path, photographs, images, randomise, pillow_processor, grey_levels_apart
):
    upstream = build_upstream()
    randomise(upstream)
    upstream.save_pretrained(tmp_path)
    seen = []
    # A copy: the ReLU that follows must not be able to change it.
    upstream.head.conv2.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    inputs = pillow_processor("DPTImageProcessor", **PROCESSOR)(images=photographs, return_tensors="pt")
    upstream(**inputs)
    assert seen[0].shape == (2, 8, 518, 518)
    points = torch.arange(64) * 518 // 64
    expected = seen[0][:, :, points][:, :, :, points].permute(0, 2, 3, 1).reshape(2, 64 * 64, 8)

    teacher = DepthAnything(weights=str(tmp_path))
    features = teacher(images)

    assert grey_levels_apart(teacher.preprocess(images), inputs["pixel_values"], teacher.preprocess.std) <= 1.001
    # One pixel in ten thousand differs by a grey level.
    torch.testing.assert_close(features.patches, expected, rtol=0, atol=0.01 * float(expected.std()))
    assert features.patches.min() < 0
    assert features.cls is None
    assert teacher.spec.channels == 8


def test_architecture_scales_the_large_model():
    teacher = DepthAnything(weights="random", architecture=SIZES)
    config = teacher.model.config

    assert config.backbone_config.out_indices == [1, 2, 3, 4]
    assert list(config.neck_hidden_sizes) == [8, 16, 32, 32]
    assert teacher.spec.channels == 8


def test_a_backbone_too_shallow_for_the_neck_is_refused():
    with pytest.raises(ConfigError, match="at least 4 num_hidden_layers"):
        DepthAnything(weights="random", architecture={**SIZES, "num_hidden_layers": 3})
