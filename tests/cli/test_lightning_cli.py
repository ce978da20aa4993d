import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from events import aged, changed, wait_for
from lightning.pytorch.callbacks import TQDMProgressBar
from trainings import hold, standing

from theia.cli.main import main
from theia.training.averaging import TRAINED

pytestmark = pytest.mark.usefixtures("one_parser")

SMALL = ["--trainer.accelerator=cpu", "--model.width=16", "--model.depth=1", "--model.heads=2", "--data.batch_size=16"]


def scoring(store: Path, *more: str) -> list[str]:
    """Options of validate and test: those of fit, as they stand in a run's config, are no options of theirs."""
    return [*(option for option in SMALL if "batch_size" not in option), f"--data.store={store}", *more]


def options(store: Path, run: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        f"--data.store={store}",
        f"--run_folder={run}",
        "--trainer.max_epochs=2",
        "--checkpoint_every=3",
        *more,
    ]


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

    assert main(["test", *scoring(store, f"--ckpt_path={best}")]) == 0

    report = json.loads((run / "test_best.json").read_text())
    assert report["after"]["test/cosine/alpha"] > report["before"]["test/cosine/alpha"]
    assert (run / "test_best.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "explained variance after" in shown
    assert f"{report['after']['test/cosine/alpha']:.3f}" in shown


def test_a_used_run_folder_is_refused(store: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = aged(run)

    assert main(["fit", *options(store, run)]) == 1

    assert "--ckpt_path last" in capsys.readouterr().err
    assert before == changed(path for path in run.rglob("*"))


def test_another_run_is_not_overwritten_by_going_on_from_a_checkpoint(
    store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "other")
    before = (tmp_path / "other" / "checkpoints" / "last.ckpt").read_bytes()

    assert main(["fit", *options(store, tmp_path / "other", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}")]) == 1

    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "other" / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("command", ["test", "validate"])
def test_scoring_a_checkpoint_that_is_not_there_yet_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, *scoring(store, f"--run_folder={tmp_path}", "--ckpt_path=last")]) == 1

    assert "No checkpoint at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["test", "validate"])
def test_scoring_without_a_checkpoint_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, *scoring(store)]) == 1

    assert "--ckpt_path" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named_with_what_is_there(
    store: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", *scoring(store, f"--ckpt_path={run / 'checkpoints' / 'first.ckpt'}")]) == 1

    assert "last.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_refused(
    store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    damaged = tmp_path / "damaged.ckpt"
    whole = bytearray((run / "checkpoints" / "last.ckpt").read_bytes())
    whole[300:303] = b"\xff\xfe\xfd"  # in the pickle
    damaged.write_bytes({"truncated": whole[:2000], "flipped": whole, "empty": b""}[damage])

    assert main(["test", *scoring(store, f"--ckpt_path={damaged}")]) == 1

    assert "cannot be read" in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture_is_refused(
    store: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run / "checkpoints" / "last.ckpt"

    assert main(["test", *scoring(store, f"--ckpt_path={last}", "--model.width=32")]) == 1

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


@pytest.mark.parametrize("every", [1, 4, 50])
def test_a_loss_that_is_not_finite_stops_before_a_checkpoint_is_lost(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], every: int
) -> None:
    run = tmp_path / "run"
    # The first step takes the weights so far out that the products of the second are not finite.
    wild = ["--model.learning_rate=1e30", "--model.warmup=0", f"--trainer.log_every_n_steps={every}"]

    assert main(["fit", *options(store, run, *wild)]) == 1

    assert re.search("loss of teacher 'alpha', 'beta' is not finite since step 1\\.", capsys.readouterr().err)
    assert not list((run / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--checkpoint_every=0", "checkpoint_every is 0"),
        ("--trainer.max_epochs=-1", "Set trainer.max_epochs or trainer.max_steps"),
        ("--trainer.precision=bf16-true", "Use bf16-mixed"),
        ("--data.batch_size=0", "batch_size is 0"),
        ("--data.batch_size=256", "fewer than one global batch"),
        ("--model.teacher_weights={gamma: 1}", "gamma"),
    ],
)
def test_an_option_that_cannot_work_is_refused_before_anything_is_written(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert main(["fit", *options(store, tmp_path / "run", option)]) == 1

    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_launcher_with_more_processes_than_the_trainer_expects_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert main(["fit", *options(store, tmp_path / "run")]) == 1

    assert "started 2 processes, but the trainer expects 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option",
    ["--trainer.fast_dev_run=true", "--trainer.logger=false", "--trainer.enable_checkpointing=false",
     "--trainer.callbacks=LearningRateMonitor", "--trainer.gradient_clip_val=1.0 --trainer.precision=bf16-mixed"],
)  # fmt: skip
def test_the_trainers_own_options_work(store: Path, tmp_path: Path, option: str) -> None:
    assert main(["fit", *options(store, tmp_path / "run", "--trainer.max_epochs=1", *option.split())]) == 0


@pytest.mark.parametrize(
    ("option", "measures"),
    [
        ("--trainer.precision=32-true", True),
        ("--trainer.benchmark=false", False),
        ("--trainer.deterministic=true", False),
    ],
)
def test_training_has_cudnn_measure_its_convolutions_unless_told_otherwise(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, measures: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    try:
        assert main(["fit", *options(store, tmp_path / "run", "--trainer.fast_dev_run=1", option)]) == 0
    finally:
        torch.use_deterministic_algorithms(False)

    assert torch.backends.cudnn.benchmark == measures


@pytest.mark.parametrize("bar", ["none", "own"])
def test_no_progress_or_another_bar_can_be_asked_for(
    bar: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = []
    monkeypatch.setattr(TQDMProgressBar, "on_train_start", lambda *args: bars.append(args))
    monkeypatch.setattr(TQDMProgressBar, "on_train_epoch_start", lambda *args: None)
    monkeypatch.setattr(TQDMProgressBar, "on_train_end", lambda *args: None)
    asked = {"none": "--trainer.enable_progress_bar=false", "own": "--trainer.callbacks=TQDMProgressBar"}[bar]
    assert main(["fit", *options(store, tmp_path / "run", "--trainer.max_epochs=1", asked)]) == 0
    assert "epoch 1/1" not in capsys.readouterr().err
    assert len(bars) == (bar == "own")


def test_no_validation_means_no_best_checkpoint_and_says_so(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *options(store, tmp_path / "run", "--trainer.max_steps=2")]) == 0

    assert "no best.ckpt" in capsys.readouterr().err


def test_logged_terms_are_those_of_the_logged_step(store: Path, run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]

    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9]
    for row in rows:
        by_teacher = [
            0.9 * (1 - float(row[f"train/cosine/{name}"])) + 0.1 * float(row[f"train/smooth_l1/{name}"])
            for name in ("alpha", "beta")
        ]
        assert float(row["train/loss"]) == pytest.approx(sum(by_teacher) / 2, rel=1e-4)


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
    command = ["fit", *options(store, folder, "--trainer.log_every_n_steps=2", "--trainer.precision=32-true")]
    hold(tmp_path / "stand", 4)  # a step after the checkpoint
    standing_there = ["--trainer.callbacks=trainings.Standing", f"--trainer.callbacks.folder={tmp_path / 'stand'}"]
    process = forked.theia(*command, *standing_there)
    wait_for(lambda: standing(tmp_path / "stand") or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    rows_before = (folder / "metrics.csv").read_text() if (folder / "metrics.csv").exists() else ""

    forked.run(*command, "--ckpt_path=last")

    ours, whole = (torch.load(path / "checkpoints" / "last.ckpt")["state_dict"] for path in (folder, run))
    assert all(torch.equal(ours[name], value) for name, value in whole.items())
    assert (folder / "metrics.csv").read_text().count("\n") >= rows_before.count("\n")


def learned(run: Path) -> list[float]:
    """Losses of a run and sums over its weights."""
    with (run / "metrics.csv").open() as file:
        curve = [float(row[name]) for row in csv.DictReader(file) for name in ("train/loss", "val/loss") if row[name]]
    assert len(curve) == 12  # ten steps and two validations
    weights = torch.load(run / "checkpoints" / "last.ckpt")["state_dict"]
    return curve + [float(value.double().abs().sum()) for value in weights.values() if value.is_floating_point()]


def spread(store: Path, run: Path, processes: int) -> list[str]:
    # In float32 on any CPU: a sum over two processes is rounded at other places.
    trainer = {"log_every_n_steps": 1, "devices": processes, "strategy": "ddp", "precision": "32-true"}
    return ["fit", *options(store, run, *(f"--trainer.{name}={value}" for name, value in trainer.items()))]


@pytest.fixture(scope="module")
def by_one(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What one process learns."""
    run = tmp_path_factory.mktemp("runs") / "one"
    forked.run(*spread(store, run, 1))
    return learned(run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes_learn_like_one(store: Path, tmp_path: Path, launcher: str, by_one: list[float]) -> None:
    command = spread(store, tmp_path, 2)
    if launcher == "lightning":
        forked.run(*command)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
        subprocess.run(
            [*torchrun, *forked.PROGRAM, *command], env=forked.environment(), check=True, capture_output=True
        )

    assert by_one == pytest.approx(learned(tmp_path), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        ("--model.ema=0.8", "--model.schedule=cosine", "--trainer.accumulate_grad_batches=2"),
        ("--data.teachers_per_step=1", "--model.schedule=cosine", "--model.balance=ada"),
        ("--model.distill_cls=true", "--model.cls_loss=angle", "--model.schedule=cosine", "--model.lift=24"),
    ],
    ids=["average", "one teacher a step", "angle and lift"],
)
def test_two_processes_learn_by_another_recipe_like_one(store: Path, tmp_path: Path, recipe: tuple[str, ...]) -> None:
    recipe = (*recipe, "--trainer.precision=32-true")
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for processes in (1, 2):
        run = tmp_path / str(processes)
        forked.run(*spread(store, run, processes), *recipe)
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0
        with (run / "metrics.csv").open() as file:
            losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
        parts[processes] = {"losses": torch.tensor(losses)} | {
            f"{part}.{name}": value
            for part in ("state_dict", TRAINED)
            for name, value in checkpoint.get(part, {}).items()
        }

    for name, value in parts[1].items():
        torch.testing.assert_close(parts[2][name], value, rtol=1e-3, atol=1e-5, msg=name)
