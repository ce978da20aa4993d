import pytest
import skimage.data
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from theia_teachers.clip import CLIP

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 14,
}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 9}


@torch.no_grad()
def test_features_are_upstreams_last_hidden_state(tmp_path, photographs, images, randomise, pillow_processor):
    upstream = CLIPVisionModel(CLIPVisionConfig(**VISION))
    randomise(upstream)
    upstream.save_pretrained(tmp_path)
    inputs = pillow_processor("CLIPImageProcessor")(images=photographs, return_tensors="pt")
    expected = upstream(**inputs)

    features = CLIP(weights=str(tmp_path))(images)

    torch.testing.assert_close(features.patches, expected.last_hidden_state[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.cls, expected.last_hidden_state[:, 0], rtol=1e-4, atol=1e-4)
    # Before the final layer norm: upstream's pooled output is that norm of the CLS token. The norm's place in the model
    # depends on the release.
    (norm,) = (module for name, module in upstream.named_modules() if name.endswith("post_layernorm"))
    torch.testing.assert_close(norm(features.cls), expected.pooler_output, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_reads_the_vision_tower_of_a_whole_clip(tmp_path, photographs, images, randomise, pillow_processor):
    # The text tower is deeper than the vision tower: its extra blocks must not be taken for the latter's.
    upstream = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION))
    randomise(upstream)
    upstream.save_pretrained(tmp_path)
    inputs = pillow_processor("CLIPImageProcessor")(images=photographs, return_tensors="pt")
    expected = upstream.vision_model(**inputs).last_hidden_state

    features = CLIP(weights=str(tmp_path))(images)

    torch.testing.assert_close(features.patches, expected[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [224, 300, 120])
def test_preprocessing_is_upstreams_within_one_grey_level(side, pillow_processor, grey_levels_apart):
    image = skimage.data.coffee()[50 : 50 + side, 200 : 200 + side]
    teacher = CLIP(weights="random", architecture=VISION)
    expected = pillow_processor("CLIPImageProcessor")(images=image, return_tensors="pt")["pixel_values"]

    pixels = teacher.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None])

    assert grey_levels_apart(pixels, expected, teacher.preprocess.std) <= 1.001


def test_squashes_the_whole_image():
    teacher = CLIP(weights="random", architecture=VISION)
    images = torch.zeros(1, 3, 100, 300, dtype=torch.uint8)
    images[..., :2] = 255  # a bright left edge, which a centre crop would lose

    pixels = teacher.preprocess(images)

    assert pixels.shape == (1, 3, 224, 224)
    assert (pixels[..., 0] > pixels[..., 112]).all()
