"""The full-size architectures, with random weights: what the published models give, but for the numbers."""

import pytest
import torch
from torch import Tensor

from theia.registry import create
from theia.teacher import check_features

SHAPES = {
    "clip": ((16, 16), 1024, True),
    "dinov2": ((16, 16), 1024, True),
    "vit": ((16, 16), 1280, True),
    "sam": ((64, 64), 256, False),
    "depth_anything": ((64, 64), 32, False),
}
# As wide as the published models, on images as large; blocks repeat.
SHALLOW = {
    "clip": {"num_hidden_layers": 2},
    "dinov2": {"num_hidden_layers": 2},
    "vit": {"num_hidden_layers": 2},
    "sam": {"depth": 1},
    "depth_anything": {"num_hidden_layers": 4},
}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_real_size_gives_the_documented_shape(name: str, images: Tensor):
    grid_hw, channels, has_cls = SHAPES[name]

    # Every layer with its shape, and no numbers, which take minutes.
    with torch.device("meta"):
        teacher = create(name, {"weights": "random"}).to("meta")
        features = teacher(images[:1].to("meta"))

    assert (teacher.spec.grid_hw, teacher.spec.channels, teacher.spec.has_cls) == (grid_hw, channels, has_cls)
    assert (type(teacher).spec.grid_hw, type(teacher).spec.channels) == (grid_hw, channels)
    check_features(teacher.spec, features, batch_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_real_width_gives_finite_numbers(name: str, images: Tensor):
    teacher = create(name, {"weights": "random", "architecture": SHALLOW[name]})
    features = teacher(images[:1])

    check_features(teacher.spec, features, batch_size=1)
    assert (teacher.spec.grid_hw, teacher.spec.channels) == SHAPES[name][:2]
    assert features.patches.isfinite().all()
