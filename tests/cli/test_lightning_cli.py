import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from theia.cli.main import main

SMALL = ["--trainer.accelerator=cpu", "--model.width=16", "--model.depth=1", "--model.heads=2", "--data.batch_size=16"]


def options(store: Path, run: Path, *more: str) -> list[str]:
    return [*SMALL, f"--data.store={store}", f"--run={run}", "--trainer.max_epochs=2", "--checkpoint_every=3", *more]


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished fit."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["fit", *options(store, folder, "--trainer.log_every_n_steps=2")]) == 0
    return folder


def test_fit_fills_the_run_folder(run: Path) -> None:
    assert {"config.yaml", "environment.json", "metrics.csv", "checkpoints"} <= {path.name for path in run.iterdir()}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert list(run.glob("events.out.tfevents.*"))


def test_environment_names_what_the_run_was_made_with(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())

    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(environment["store"]["teachers"]) == {"alpha", "beta"}
    assert len(environment["store"]["manifest_sha256"]) == 64


def test_metrics_are_logged_by_split_metric_and_teacher(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        columns = set(next(csv.reader(file)))

    assert {f"val/{metric}/{name}" for metric in ("cosine", "smooth_l1", "mse", "explained_variance")
            for name in ("alpha", "beta")} <= columns  # fmt: skip
    assert {"train/loss", "train/learning_rate", "train/images_per_s", "val/loss", "val/norm_entropy"} <= columns


def test_test_writes_a_table_a_json_and_a_picture(store: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run / "checkpoints" / "best.ckpt"

    assert main(["test", *options(store, run, f"--ckpt_path={best}")]) == 0

    report = json.loads((run / "test_best.json").read_text())
    assert report["after"]["test/cosine/alpha"] > report["before"]["test/cosine/alpha"]
    assert (run / "test_best.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "explained variance after" in shown
    assert f"{report['after']['test/cosine/alpha']:.3f}" in shown


def test_a_used_run_folder_is_refused(store: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    assert main(["fit", *options(store, run)]) == 1

    assert "--ckpt_path last" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.parametrize("command", ["test", "validate"])
def test_scoring_without_a_checkpoint_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, *options(store, tmp_path)]) == 1

    assert "--ckpt_path" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named_with_what_is_there(
    store: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", *options(store, run, f"--ckpt_path={run / 'checkpoints' / 'first.ckpt'}")]) == 1

    assert "last.ckpt" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(
    store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes((run / "checkpoints" / "last.ckpt").read_bytes()[:2000])

    assert main(["test", *options(store, run, f"--ckpt_path={damaged}")]) == 1

    assert "cannot be read" in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture_is_refused(
    store: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run / "checkpoints" / "last.ckpt"

    assert main(["test", *options(store, run, f"--ckpt_path={last}", "--model.width=32")]) == 1

    assert "width is 16 there, 32 here" in capsys.readouterr().err


def test_a_missing_store_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *options(tmp_path / "nowhere", tmp_path / "run")]) == 1

    message = capsys.readouterr().err
    assert str(tmp_path / "nowhere") in message
    assert "theia extract" in message
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_the_store_lacks_is_named_with_what_it_has(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *options(store, tmp_path / "run", "--data.teachers=alpha,gamma")]) == 1

    message = capsys.readouterr().err
    assert "gamma" in message
    assert "beta" in message


def test_teachers_can_be_a_comma_separated_subset(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    assert main(["fit", *options(store, run, "--data.teachers=beta", "--trainer.max_steps=1")]) == 0

    assert set(torch.load(run / "checkpoints" / "last.ckpt")["hyper_parameters"]["teachers"]) == {"beta"}


def test_a_store_without_validation_split_holds_out_training_images(
    tmp_path: Path, make_split: object, capsys: pytest.CaptureFixture[str]
) -> None:
    make_split(tmp_path / "store", "train", 80)

    assert main(["fit", *options(tmp_path / "store", tmp_path / "run", "--data.holdout=0.1")]) == 0

    assert "held out" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_last_checkpoint(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    assert main(["fit", *options(store, run, "--model.learning_rate=1e30", "--model.warmup=0",
                                 "--trainer.log_every_n_steps=1")]) == 1  # fmt: skip

    message = capsys.readouterr().err
    assert "not finite since step" in message
    assert "'alpha'" in message
    checkpoint = run / "checkpoints" / "last.ckpt"
    if checkpoint.exists():
        state = torch.load(checkpoint)["state_dict"]
        assert all(torch.isfinite(value).all() for value in state.values())


def test_last_before_the_first_checkpoint_starts_a_run(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    assert main(["fit", *options(store, run, "--ckpt_path=last", "--trainer.max_steps=1")]) == 0

    assert "training starts from the beginning" in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_a_run_killed_for_good_is_resumed_by_the_command(store: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "theia", "fit", *options(store, folder, "--trainer.log_every_n_steps=2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    last = folder / "checkpoints" / "last.ckpt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    rows_before = (folder / "metrics.csv").read_text() if (folder / "metrics.csv").exists() else ""

    subprocess.run([*command, "--ckpt_path=last"], check=True, capture_output=True)

    ours, whole = (torch.load(path / "checkpoints" / "last.ckpt")["state_dict"] for path in (folder, run))
    assert all(torch.equal(ours[name], value) for name, value in whole.items())
    assert (folder / "metrics.csv").read_text().count("\n") >= rows_before.count("\n")


@pytest.mark.slow
def test_two_processes_learn_like_one(store: Path, tmp_path: Path) -> None:
    losses = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        more = ["--trainer.log_every_n_steps=1", f"--trainer.devices={processes}", "--trainer.strategy=ddp"]
        command = [sys.executable, "-m", "theia", "fit", *options(store, run, *more)]
        subprocess.run(command, check=True, capture_output=True)
        with (run / "metrics.csv").open() as file:
            losses.append([float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]])
        weights = torch.load(run / "checkpoints" / "last.ckpt")["state_dict"]
        losses[-1] += [float(value.double().abs().sum()) for value in weights.values() if value.is_floating_point()]

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
