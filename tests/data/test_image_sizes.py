"""``data.image_sizes``: each training step draws the size of the student's images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from theia.data.datamodule import FeatureData
from theia.data.sampler import TrainingSampler
from theia.errors import ConfigError

SIZES = [16, 32, 48]


def drawn(seed: int = 3, epoch: int = 0, rank: int = 0, world_size: int = 1, steps: range = range(100)) -> list[Any]:
    sampler = TrainingSampler(np.arange(800), 8, seed, rank, world_size, SIZES)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": epoch, "consumed": 8 * steps.start})
    sizes = []
    for _ in steps:
        sizes.append(sampler.image_size)
        sampler.advance()
    return sizes


def test_seed_epoch_and_step_decide_the_size() -> None:
    sizes = drawn()

    assert sizes == drawn(rank=1, world_size=2)
    assert sizes[37:] == drawn(steps=range(37, 100))
    assert sizes not in (drawn(seed=4), drawn(epoch=1))
    # Each of three equally likely sizes lies within 5 standard deviations of a third of 100 draws.
    assert all(abs(sizes.count(size) - 100 / 3) < 5 * np.sqrt(100 * (1 / 3) * (2 / 3)) for size in SIZES)


def test_by_default_no_size_is_drawn_or_kept() -> None:
    sampler = TrainingSampler(np.arange(50), 8, 3)

    assert sampler.image_size is None
    assert sampler.state_dict() == {"epoch": 0, "consumed": 0, "seed": 3, "rows": 50, "batch_size": 8}


def test_a_state_of_other_sizes_is_refused() -> None:
    with_sizes, without = (TrainingSampler(np.arange(50), 8, 3, image_sizes=sizes) for sizes in (SIZES, ()))

    for one, other in ((with_sizes, without), (without, with_sizes)):
        with pytest.raises(ConfigError, match=r"Resume with the same data\.image_sizes"):
            one.load_state_dict(other.state_dict())


def epochs(data: FeatureData) -> list[dict[str, torch.Tensor]]:
    """What two epochs of training give."""
    loader, given = data.train_dataloader(), []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            given.append({name: x.clone() for name, x in {"images": batch.images, **batch.patches}.items()})
    return given


def test_stored_images_are_resized_as_pillow_does_and_features_stay(store: Path) -> None:
    plain = FeatureData(str(store), batch_size=8, workers=0)
    data = FeatureData(str(store), batch_size=8, workers=0, image_sizes="16,32,48")
    usual = data.image_size

    ours, theirs = epochs(data), epochs(plain)

    assert {batch["images"].shape[-1] for batch in ours} == set(SIZES)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(values, other[name]) for name, values in mine.items() if name != "images")
        side = mine["images"].shape[-1]
        assert mine["images"].dtype == torch.uint8
        for image, stored in zip(mine["images"].flatten(0, 1), other["images"].flatten(0, 1), strict=True):
            # In float32: of bytes, Pillow rounds and clips between rows and columns.
            pillow = Image.fromarray(stored.numpy().astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
            expected = np.asarray(pillow).clip(0, 255)
            assert np.abs(image.numpy() - expected).max() <= (0 if side == usual else 0.51)


def test_validation_and_scorers_see_the_usual_size(store: Path) -> None:
    data = FeatureData(str(store), batch_size=8, workers=0, image_sizes=[16, 48])

    loaders = [data.val_dataloader(), data.ordered_dataloader("train", torch.device("cpu"))]
    assert {batch.images.shape[-1] for loader in loaders for batch in loader} == {data.image_size}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("16,big", r"'16,big'; give numbers of pixels"),
        ([0], r"--data\.image_sizes is 0"),
        (list(range(16, 16 * 9, 16)), "names 8 sizes; give at most 7"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(store: Path, sizes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureData(str(store), image_sizes=sizes)
