"""``metrics.csv``, TensorBoard's events and the two checkpoints say the same, wherever a run was killed."""

import csv
import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from theia.data.datamodule import FeatureData
from theia.data.sampler import teachers_of_step
from theia.errors import FileError
from theia.training.checkpoints import Checkpoints, DurableCheckpoints
from theia.training.distillation import Distillation
from theia.training.records import Events, MetricsCSV, cut_rows

TIMES = ("train/images_per_s", "train/cpu_s", "minutes_left")


def fit(store: Path, run: Path) -> None:
    """Two epochs of two steps, a row for each; goes on from ``last.ckpt`` if there is one."""
    last = run / "checkpoints" / "last.ckpt"
    steps = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
    L.seed_everything(0, verbose=False)
    data = FeatureData(str(store), batch_size=40, workers=0)
    module = Distillation(data.teacher_shapes, image_size=32, width=16, depth=1, heads=2, learning_rate=1e-2)
    L.Trainer(
        accelerator="cpu", max_epochs=2, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, plugins=[DurableCheckpoints()], logger=[Events(run, steps), MetricsCSV(run, steps)],
        callbacks=[Checkpoints(run / "checkpoints", every_n_steps=1)], default_root_dir=run,
    ).fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)  # fmt: skip


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def events(run: Path) -> list[tuple[int, str, float]]:
    found = []
    for path in sorted(run.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag not in TIMES and value.tensor.float_val:
                    found.append((event.step, value.tag, value.tensor.float_val[0]))
    return sorted(found)


def killed_at(run: Path, call: int, work: Callable[[], object]) -> bool:
    """Does work in a process that dies right before its ``call``-th change of a file in a folder.

    Returns:
        Whether it died; otherwise it came to its end with fewer changes.
    """
    child = os.fork()
    if child == 0:
        left = iter(range(call - 1, -1, -1))

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate")
            writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if (changes or writes) and str(arguments[0]).startswith(str(run)) and next(left, None) == 0:
                os._exit(9)

        try:
            sys.addaudithook(watch)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_killed_before_each_change_of_a_file_a_run_ends_with_the_same_records(store: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    fit(store, whole)
    validations = {row["val/loss"]: int(row["step"]) for row in rows(whole) if row["val/loss"]}
    assert [row["step"] for row in rows(whole)] == ["0", "1", "1", "2", "3", "3"]  # steps, and two validations
    died = 0
    for call in range(1, 1000):
        run = tmp_path / f"killed_{call}"
        if not killed_at(run, call, lambda run=run: fit(store, run)):
            break
        died += 1
        fit(store, run)
        assert rows(run) == rows(whole), call
        assert events(run) == events(whole), call
        best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
        assert best["global_step"] - 1 == validations[min(validations, key=float)], call
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}, call
    assert died > 20


def test_a_row_is_handed_over_twice_and_written_once(tmp_path: Path) -> None:
    metrics = MetricsCSV(tmp_path)
    for step in (0, 0, 1):
        metrics.log_metrics({"loss": float("nan")}, step=step)
    metrics.log_metrics({"val": 1.0}, step=1)

    assert (tmp_path / "metrics.csv").read_text() == "loss,step,val\nnan,0,\nnan,1,\n,1,1.0\n"


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_row_that_a_kill_cut_short_is_no_row(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("loss,step\n0.9,1\n0.8,3\n0.7,15\n"[:-cut])

    columns = cut_rows(path, steps=100)

    assert columns == ["loss", "step"]
    assert path.read_text() == "loss,step\n0.9,1\n0.8,3\n"[: -6 if cut > 7 else None]


@pytest.mark.parametrize("grows", [False, True], ids=["append", "new column"])
def test_a_full_disk_keeps_the_rows_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grows: bool
) -> None:
    metrics = MetricsCSV(tmp_path)
    metrics.log_metrics({"loss": 0.9}, step=0)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        if not grows:
            patch.setattr(Path, "open", full)
        with pytest.raises(FileError, match=r"Disk full while writing .*metrics\.csv \(file system /"):
            metrics.log_metrics({"loss": 0.8} | ({"val": 0.5} if grows else {}), step=1)

    assert (tmp_path / "metrics.csv").read_text() == "loss,step\n0.9,0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_events_and_rows_of_steps_that_are_taken_again_are_cut(tmp_path: Path) -> None:
    for resumed_at, steps in ((None, range(8)), (5, range(5, 7))):
        for records in (Events(tmp_path, resumed_at), MetricsCSV(tmp_path, resumed_at)):
            for step in steps:
                records.log_metrics({"loss": float(step)}, step=step)
            records.finalize("success")

    assert events(tmp_path) == [(step, "loss", float(step)) for step in range(7)]
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(str(step), f"{step}.0") for step in range(7)]


def test_what_a_step_did_not_measure_stands_nowhere(store: Path, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    data = FeatureData(str(store), batch_size=40, workers=0, teachers_per_step=1)
    module = Distillation(data.teacher_shapes, image_size=32, width=16, depth=1, heads=2)
    L.Trainer(
        accelerator="cpu", max_epochs=2, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, enable_checkpointing=False, logger=[Events(tmp_path), MetricsCSV(tmp_path)],
    ).fit(module, data)  # fmt: skip

    drawn = [teachers_of_step(["alpha", "beta"], 1, 0, step) for step in range(4)]
    steps = [row for row in rows(tmp_path) if row["train/loss"]]
    assert [[name for name in ("alpha", "beta") if row[f"train/mse/{name}"]] for row in steps] == drawn
    shown = [(step, tag.rpartition("/")[2]) for step, tag, _ in events(tmp_path) if tag.startswith("train/mse")]
    assert shown == [(step, name) for step, (name,) in enumerate(drawn)]
