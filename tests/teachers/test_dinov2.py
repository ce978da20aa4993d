import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from theia.errors import ConfigError
from theia_teachers.dinov2 import DINOv2

# The position embedding's table is of another size than the input, as in the published model.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 518, "patch_size": 14}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# The published preprocessor_config.json ("authors"), and the same without its crop ("whole").
PROCESSORS = {
    "authors": {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
    "whole": {"size": {"height": 224, "width": 224}, "do_center_crop": False},
}


@pytest.mark.parametrize("crop", ["whole", "authors"])
@torch.no_grad()
def test_features_are_upstreams_last_hidden_state(
    tmp_path, photographs, images, randomise, pillow_processor, grey_levels_apart, crop
):
    upstream = Dinov2Model(Dinov2Config(**SIZES))
    randomise(upstream)
    upstream.save_pretrained(tmp_path)
    processor = pillow_processor("BitImageProcessor", **PROCESSORS[crop], **IMAGENET)
    inputs = processor(images=photographs, return_tensors="pt")
    expected = upstream(**inputs).last_hidden_state

    teacher = DINOv2(weights=str(tmp_path), crop=crop)
    features = teacher(images)

    assert grey_levels_apart(teacher.preprocess(images), inputs["pixel_values"], teacher.preprocess.std) <= 1.001
    torch.testing.assert_close(features.patches, expected[:, 1:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(features.cls, expected[:, 0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_features_are_after_the_final_layer_norm(tmp_path, images, randomise):
    upstream = Dinov2Model(Dinov2Config(**SIZES))
    randomise(upstream)
    upstream.layernorm.weight.zero_()
    upstream.layernorm.bias.fill_(3)
    upstream.save_pretrained(tmp_path)

    features = DINOv2(weights=str(tmp_path))(images)

    assert (features.patches == 3).all()
    assert (features.cls == 3).all()


def test_spec_records_the_crop():
    whole, authors = (DINOv2(weights="random", architecture=SIZES, crop=crop) for crop in ("whole", "authors"))

    assert whole.spec.preprocessing["short_edge"] is None
    assert authors.spec.preprocessing["short_edge"] == 256


@torch.no_grad()
def test_another_size_gives_another_grid(images):
    teacher = DINOv2(weights="random", architecture=SIZES, size=112).eval()

    assert teacher.spec.grid_hw == (8, 8)
    assert teacher(images).patches.shape == (2, 64, 32)


@pytest.mark.parametrize(
    ("options", "message"), [({"size": 225}, "multiple of its patch"), ({"crop": "middle"}, "whole, authors")]
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DINOv2(weights="random", architecture=SIZES, **options)
