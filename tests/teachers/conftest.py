from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from torch import Tensor, nn


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """Two square photographs, RGB, uint8, each ``(224, 224, 3)``: the size in which images reach a teacher."""
    return [skimage.data.astronaut()[:224, 100:324], skimage.data.chelsea()[20:244, 100:324]]


@pytest.fixture(scope="session")
def images(photographs: list[np.ndarray]) -> Tensor:
    """The same photographs as a batch, uint8, ``(2, 3, 224, 224)``."""
    return torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    """Gives every parameter its own values, so that none can be lost or mixed up unseen.

    Freshly built models are full of zeros and ones: biases, layer norms, class tokens.
    """

    def fill(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.eval()

    return fill


@pytest.fixture(scope="session")
def pillow_processor() -> Callable[..., Any]:
    """An upstream image processor that resizes with Pillow, as all did when the models were published."""
    import transformers

    def build(name: str, **options: Any) -> Any:
        # transformers 5 gave the plain names to its torchvision processors.
        processor_class = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        return processor_class(**options)

    return build


@pytest.fixture(scope="session")
def grey_levels_apart() -> Callable[..., float]:
    """Largest difference of two normalised inputs, in grey levels."""

    def distance(one: Tensor, other: Tensor, std: tuple[float, float, float]) -> float:
        assert one.shape == other.shape
        return float(((one - other) * torch.tensor(std)[:, None, None] * 255).abs().max())

    return distance
