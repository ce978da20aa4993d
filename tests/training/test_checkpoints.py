import csv
import errno
import io
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from theia.errors import ConfigError, FileError
from theia.training import checkpoints
from theia.training.checkpoints import Checkpoints, DurableCheckpoints, StopRequested, lowest_loss
from theia.training.records import MetricsCSV


class Scripted(L.LightningModule):
    """One step an epoch; the held-out loss of each is given."""

    def __init__(self, losses: Mapping[int, float]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(1, 1)
        self.losses = losses

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.losses[self.global_step])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


LOSSES = {1: 2.06, 2: 1.81, 3: 1.68, 4: 1.11, 5: 1.0045, 6: 1.0746, 7: 1.01, 8: 1.0}


def fit(
    run: Path,
    epochs: int,
    *more: L.Callback,
    resume: str | None = "last",
    every: int = 1,
    rows: int = 1,
    minutes: float = math.inf,
    io: type[DurableCheckpoints] = DurableCheckpoints,
) -> None:
    """Trains, from a checkpoint of the run, or of anywhere if ``resume`` is a path, if there is one."""
    last = run / "checkpoints" / f"{resume}.ckpt"
    steps = torch.load(last, weights_only=True)["global_step"] if last.exists() else None
    data = DataLoader(TensorDataset(torch.ones(rows, 1)))
    L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=MetricsCSV(run, steps), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, plugins=[io()],
        callbacks=[*more, Checkpoints(run / "checkpoints", every, every_minutes=minutes)], default_root_dir=run,
    ).fit(Scripted(LOSSES), data, data, ckpt_path=last if last.exists() else None, weights_only=True)  # fmt: skip


def best_step(run: Path) -> int:
    return int(torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["global_step"])


def best_row(run: Path) -> int:
    with (run / "metrics.csv").open() as file:
        losses = {int(row["step"]): float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]}
    return min(losses, key=lambda step: losses[step]) + 1


@pytest.mark.parametrize("moved", [False, True])
def test_the_best_is_that_of_the_rows_whenever_a_run_ends_goes_on_or_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    run = tmp_path / "run"
    for epochs, best in ((5, 5), (6, 5), (7, 5), (8, 8)):
        if moved and epochs == 6:
            shutil.copytree(run, tmp_path / "elsewhere" / "run")
            shutil.rmtree(run)
            monkeypatch.chdir(tmp_path / "elsewhere")
            run = Path("run")
        fit(run, epochs)
        assert best_step(run) == best_row(run) == best


def test_a_checkpoint_of_steps_that_are_taken_again_is_not_the_best(tmp_path: Path) -> None:
    fit(tmp_path, 5)
    torch.save({"hyper_parameters": {}, "state_dict": {}, "global_step": 6, "callbacks": {"Checkpoints": {
        "val/loss": 0.1}}}, tmp_path / "checkpoints" / "best.ckpt")  # fmt: skip

    fit(tmp_path, 6)

    assert best_step(tmp_path) == best_row(tmp_path) == 5


