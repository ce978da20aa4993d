import pytest
import skimage.data
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from theia_teachers.vit import ViT

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 14,
}
# Of preprocessor_config.json beside the published weights.
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize("upstream_class", [ViTModel, ViTForImageClassification])
@torch.no_grad()
def test_features_are_upstreams_last_hidden_state(
    tmp_path, photographs, images, randomise, pillow_processor, upstream_class
):
    upstream = upstream_class(ViTConfig(**SIZES))
    randomise(upstream)
    upstream.save_pretrained(tmp_path)
    inputs = pillow_processor("ViTImageProcessor", **HALF)(images=photographs, return_tensors="pt")
    expected = getattr(upstream, "vit", upstream)(**inputs).last_hidden_state

    features = ViT(weights=str(tmp_path))(images)

    torch.testing.assert_close(features.patches, expected[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.cls, expected[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_features_are_after_the_final_layer_norm(tmp_path, images, randomise):
    upstream = ViTModel(ViTConfig(**SIZES))
    randomise(upstream)
    upstream.layernorm.weight.zero_()
    upstream.layernorm.bias.fill_(3)
    upstream.save_pretrained(tmp_path)

    features = ViT(weights=str(tmp_path))(images)

    assert (features.patches == 3).all()
    assert (features.cls == 3).all()


@pytest.mark.parametrize("side", [224, 300, 120])
def test_preprocessing_is_upstreams_within_one_grey_level(side, pillow_processor, grey_levels_apart):
    image = skimage.data.coffee()[50 : 50 + side, 200 : 200 + side]
    teacher = ViT(weights="random", architecture=SIZES)
    expected = pillow_processor("ViTImageProcessor", **HALF)(images=image, return_tensors="pt")["pixel_values"]

    pixels = teacher.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None])

    assert grey_levels_apart(pixels, expected, teacher.preprocess.std) <= 1.001
