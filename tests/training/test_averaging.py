"""The average of the weights: its closed form, and which weights a validation, a checkpoint and the end see."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from theia.errors import CheckpointError
from theia.training.averaging import TRAINED, WeightAverage
from theia.training.checkpoints import Checkpoints

DECAY = 0.75


class Small(L.LightningModule):
    """A linear layer and a batch norm, which change in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.norm(self.layer(batch)) - batch).pow(2).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", float(self.training_step(batch, batch_idx)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Trajectory(L.Callback):
    """Notes the weights before and after each step, and those that a validation sees."""

    def __init__(self) -> None:
        self.weights: list[dict[str, np.ndarray]] = []
        self.validated: dict[int, dict[str, np.ndarray]] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.weights.append(floats(module.state_dict()))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == len(self.weights):
            self.weights.append(floats(module.state_dict()))

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validated[trainer.global_step] = floats(module.state_dict())


def floats(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.double().numpy().copy() for name, value in state.items() if value.is_floating_point()}


def average(weights: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The closed form: each step's weights times (1 - decay) decay^age, and the first ones times decay^steps."""
    last = len(weights) - 1
    shares = [DECAY**last, *((1 - DECAY) * DECAY ** (last - step) for step in range(1, last + 1))]
    return {
        name: sum(share * one[name] for share, one in zip(shares, weights, strict=True)) for name in weights[0]
    }  # fmt: skip


def train(
    folder: Path, *callbacks: L.Callback, epochs: int = 3, resume: Path | None = None, **options: Any
) -> Small:  # fmt: skip
    L.seed_everything(0)
    module = Small()
    batches = DataLoader(torch.randn(24, 2), batch_size=4)  # type: ignore[arg-type]
    L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, Checkpoints(folder, 4)], default_root_dir=folder, **options,
    ).fit(module, batches, batches, ckpt_path=resume, weights_only=True)  # fmt: skip
    return module


def close(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-7, equal_nan=False, err_msg=name)


@pytest.mark.parametrize("summed", [1, 2])
def test_validations_checkpoints_and_the_end_have_the_average(tmp_path: Path, summed: int) -> None:
    path = Trajectory()

    module = train(tmp_path, path, WeightAverage(DECAY), accumulate_grad_batches=summed)

    steps = 18 // summed
    assert len(path.weights) == steps + 1
    assert sorted(path.validated) == [0, *range(steps // 3, steps + 1, steps // 3)]  # 0: the check before the training
    for step, seen in path.validated.items():
        close(seen, average(path.weights[: step + 1]))
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    close(floats(last["state_dict"]), average(path.weights))
    close(floats(module.state_dict()), average(path.weights))
    assert last["state_dict"]["norm.num_batches_tracked"] == 18
    # The weights in training are those of a training without an average, bit for bit.
    without = train(tmp_path / "without", accumulate_grad_batches=summed)
    assert last[TRAINED].keys() == average(path.weights).keys()
    assert all(torch.equal(value, without.state_dict()[name]) for name, value in last[TRAINED].items())


def test_a_finished_training_with_an_average_goes_on_exactly(tmp_path: Path) -> None:
    train(tmp_path / "whole", WeightAverage(DECAY), epochs=5)
    train(tmp_path / "parts", WeightAverage(DECAY), epochs=3, limit_val_batches=0)  # so the end writes last.ckpt
    train(tmp_path / "parts", WeightAverage(DECAY), epochs=5, resume=tmp_path / "parts" / "last.ckpt")

    whole, parts = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))

    for part in ("state_dict", TRAINED):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items())


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path) -> None:
    train(tmp_path)

    with pytest.raises(CheckpointError, match="no average"):
        train(tmp_path, WeightAverage(DECAY), epochs=5, resume=tmp_path / "last.ckpt")