def test_the_best_of_an_earlier_versions_run_is_known(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    states = {"ModelCheckpoint{'monitor': 'val/loss'}": {"best_model_score": torch.tensor(1.5), "dirpath": "/there"}}
    torch.save({"hyper_parameters": {}, "state_dict": {}, "global_step": 4, "callbacks": states}, path)

    assert lowest_loss(path, 4) == 1.5
    assert lowest_loss(path, 3) == math.inf
    path.write_bytes(path.read_bytes()[:100])
    assert lowest_loss(path, 4) == math.inf


def test_a_best_checkpoint_stays_as_it_is_when_the_last_one_goes_on(tmp_path: Path) -> None:
    fit(tmp_path, 5)
    before = (tmp_path / "checkpoints" / "best.ckpt").read_bytes()

    fit(tmp_path, 7)

    assert (tmp_path / "checkpoints" / "best.ckpt").read_bytes() == before


def test_a_checkpoint_is_written_beside_its_target_and_not_by_way_of_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "is not there"))
    path = tmp_path / "run" / "last.ckpt"

    DurableCheckpoints().save_checkpoint({"step": 1}, path)

    assert torch.load(path) == {"step": 1}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "last.ckpt"
    DurableCheckpoints().save_checkpoint({"step": 1}, path)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(FileError, match=r"Disk full while writing .*\(file system /"):
            DurableCheckpoints().save_checkpoint({"step": 2}, path)

    assert torch.load(path) == {"step": 1}
    assert [other.name for other in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_disk_that_is_full_in_the_midst_of_a_checkpoint_is_told(tmp_path: Path) -> None:
    class Full:
        """A file on a full disk, as torch sees it."""

        def __reduce__(self) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "last.ckpt"
    with pytest.raises(FileError, match="Disk full"):
        DurableCheckpoints().save_checkpoint({"step": Full()}, path)

    assert not list(tmp_path.iterdir())


class Signalled(L.Callback):
    """Sends this process a signal in the midst of a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_before_zero_grad(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class Killed(BaseException):
    """In place of the signal that ends a process."""


class Kill(L.Callback):
    """Ends this process' training before its first step."""

    def on_train_batch_start(self, *args: Any) -> None:
        raise Killed


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM whose ``scontrol`` notes what it was asked."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return tmp_path / "asked"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path: Path, scontrol: Path, number: int) -> None:
    before = signal.getsignal(number)
    run = tmp_path / "run"

    with pytest.raises(StopRequested) as stopped:
        fit(run, 1, Signalled(number, step=3), every=1000, rows=8)

    assert (stopped.value.number, stopped.value.step) == (number, 4)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert scontrol.exists() == (number == signal.SIGUSR1)
    if scontrol.exists():
        assert scontrol.read_text() == "requeue 7\n"
    assert signal.getsignal(number) == before


def test_a_damaged_last_checkpoint_never_becomes_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fit(tmp_path, 2)
    shutil.copy(folder / "last.ckpt", folder / "early.ckpt")
    fit(tmp_path, 3)
    (folder / "last.ckpt").write_bytes(b"damaged")

    with pytest.raises(Killed):
        fit(tmp_path, 3, Kill(), resume="early")

    assert best_step(tmp_path) == 2  # that of the steps which are not taken again


def test_validations_in_the_midst_of_a_step_are_refused(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.ones(6, 1)))
    for interval, works in ((3, False), (2, True), (4, True), (6, True)):
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, accumulate_grad_batches=2, val_check_interval=interval,
            callbacks=[Checkpoints(tmp_path / str(interval), 1)],
        )  # fmt: skip
        if works:
            trainer.fit(Scripted(LOSSES), data, data)
        else:
            with pytest.raises(ConfigError, match=r"trainer\.val_check_interval .* 2"):
                trainer.fit(Scripted(LOSSES), data, data)


def test_a_branch_that_is_killed_at_once_goes_on_from_where_it_left_the_other_run(tmp_path: Path) -> None:
    fit(tmp_path / "run", 3)
    branch = tmp_path / "branch"
    branch.mkdir()
    shutil.copy(tmp_path / "run" / "checkpoints" / "last.ckpt", branch / "fork.ckpt")

    with pytest.raises(Killed):
        fit(branch, 5, Kill(), resume=str(branch / "fork"))
    assert {path.name for path in (branch / "checkpoints").iterdir()} == {"last.ckpt"}

    fit(branch, 5)
    fit(tmp_path / "run", 5)

    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (branch, tmp_path / "run")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 5
    assert torch.equal(ends[0]["state_dict"]["layer.weight"], ends[1]["state_dict"]["layer.weight"])
    assert best_step(branch) == best_row(branch) == 5


def test_a_logger_of_the_users_gets_each_row_once(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.ones(4, 1)))
    given = CSVLogger(tmp_path, name="", version="")
    L.Trainer(
        accelerator="cpu", max_epochs=1, logger=given, log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[Checkpoints(tmp_path / "checkpoints", 1)],
    ).fit(Logged(LOSSES | {4: 1.0}), data, data)  # fmt: skip

    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss"]] == ["0", "1", "2", "3"]


class Logged(Scripted):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss


def test_a_second_interrupt_ends_the_run_at_once(tmp_path: Path) -> None:
    fit(tmp_path, 1, every=2, rows=2)
    twice = [Signalled(signal.SIGINT, step=3), Signalled(signal.SIGINT, step=3)]

    with pytest.raises(SystemExit):  # what Lightning makes of a KeyboardInterrupt
        fit(tmp_path, 9, *twice, every=1000, rows=2)

    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2


