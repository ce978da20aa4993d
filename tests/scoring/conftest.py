"""A trained student over images in memory: a scorer needs no store."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from theia.encoder.encoder import Encoder
from theia.models.architecture import Architecture
from theia.scoring.contract import Part, Trained
from theia.types import FeatureBatch

IMAGE_SIZE = 64  # a grid of 4x4
BATCH = 6


def reused(batches: Iterable[FeatureBatch]) -> Iterator[FeatureBatch]:
    """Batches as a loader gives them: gone when the next one is taken."""
    for batch in batches:
        copies = {
            name: {key: value.clone() for key, value in getattr(batch, name).items()} for name in ("patches", "scales")
        }
        labels = None if batch.labels is None else batch.labels.clone()
        images = batch.images.clone()
        yield FeatureBatch(images=images, cls={}, labels=labels, rows=batch.rows, **copies)
        for tensor in (images, *copies["patches"].values(), *([] if labels is None else [labels])):
            tensor.fill_(7)


@pytest.fixture
def student() -> Encoder:
    """Random in every parameter; distilled from a teacher of another name than those in the tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teachers = {"other": {"channels": 3, "grid_hw": [4, 4], "has_cls": False}}
        built = Encoder(Architecture(teachers=teachers, image_size=IMAGE_SIZE, width=16, depth=2, heads=2))
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return built.freeze()


@pytest.fixture
def images() -> torch.Tensor:
    """uint8 ``(50, 3, 64, 64)``, each with colours and noise of its own."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (50, 3, 8, 8)).repeat(8, 2).repeat(8, 3)
    noise = rng.integers(-40, 41, (50, 3, IMAGE_SIZE, IMAGE_SIZE))
    return torch.from_numpy(np.clip(coarse + noise, 0, 255).astype(np.uint8))


@pytest.fixture
def make_trained(student: Encoder, images: torch.Tensor) -> Callable[..., Trained]:
    """``make_trained(features, grids, labels=...)``: the first 40 images to fit on, the others held out.

    Features are raw, by teacher, ``(50, N, C)``; statistics are those of the first 40.
    """

    def make(
        features: Mapping[str, torch.Tensor],
        grids: Mapping[str, tuple[int, int]],
        labels: torch.Tensor | None = None,
        encoder: Encoder = student,
    ) -> Trained:
        def part(start: int, stop: int) -> Part:
            def batch(rows: torch.Tensor, with_features: bool) -> FeatureBatch:
                patches = {name: values[rows] for name, values in features.items() if with_features}
                chosen = None if labels is None else labels[rows]
                return FeatureBatch(images[rows], patches, {}, {}, chosen, rows)

            def batches(features: bool = True) -> Iterator[FeatureBatch]:
                return reused(batch(rows, features) for rows in torch.arange(start, stop).split(BATCH))

            return batches

        def statistics(values: torch.Tensor) -> Any:
            tokens = values[:40].double().flatten(0, 1).numpy()
            return SimpleNamespace(mean=tokens.mean(0), std=tokens.std(0).clip(1e-6), cls_mean=None, cls_std=None)

        shapes = {
            name: {"channels": values.shape[-1], "grid_hw": list(grids[name]), "has_cls": False}
            for name, values in features.items()
        }
        return Trained(
            checkpoint=Path("last.ckpt"),
            encoder=encoder,
            shapes=shapes,
            statistics={name: statistics(values) for name, values in features.items()},
            train=part(0, 40),
            held_out=part(40, 50),
            device=torch.device("cpu"),
            seed=0,
            images=40,
        )

    return make
