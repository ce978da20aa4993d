"""Each option of ``fit``, ``validate`` and ``test``: used or refused, in its range, true of its run."""

import csv
import inspect
import json
import os
import shutil
import signal
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace

import theia
from theia.cli import lightning, run_folder
from theia.cli.lightning import TheiaCLI
from theia.cli.main import main
from theia.cli.options import OPTIONS, changes, check_used, shaping, without
from theia.cli.trainer import check_course
from theia.data.datamodule import FeatureData
from theia.errors import ConfigError
from theia.training.averaging import TRAINED
from theia.training.distillation import COURSE
from theia.training.records import METRICS

pytestmark = pytest.mark.usefixtures("one_parser")

COMMANDS = ("fit", "validate", "test")
SMALL = {
    "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "log_every_n_steps": 1},
    "model": {"width": 16, "depth": 1, "heads": 2},
    "data": {"batch_size": 16, "workers": 0},
}


@pytest.fixture(scope="module")
def parsers() -> dict[str, Any]:
    class Parsers(TheiaCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise StopIteration

    cli = Parsers.__new__(Parsers)
    with pytest.raises(StopIteration):
        cli.__init__(  # type: ignore[misc]
            lightning.Distillation, lightning.TrainingData, args=["fit"], auto_configure_optimizers=False,
            subclass_mode_data=True, parser_class=lightning.DataParser,
        )  # fmt: skip
    return dict(cli._subcommand_parsers)


def test_help_begins_with_what_the_command_does(parsers: dict[str, Any]) -> None:
    assert parsers["fit"].description.startswith("Train a student on a feature store")


def names_of(parser: Any) -> set[str]:
    """What can be typed; groups, help and links are none."""
    linked = {"model.teachers", "model.image_size", "trainer.default_root_dir"}
    groups = {"trainer", "model", "data", "help", "print_config"}
    names = {action.dest for action in parser._actions if not action.dest.endswith(".help")}
    of_data = {f"data.{name}" for name in inspect.signature(FeatureData).parameters}
    return names - linked - groups | of_data


@pytest.fixture(scope="module")
def config(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "data": {**SMALL["data"], "store": str(store)}}))
    return path


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert main(["fit", f"--config={config}", f"--run_folder={folder}"]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_in_the_table_and_the_help_lists_what_is_used(
    parsers: dict[str, Any], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = names_of(parsers[command])
    assert options <= OPTIONS.keys()
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for name in options:
        assert (f"--{name} " in shown) == (command in OPTIONS[name].commands), name
    assert {name for name, option in OPTIONS.items() if command in option.commands} <= options | {"data.class_path"}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_a_command_does_not_use_is_refused_where_it_is_typed(command: str) -> None:
    for name, option in OPTIONS.items():
        for arguments in ([f"--{name}", "1"], [f"--{name}=1"]):
            if command in option.commands:
                check_used(command, arguments)
            else:
                with pytest.raises(ConfigError, match=f"'theia {command}' .* --{name}: "):
                    check_used(command, arguments)


def test_a_config_of_fit_serves_test(config: Path, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    assert main(["test", f"--config={copy / 'config.yaml'}", "--ckpt_path=best"]) == 0

    assert (copy / "test_best.json").exists()


def test_a_report_goes_where_the_command_line_says(config: Path, run: Path, tmp_path: Path) -> None:
    best = run / "checkpoints" / "best.ckpt"

    assert main(["test", f"--config={config}", f"--ckpt_path={best}", f"--run_folder={tmp_path / 'sp ace'}"]) == 0

    assert (tmp_path / "sp ace" / "test_best.json").exists()
    assert not (run / "test_best.json").exists()


# Another value of each option of the model and the data.
OTHER: dict[str, Any] = {
    "model.backbone": "theia_small", "model.registers": 4, "model.weights": "pretrained", "model.width": 32,
    "model.depth": 2, "model.heads": 4, "model.translator": "linear", "model.loss": {"mse": 1.0},
    "model.lift": 24, "model.wide_last": 64, "model.shift": 0.3, "model.backbone_stage": 1,
    "model.teacher_weights": {"alpha": 2.0}, "model.distill_cls": True,
    "model.learning_rate": 0.05, "model.scale_learning_rate": True, "model.weight_decay": 0.1,
    "model.decay_rule": "authors", "model.warmup": 0.5, "model.betas": [0.9, 0.95],
    "model.balance": "ada", "model.teacher_dropping": 0.5, "model.cls_loss": "angle",
    "model.normalizer": "power", "model.normalizer_exponent": 0.5,
    "model.optimizer": "timm.optim.Muon", "model.optimizer_options": {"amsgrad": True},
    "model.schedule": "cosine", "model.ema": 0.9, "model.patch_dropout": 0.5,
    "model.compile": True, "model.cuda_graphs": True,
    "data.teachers": ["alpha"],
    "data.batch_size": 8, "data.val_batch_size": 7, "data.workers": 1, "data.fraction": 0.9, "data.seed": 1,
    "data.val_split": "other", "data.holdout": 0.2, "data.weights": {"web": 2.0},
    "data.image_sizes": [16, 32], "data.teachers_per_step": 1,
}  # fmt: skip


def test_there_is_another_value_for_every_option_of_model_and_data(parsers: dict[str, Any]) -> None:
    options = {name for name in names_of(parsers["fit"]) if name.startswith(("model.", "data."))}

    assert OTHER.keys() | {"data.store"} == options


@pytest.mark.parametrize("option", [name for name in OTHER if OPTIONS[name].resumed == "same"])
def test_an_option_that_shapes_training_is_refused_on_resuming(
    config: Path, run: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)

    value = json.dumps(OTHER[option]) if isinstance(OTHER[option], dict | list) else OTHER[option]

    again = ["fit", f"--config={config}", f"--run_folder={run}", "--ckpt_path=last", "--trainer.max_epochs=2"]
    assert main([*again, f"--{option}={value}"]) == 1

    said = capsys.readouterr().err
    assert option.rpartition(".")[2] in said
    assert "Traceback" not in said
    assert contents(run) == before


def test_options_without_a_bearing_on_what_is_learned_may_change_and_others_are_written_down(
    config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    free = [f"--{name}={value}" for name, value in OTHER.items() if OPTIONS[name].resumed == "free"]
    assert len(free) == 3

    again = ["fit", f"--config={config}", f"--run_folder={copy}", "--ckpt_path=last"]
    same = ["--trainer.limit_train_batches=1.0", "--trainer.precision=32-true"]  # where nothing is given
    assert main([*again, *free, *same, "--trainer.max_epochs=2"]) == 0
    assert "From step 5 on, trainer.max_epochs is 2; until then it was 1." in capsys.readouterr().err
    assert main([*again, "--trainer.max_epochs=3", "--trainer.precision=bf16-mixed"]) == 0

    expected = [(5, "trainer.max_epochs", 1, 2), (10, "trainer.max_epochs", 2, 3)]
    last = torch.load(copy / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["Checkpoints"]
    by_option = [tuple(change.values()) for change in last["changes"]]
    assert by_option == [*expected, (10, "trainer.precision", "32-true", "bf16-mixed")]
    environment = json.loads((copy / "environment.json").read_text())
    assert [tuple(change.values()) for change in environment["changes"]] == [
        *by_option, (10, "precision", "32-true", "bf16-mixed"),
    ]  # fmt: skip
    written = yaml.safe_load((copy / "config.yaml").read_text())
    assert (written["trainer"]["max_epochs"], written["ckpt_path"]) == (3, None)


def test_a_checkpoint_of_an_earlier_version_is_of_a_constant_rate_without_an_average(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert not {COURSE, TRAINED} & checkpoint.keys()
    now = dict(checkpoint["callbacks"]["Checkpoints"]["options"])
    for name in ("schedule", "ema", "betas", "optimizer", "optimizer_options", "normalizer", "normalizer_exponent",
                 "balance", "teacher_dropping", "patch_dropout", "cls_loss", "lift", "wide_last",
                 "shift"):  # fmt: skip
        del checkpoint["callbacks"]["Checkpoints"]["options"][f"model.{name}"]
    for name in ("image_sizes", "teachers_per_step"):
        del checkpoint["callbacks"]["Checkpoints"]["options"][f"data.{name}"]

    assert changes(checkpoint, now) == []
    for name, value in {"schedule": "wsd", "ema": 0.9, "betas": [0.9, 0.95]}.items():
        with pytest.raises(ConfigError, match=f"model.{name} was"):
            changes(checkpoint, {**now, f"model.{name}": value})


@pytest.mark.parametrize(
    ("schedule", "planned", "done", "now", "goes_on"),
    [
        ("cosine", 10, 6, {"max_epochs": 10}, True),
        ("cosine", 10, 6, {"max_epochs": 10, "max_steps": 50}, True),
        ("cosine", 10, 6, {"max_epochs": 20}, False),
        ("cosine", 10, 6, {"max_epochs": 8}, False),
        ("cosine", 10, 10, {"max_epochs": 11}, False),
        ("wsd", 10, 6, {"max_epochs": 20}, True),
        ("wsd", 10, 6, {"max_epochs": 8}, True),  # falls from the 32nd of 40 steps on
        ("wsd", 10, 6, {"max_epochs": 7}, False),  # would have fallen already
        ("wsd", 10, 6, {"max_epochs": 10, "max_steps": 32}, False),
        ("wsd", 10, 6, {"max_epochs": 80}, False),  # would still be in its warm-up
        ("wsd", 10, 9, {"max_epochs": 20}, False),  # falls already
        ("wsd", 10, 9, {"max_epochs": None, "max_steps": 50}, True),
        ("wsd", 10, 9, {"max_epochs": -1, "max_steps": 51}, False),
        ("wsd", 1000, 9, {"max_epochs": None}, True),
    ],
)  # fmt: skip
def test_another_number_of_steps_is_refused_if_the_learning_rate_would_jump(
    schedule: str, planned: int, done: int, now: dict[str, Any], goes_on: bool
) -> None:
    checkpoint = {
        "global_step": 5 * done, COURSE: {"steps": 5 * planned, "steps_per_epoch": 5},
        "hyper_parameters": {"schedule": schedule, "warmup": 0.1},
    }  # fmt: skip
    trainer = Namespace(**{"max_steps": -1, **now})

    if goes_on:
        check_course(trainer, checkpoint)
    else:
        with pytest.raises(ConfigError, match=f"was planned for {5 * planned}: after step {5 * done} it would jump"):
            check_course(trainer, checkpoint)


def test_the_courses_of_checkpoints_are_those_of_the_command_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["fit", f"--config={config}", "--ckpt_path=last", "--model.learning_rate=0.01", "--checkpoint_every=1"]
    for schedule in ("cosine", "wsd"):
        run = tmp_path / schedule
        last = run / "checkpoints" / "last.ckpt"
        begun = [*again, f"--run_folder={run}", f"--model.schedule={schedule}", "--trainer.accumulate_grad_batches=2"]
        assert main([*begun, "--trainer.max_epochs=2"]) == 0
        checkpoint = torch.load(last, weights_only=True)
        assert checkpoint[COURSE] == {"steps": 6, "steps_per_epoch": 3}
        assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0
        before = contents(run)
        capsys.readouterr()

        assert main([*begun, "--trainer.max_epochs=3"]) == 1

        assert f"model.schedule {schedule}) was planned for 6: after step 6 it would jump" in capsys.readouterr().err
        assert contents(run) == before


def test_a_run_of_wsd_that_is_cut_short_in_its_flat_part_falls_to_zero_at_its_new_end(
    config: Path, tmp_path: Path
) -> None:
    again = ["fit", f"--config={config}", f"--run_folder={tmp_path}", "--ckpt_path=last", "--model.schedule=wsd"]
    # A file that is there, so that the run stops after its first step.
    stop = json.dumps([{"class_path": "trainings.Stopping", "init_args": {"file": str(config)}}])
    assert main([*again, "--trainer.max_epochs=4", f"--trainer.callbacks={stop}", "--model.warmup=0"]) == 0
    assert main([*again, "--trainer.max_epochs=2", "--model.warmup=0"]) == 0

    with (tmp_path / METRICS).open() as file:
        rates = [float(row["train/learning_rate"]) for row in csv.DictReader(file) if row["train/learning_rate"]]

    assert rates == pytest.approx([5e-4] * 9 + [2.5e-4])  # ten steps, the last two of them fall


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model.schedule=wsd", "--model.warmup=0.9"], "--model.warmup is 0.9, but"),
        (["--model.schedule=step"], "schedule"),
        (["--model.ema=1"], "--model.ema is 1.0; it must be below 1"),
        (["--model.ema=0"], "--model.ema is 0.0; it must be above 0"),
        (["--model.betas=[0.9, 1.0]"], "--model.betas is 1.0; it must be below 1"),
        (["--model.betas=[0.9]"], "betas"),
        (["--model.optimizer=torch.optim.Moun"], "--model.optimizer is torch.optim.Moun, which cannot be imported"),
        (["--model.optimizer_options={momentum: 0.9}"], "momentum"),
    ],
)
def test_a_senseless_recipe_is_refused_before_anything_is_written(
    config: Path, tmp_path: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["fit", f"--config={config}", f"--run_folder={tmp_path / 'run'}", *given])
    except SystemExit as stop:
        code = int(stop.code or 0)

    assert code in (1, 2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_tested_exported_and_loaded_is_the_average(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert (
        main(["fit", f"--config={config}", f"--run_folder={run}", "--model.ema=0.7", "--model.learning_rate=0.01"]) == 0
    )
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert main(["test", f"--config={run / 'config.yaml'}", "--ckpt_path=best"]) == 0
    assert main(["export", f"--encoder={run / 'checkpoints' / 'best.ckpt'}", f"--out={tmp_path / 'exported'}"]) == 0

    report = json.loads((run / "test_best.json").read_text())
    assert report["after"]["test/loss"] == pytest.approx(best["callbacks"]["Checkpoints"]["val/loss"], rel=1e-6)
    for place in (run / "checkpoints" / "best.ckpt", tmp_path / "exported"):
        weights = theia.load(place).state_dict()
        same, other = (
            [torch.equal(weights[name], best[part][name]) for name in weights if "distiller.student." in name]
            for part in ("state_dict", TRAINED)
        )
        assert len(same) > 5
        assert all(same)
        assert not all(other)


@pytest.mark.parametrize("first", [True, False], ids=["begun in bfloat16", "begun in float32"])
def test_a_run_keeps_the_precision_that_was_chosen_for_it(
    first: bool, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin, chosen = tmp_path / "begun", "Training in bfloat16"
    monkeypatch.setattr("theia.cli.trainer.has_bfloat16_cpu", lambda: first)
    assert main(["fit", f"--config={config}", f"--run_folder={begin}"]) == 0
    assert (chosen in capsys.readouterr().err) == first

    monkeypatch.setattr("theia.cli.trainer.has_bfloat16_cpu", lambda: not first)
    again = ["fit", f"--config={config}", f"--run_folder={begin}", "--ckpt_path=last"]
    assert main([*again, "--trainer.max_epochs=2"]) == 0

    said = capsys.readouterr().err
    assert chosen not in said
    assert "trainer.precision is" not in said
    precision = "bf16-mixed" if first else "32-true"
    assert json.loads((begin / "environment.json").read_text())["precision"] == precision
    assert yaml.safe_load((begin / "config.yaml").read_text())["trainer"]["precision"] == precision

    other = "32-true" if first else "bf16-mixed"
    assert main([*again, "--trainer.max_epochs=3", f"--trainer.precision={other}"]) == 0
    assert json.loads((begin / "environment.json").read_text())["precision"] == other


@pytest.mark.parametrize("name", ["FeatureData", "FeatureDataModule"])  # the other of an earlier version
def test_features_of_other_weights_are_refused_on_resuming(
    config: Path, run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    last = copy / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint[name] = checkpoint.pop("FeatureData")
    assert checkpoint[name]["features"].keys() == {"alpha", "beta"}
    checkpoint[name]["features"]["beta"] = "a digest of other weights"
    torch.save(checkpoint, last)
    before = contents(copy)

    again = ["fit", f"--config={config}", f"--run_folder={copy}", "--ckpt_path=last", "--trainer.max_epochs=2"]
    assert main(again) == 1

    assert "The features of beta in the store" in capsys.readouterr().err
    assert contents(copy) == before


def test_a_run_goes_on_where_it_was_moved_to_and_no_checkpoint_knows_a_path(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "deit.pth"
    import timm

    torch.save(timm.models.vision_transformer.VisionTransformer(
        img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=3).state_dict(), weights)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["fit", f"--config={config}", "--run_folder=there/run", f"--model.weights={weights}"]) == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "there" / "run", tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    weights.unlink()

    assert main(["fit", "--config=moved/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=2"]) == 0

    assert not (tmp_path / "elsewhere" / "there").exists()
    rows = [line for line in Path("moved", METRICS).read_text().splitlines()[1:] if line]
    assert len(rows) == 12  # ten steps, two validations
    for name in ("last", "best"):
        checkpoint = torch.load(Path("moved/checkpoints", f"{name}.ckpt"), weights_only=True)
        texts = [text for text in texts_in(checkpoint) if "/" in text and not text.startswith(("val/", "train/"))]
        assert texts == []
        assert checkpoint["hyper_parameters"]["weights"] == "deit.pth"


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts_in(key)
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def test_steps_are_not_given_up_by_going_on_from_an_earlier_checkpoint(
    config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.copy(copy / "checkpoints" / "last.ckpt", copy / "checkpoints" / "early.ckpt")
    again = ["fit", f"--config={config}", f"--run_folder={copy}"]
    assert main([*again, "--ckpt_path=last", "--trainer.max_epochs=2"]) == 0
    before = contents(copy)

    early = f"--ckpt_path={copy / 'checkpoints' / 'early.ckpt'}"
    assert main([*again, early, "--trainer.max_epochs=2"]) == 1
    assert "is of step 5, but" in capsys.readouterr().err
    assert contents(copy) == before

    (copy / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    assert main([*again, early, "--trainer.max_epochs=2"]) == 0


def test_fewer_epochs_than_are_done_are_refused(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    again = ["fit", f"--config={config}", f"--run_folder={run}", "--ckpt_path=last"]

    assert main([*again, "--trainer.max_steps=3"]) == 1

    assert "trainer.max_steps is 3, but the checkpoint has 5 steps taken" in capsys.readouterr().err


def test_a_checkpoint_of_lightnings_own_is_pointed_to_and_not_taken_in_silence(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"")

    assert main(["fit", f"--config={config}", f"--run_folder={tmp_path}", "--ckpt_path=last"]) == 1

    assert f"--ckpt_path {tmp_path / 'hpc_ckpt_1.ckpt'}" in capsys.readouterr().err


def test_a_run_whose_last_checkpoint_is_gone_is_not_started_anew_over_its_records(
    config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "last.ckpt").unlink()
    before = contents(copy)

    again = ["fit", f"--config={config}", f"--run_folder={copy}", "--ckpt_path=last", "--trainer.max_epochs=2"]
    assert main(again) == 1

    assert f"--ckpt_path {copy / 'checkpoints' / 'best.ckpt'}" in capsys.readouterr().err
    assert contents(copy) == before


def test_a_resumed_run_without_its_records_is_refused_and_so_are_other_held_out_images(
    store: Path, config: Path, run: Path, tmp_path: Path, make_split: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    other = tmp_path / "store"
    shutil.copytree(store, other)
    shutil.rmtree(other / "val")
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["splits"]["val"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    make_split(other, "val", 8)

    again = ["fit", f"--config={config}", f"--run_folder={run}", "--ckpt_path=last", "--trainer.max_epochs=2"]
    assert main([*again, "--trainer.logger=false"]) == 1
    assert "trainer.logger is false, but" in capsys.readouterr().err
    assert main([*again, f"--data.store={other}"]) == 1
    assert "The held-out images of the store" in capsys.readouterr().err
    assert contents(run) == before


def test_what_a_start_changed_whose_steps_were_lost_has_never_been(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    dead = [{"step": 14, "option": "precision", "old": "32-true", "new": "bf16-mixed"}]
    path.write_text(json.dumps({"precision": "bf16-mixed", "device": "cpu", "changes": dead}))

    assert run_folder._with_changes(path, {"precision": "32-true", "device": "cpu"}, [], 14) == []
    assert run_folder._with_changes(path, {"precision": "32-true", "device": "cpu"}, [], 20) == [
        *dead, {"step": 20, "option": "precision", "old": "bf16-mixed", "new": "32-true"},
    ]  # fmt: skip


def test_one_batch_is_not_all_batches_and_callbacks_are_their_options() -> None:
    def of(**trainer: Any) -> dict[str, Any]:
        values = Namespace({f"trainer.{name}": value for name, value in trainer.items()})
        values["model.weights"] = "scratch"
        return shaping(values)

    checkpoint = {"global_step": 3, "callbacks": {"Checkpoints": {"options": of(limit_val_batches=1.0)}}}
    with pytest.raises(ConfigError, match=r"trainer\.limit_val_batches .* 1\.0, .* 1\."):
        changes(checkpoint, of(limit_val_batches=1))

    sums = [[{"class_path": "Summing", "init_args": {"scheduling": {"0": batches}}}] for batches in (1, 8)]
    checkpoint = {"global_step": 3, "callbacks": {"Checkpoints": {"options": of(callbacks=sums[0])}}}
    assert [change.option for change in changes(checkpoint, of(callbacks=sums[1]))] == ["trainer.callbacks"]


def test_a_command_is_repeated_without_an_option_of_it() -> None:
    words = ["fit", "--ckpt_path", "a.ckpt", "--x", "--ckpt_path=b.ckpt", "--y=--ckpt_path"]

    assert without("ckpt_path", words) == ["fit", "--x", "--y=--ckpt_path"]


def test_under_slurm_lightning_writes_no_checkpoint_of_its_own(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "train", "NTASKS_PER_NODE": "1", "PROCID": "0",
                        "LOCALID": "0", "NODEID": "0", "NNODES": "1", "JOB_NUM_NODES": "1"}.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    environments = []
    trainer = TheiaCLI.instantiate_trainer
    monkeypatch.setattr(TheiaCLI, "instantiate_trainer", lambda *args, **kwargs: environments.append(
        made := trainer(*args, **kwargs)) or made)  # fmt: skip

    assert main(["fit", f"--config={config}", f"--run_folder={tmp_path / 'run'}"]) == 0

    environment = environments[0]._accelerator_connector.cluster_environment
    assert (type(environment).__name__, environment.auto_requeue) == ("SLURMEnvironment", False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_ends_the_command_and_leaves_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)]
    monkeypatch.setattr(lightning, "check_processes", lambda trainer: os.kill(os.getpid(), number))

    assert main(["fit", f"--config={config}", f"--run_folder={tmp_path / 'run'}"]) == 128 + number

    assert not (tmp_path / "run").exists()
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)] == handlers


# Numbers that look senseless and are no mistake that a range could tell.
SENSIBLE = {
    "trainer.gradient_clip_val": "1e+30",  # never clips
    "checkpoint_minutes": "1e+30",  # by steps alone
    "model.learning_rate": "1e+30",  # the loss tells, before a checkpoint is written
    "model.weight_decay": "1e+30",  # likewise
}
SENSELESS = ("-7", "nan", "inf", "1e+30")


def numeric(parser: Any) -> list[str]:
    def kinds(hint: Any) -> set[Any]:
        return {hint} | {kind for part in typing.get_args(hint) for kind in kinds(part)}

    hints = {action.dest: getattr(action, "_typehint", None) or action.type for action in parser._actions}
    hints |= {f"data.{name}": hint for name, hint in typing.get_type_hints(FeatureData.__init__).items()}
    return [name for name, hint in hints.items() if name in OPTIONS and kinds(hint) & {int, float}]


def test_a_senseless_number_is_refused_with_its_name_before_anything_is_written(
    parsers: dict[str, Any], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    checked = numeric(parsers["fit"])
    assert {
        "model.learning_rate",
        "model.ema",
        "model.betas",
        "data.batch_size",
        "trainer.max_epochs",
        "checkpoint_every",
    } <= set(checked)
    wrong = []
    for name in checked:
        if "fit" not in OPTIONS[name].commands:
            continue
        for value in SENSELESS:
            if SENSIBLE.get(name) == value:
                continue
            try:
                code = main(["fit", f"--config={config}", f"--run_folder={run}", f"--{name}={value}"])
            except SystemExit as stop:
                code = stop.code
            except Exception as error:
                code = repr(error)
            said = capsys.readouterr().err
            if code not in (1, 2) or name.rpartition(".")[2] not in said or "Traceback" in said or run.exists():
                wrong.append((name, value, code, said[-300:]))
            shutil.rmtree(run, ignore_errors=True)
    assert wrong == []