def test_a_signal_before_a_validation_ends_the_run_after_it(tmp_path: Path) -> None:
    with pytest.raises(StopRequested):
        fit(tmp_path, 5, Signalled(signal.SIGTERM, step=2))

    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["global_step"], last["callbacks"]["Checkpoints"]["val/loss"]) == (3, pytest.approx(1.68))
    assert best_step(tmp_path) == 3


def test_a_queue_that_refuses_is_told(
    tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Requested operation is disabled' >&2\nexit 1\n")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")

    with pytest.raises(StopRequested):
        fit(tmp_path / "run", 5, Signalled(signal.SIGUSR1, step=2))

    assert "SLURM did not take job 5_2 into the queue again: Requested operation is disabled." in caplog.text


class Interrupted(io.BytesIO):
    """A file in whose second write a Ctrl-C comes."""

    writes = 0

    def write(self, *arguments: Any) -> int:
        self.writes += 1
        if self.writes == 2:
            raise KeyboardInterrupt
        return super().write(*arguments)


def test_a_ctrl_c_while_a_checkpoint_is_written_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    DurableCheckpoints().save_checkpoint({"step": 1}, path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: Interrupted())
        with pytest.raises(KeyboardInterrupt):
            DurableCheckpoints().save_checkpoint({"step": torch.tensor(2)}, path)

    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]


class Slow(DurableCheckpoints):
    """Writes a checkpoint only when training has gone on for two steps, and notes what it writes."""

    written: ClassVar[list[tuple[int, float]]] = []
    at_once: ClassVar[list[int]] = []
    taken: ClassVar[list[int]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.at_once.append(1)
        assert len(self.at_once) == 1
        step = checkpoint["global_step"]
        deadline = time.monotonic() + 20
        while len(self.taken) < min(step + 2, 8) and time.monotonic() < deadline:
            time.sleep(0.005)
        super().save_checkpoint(checkpoint, path)
        self.written.append((step, float(checkpoint["state_dict"]["layer.bias"])))
        self.at_once.pop()


class Taken(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        Slow.taken.append(trainer.global_step)


def test_training_goes_on_while_one_checkpoint_is_written_as_it_was(tmp_path: Path) -> None:
    for noted in (Slow.written, Slow.taken):
        noted.clear()

    fit(tmp_path, 1, Taken(), every=3, rows=8, io=Slow)

    # Each step lowers the bias by 0.1. The last checkpoint is that of the validation.
    steps = [step for step, _ in Slow.written]
    assert steps == [3, 6, 8]
    first = Slow.written[0][1] + 0.3
    assert [bias for _, bias in Slow.written] == pytest.approx([first - 0.1 * step for step in steps])
    assert best_step(tmp_path) == 8


class FullDisk(DurableCheckpoints):
    """Has no room from the second step on."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if checkpoint["global_step"] > 1:
            raise FileError(f"Disk full at step {checkpoint['global_step']}")
        super().save_checkpoint(checkpoint, path)


@pytest.mark.parametrize("rows", [2, 8], ids=["at the end", "in a step"])
def test_a_checkpoint_that_cannot_be_written_is_told_and_the_one_before_stays(tmp_path: Path, rows: int) -> None:
    with pytest.raises(FileError, match="Disk full at step 2"):
        fit(tmp_path, 1, rows=rows, io=FullDisk)

    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_an_error_of_the_training_does_not_hide_that_of_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaks(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            trainer.callbacks[-1].on_train_batch_end(trainer)  # begins to write
            if index == 1:
                raise ConfigError("this ends the training")

    with pytest.raises(ConfigError, match="this ends the training"):
        fit(tmp_path, 1, Breaks(), rows=8, io=FullDisk)

    assert "not written either: Disk full at step 2" in caplog.text


def test_a_checkpoint_is_written_after_some_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    class Noted(DurableCheckpoints):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            steps.append(checkpoint["global_step"])
            super().save_checkpoint(checkpoint, path)

    class Hours(L.Callback):
        """A minute passes with every step."""

        def on_train_batch_start(self, *args: Any) -> None:
            clock[0] += 60

    clock = [0.0]
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    fit(tmp_path, 1, Hours(), every=1000, minutes=3, rows=8, io=Noted)

    assert steps == [3, 6, 8]
