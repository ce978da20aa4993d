"""Training data of their own: random images in memory and the features of one teacher, no store."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from theia.data.protocol import TrainingData
from theia.data.sampler import EvaluationSampler, TrainingSampler
from theia.types import FeatureBatch

CHANNELS, GRID, IMAGE_SIZE, HELD_OUT = 6, (4, 4), 32, 16


class Loader:
    def __init__(self, data: "Toy", sampler: TrainingSampler | EvaluationSampler) -> None:
        self.data, self.sampler, self.batch_sampler = data, sampler, None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[FeatureBatch]:
        for rows in self.sampler:
            if isinstance(self.sampler, TrainingSampler):
                self.sampler.advance()
            yield FeatureBatch(self.data.images[rows], {"toy": self.data.features[rows]}, rows=torch.from_numpy(rows))


class Toy(TrainingData):
    """Random images.

    Args:
        samples: Number of images.
        batch_size: Samples per step.
    """

    def __init__(self, samples: int = 64, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        random = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (samples, 3, IMAGE_SIZE, IMAGE_SIZE), generator=random, dtype=torch.uint8)
        mixing = torch.randn(3, GRID[0] * GRID[1] * CHANNELS, generator=random)
        self.features = (self.images.float().mean((2, 3)) @ mixing).view(samples, -1, CHANNELS)
        self.rows = {"train": np.arange(samples - HELD_OUT), "held_out": np.arange(samples - HELD_OUT, samples)}
        self.sampler = TrainingSampler(self.rows["train"], batch_size, seed=0)

    image_size = IMAGE_SIZE
    held_out = HELD_OUT

    @property
    def teacher_shapes(self) -> dict[str, Any]:
        return {"toy": {"channels": CHANNELS, "grid_hw": list(GRID), "has_cls": False}}

    @property
    def trained_on(self) -> int:
        return len(self.rows["train"])

    def statistics(self) -> dict[str, Any]:
        std, mean = torch.std_mean(self.features, dim=(0, 1))
        return {"toy": SimpleNamespace(mean=mean, std=std, cls_mean=None, cls_std=None)}

    def train_dataloader(self) -> Loader:
        return Loader(self, self.sampler)

    def val_dataloader(self) -> Loader:
        return self.ordered_dataloader("held_out")

    def ordered_dataloader(self, part: Literal["train", "held_out"], *_: Any) -> Loader:
        return Loader(self, EvaluationSampler(self.rows[part], 8))

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)

    def check_state(self, state: dict[str, Any]) -> None:
        TrainingSampler(self.rows["train"], self.batch_size, seed=0).load_state_dict(state)


class Unordered(Toy):
    """One that scorers cannot use."""

    ordered_dataloader = TrainingData.ordered_dataloader

    def val_dataloader(self) -> Loader:
        return Loader(self, EvaluationSampler(self.rows["held_out"], 8))


class Unfinished(TrainingData):
    """One that lacks most of what is asked."""
