from collections.abc import Callable
from pathlib import Path

import torch

from theia.encoder.encoder import Encoder


def test_torch_hub_gives_the_encoder(checkpoint: Callable[..., Path], encoder: Encoder) -> None:
    repository = Path(__file__).parents[1]
    loaded = torch.hub.load(str(repository), "encoder", str(checkpoint()), source="local")
    images = torch.randint(256, (1, 224, 224, 3), dtype=torch.uint8)
    assert torch.equal(loaded(images), encoder(images))
