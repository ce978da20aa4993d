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


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_real_size_gives_the_documented_shape(name: str, images: Tensor):
    grid_hw, channels, has_cls = SHAPES[name]

    teacher = create(name, {"weights": "random"})
    features = teacher(images[:1])

    assert (teacher.spec.grid_hw, teacher.spec.channels, teacher.spec.has_cls) == (grid_hw, channels, has_cls)
    assert (type(teacher).spec.grid_hw, type(teacher).spec.channels) == (grid_hw, channels)
    check_features(teacher.spec, features, batch_size=1)
    assert features.patches.isfinite().all()
