"""Depth Anything's own features through the rest of its head are its own depth."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DepthAnythingForDepthEstimation

from theia_teachers.depth_anything import DepthAnything

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "fusion_hidden_size": 16,
    "head_hidden_size": 8,
}


@pytest.fixture(scope="module")
def teacher() -> DepthAnything:
    teacher = DepthAnything(weights="random", architecture=SIZES).eval().requires_grad_(False)
    with torch.no_grad():
        teacher.model.head.conv3.weight.abs_()  # so that little of the depth is cut off at zero
    return teacher


@pytest.fixture(scope="module")
def upstream(teacher: DepthAnything, tmp_path_factory: pytest.TempPathFactory) -> DepthAnythingForDepthEstimation:
    """The same weights, as upstream reads them."""
    folder: Path = tmp_path_factory.mktemp("depth")
    teacher.model.save_pretrained(folder)
    return DepthAnythingForDepthEstimation.from_pretrained(folder).eval()


@torch.no_grad()
def test_the_unsampled_feature_gives_upstreams_depth_exactly(
    teacher: DepthAnything, upstream: DepthAnythingForDepthEstimation, images: Tensor
) -> None:
    seen: list[Tensor] = []
    # A copy: the ReLU that follows must not be able to change it.
    hook = upstream.head.conv2.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    wanted = upstream(teacher.preprocess(images)).predicted_depth
    hook.remove()

    assert wanted.std() > 0
    torch.testing.assert_close(teacher.depth(seen[0]), wanted, rtol=0, atol=0)


@torch.no_grad()
def test_decoded_features_are_upstreams_depth_at_the_stored_points(
    teacher: DepthAnything, upstream: DepthAnythingForDepthEstimation, images: Tensor
) -> None:
    wanted = upstream(teacher.preprocess(images)).predicted_depth
    points = torch.arange(64) * 518 // 64

    patches = teacher(images).patches

    # Before interpolation: depth of the stored points is upstream's there.
    stored = teacher.depth(patches.transpose(1, 2).reshape(2, -1, 64, 64))
    torch.testing.assert_close(stored, wanted[:, points][:, :, points], rtol=1e-5, atol=1e-6)
    assert teacher.decode(patches, images).maps.shape == (2, 518, 518)


@torch.no_grad()
def test_decoded_points_lie_where_they_were_taken(teacher: DepthAnything, images: Tensor) -> None:
    # A feature that rises evenly over the image, as the convolution would give it in each pixel.
    columns = torch.arange(518.0).expand(518, 518)
    feature = columns.expand(1, 8, 518, 518) + 1
    points = torch.arange(64) * 518 // 64
    patches = feature[:, :, points][:, :, :, points].flatten(2).transpose(1, 2)

    decoded = teacher.decode(patches, images[:1]).maps

    wanted = teacher.depth(feature)
    inside = (slice(None), slice(None), slice(0, 510))  # behind the last point there is nothing to interpolate to
    per_pixel = float((wanted[0, 0, 1] - wanted[0, 0, 0]).abs())
    assert (decoded[inside] - wanted[inside]).abs().max() < 1.0 * per_pixel  # points are whole pixels
