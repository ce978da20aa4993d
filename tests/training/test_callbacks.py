import logging
from pathlib import Path

import lightning as L
import pytest

from theia.data.datamodule import FeatureData
from theia.training import callbacks
from theia.training.callbacks import Throughput, TrainingProgress
from theia.training.distillation import Distillation
from theia.utils import progress


def test_a_log_file_is_told_of_every_part_of_a_training(
    store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    caplog.set_level(logging.INFO, progress.logger.name)
    data = FeatureData(str(store), batch_size=40, workers=0)
    model = Distillation(data.teacher_shapes, image_size=32, width=16, depth=1, heads=2)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, log_every_n_steps=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[Throughput(), TrainingProgress()],
    )  # fmt: skip
    trainer.fit(model, data)
    lines = [record.getMessage() for record in caplog.records if record.name == progress.logger.name]
    steps = [line for line in lines if line.startswith("epoch")]
    beginnings = ["epoch 1/2:  25% 1/4 [", "epoch 1/2:  50% 2/4 [", "epoch 2/2:  75% 3/4 [", "epoch 2/2: 100% 4/4 ["]
    assert [line.partition("[")[0] + "[" for line in steps] == [*beginnings, beginnings[-1]]
    # On a slow machine, tqdm gives the seconds of a step instead of the steps of a second.
    assert all("step/s, loss " in line or "s/step, loss " in line for line in steps)
    assert steps[-1].endswith(" img/s]")
    loss = float(trainer.callback_metrics["val/loss"])
    assert [line for line in lines if line.startswith("validation: 100%")][-1].endswith(f", loss {loss:.4g}]")


class Clock(L.Callback):
    """Of CPU time, which a training step takes a second of and a validation step a minute."""

    now = 0.0

    def on_train_batch_start(self, *_: object) -> None:
        self.now += 1

    def on_validation_batch_start(self, *_: object) -> None:
        self.now += 60


def test_the_cost_of_a_training_is_counted_on_and_leaves_validations_out(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, throughput = Clock(), Throughput()
    monkeypatch.setattr(callbacks.time, "process_time", lambda: clock.now)
    data = FeatureData(str(store), batch_size=40, workers=0)
    model = Distillation(data.teacher_shapes, image_size=32, width=16, depth=1, heads=2)
    throughput.load_state_dict({"cpu_s": 100.0})
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, log_every_n_steps=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=[clock, throughput],
    )  # fmt: skip
    trainer.fit(model, data)
    assert trainer.global_step == 4
    assert clock.now > 4 + 2 * 60
    assert trainer.callback_metrics["train/cpu_s"] == 104.0
    assert throughput.state_dict() == {"cpu_s": 104.0}
