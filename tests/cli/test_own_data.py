"""``--data``: training data of a user's own, with the configs that are written for a feature store."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from events import wait_for
from trainings import hold, standing

from theia.cli.data import data_last, flat
from theia.cli.main import main
from theia.cli.options import changes, shaping

pytestmark = pytest.mark.usefixtures("one_parser")

CONFIG = Path("configs/cdiv_tiny.yaml").absolute()
TOY = "--data=toy_data.Toy"
SMALL = [
    "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--model.width=16", "--model.depth=1",
    "--model.heads=2", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
    "--checkpoint_every=1",
]  # fmt: skip


def options(run: Path, *more: str) -> list[str]:
    return [f"--config={CONFIG}", TOY, "--data.batch_size=16", f"--run_folder={run}", *SMALL, *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    assert main(["fit", *options(folder)]) == 0
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)["data"]


def test_data_without_a_store_train_and_are_tested_with_scorers(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    assert environment["images"] == 48

    assert main(["test", f"--config={run / 'config.yaml'}", "--ckpt_path=best", "--scorers=readout"]) == 0

    report = json.loads((run / "test_best.json").read_text())
    assert report["samples"] == 16
    assert report["after"]["test/cosine/toy"] > report["before"]["test/cosine/toy"]
    assert report["scores"]["readout/cosine/toy"] > 0


def test_nothing_of_it_needs_the_store() -> None:
    import toy_data

    import theia.data.protocol

    for module in (toy_data, theia.data.protocol):
        names = [getattr(value, "__module__", "") for value in vars(module).values()]
        assert not [name for name in names if str(name).startswith("theia.store")]


@pytest.mark.slow
def test_a_killed_run_goes_on_at_the_next_sample(run: Path, tmp_path: Path) -> None:
    command = ["fit", *options(tmp_path / "run")]
    hold(tmp_path / "stand", 4)  # in the midst of the second epoch of three steps
    stand = ["--trainer.callbacks=trainings.Standing", f"--trainer.callbacks.folder={tmp_path / 'stand'}"]
    process = forked.theia(*command, *stand)
    wait_for(lambda: standing(tmp_path / "stand") or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    forked.run("fit", "--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path=last", "--trainer.callbacks=null")

    ours, whole = (torch.load(path / "checkpoints" / "last.ckpt") for path in (tmp_path / "run", run))
    assert ours["Toy"] == whole["Toy"]
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in whole["state_dict"].items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("--data=FeatureData", "data.class_path was 'toy_data.Toy', now it is 'FeatureData'"),
        ("--data.samples=48", "their order would change"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    run: Path, other: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "checkpoints" / "last.ckpt").read_bytes()

    again = ["fit", f"--config={run / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_epochs=4", other]
    assert main(again) == 1

    assert message in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_checkpoint_of_an_earlier_version_had_a_store() -> None:
    from jsonargparse import Namespace

    config = Namespace(data=Namespace(store="s", batch_size=4))
    config["model.weights"] = "scratch"
    now = shaping(config)
    then = {name: value for name, value in now.items() if name != "data.class_path"}

    assert now["data.class_path"] == "FeatureData"
    assert changes({"global_step": 1, "callbacks": {"Checkpoints": {"options": then}}}, now) == []


def test_the_example_of_the_documentation_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    example = page.partition("```python\n")[2].partition("```")[0]
    small = example.replace("224", "32").replace("[16, 16]", "[4, 4]").replace("384", "6")
    (tmp_path / "data_of_the_page.py").write_text(small)
    monkeypatch.syspath_prepend(tmp_path)
    torch.save((torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8), torch.randn(40, 16, 6)), tmp_path / "f.pt")

    data = ["--data=data_of_the_page.Recordings", f"--data.file={tmp_path / 'f.pt'}", "--data.batch_size=16"]
    assert main(["fit", f"--config={CONFIG}", *SMALL, *data, f"--run_folder={tmp_path / 'run'}"]) == 0
    assert main(["test", f"--config={tmp_path / 'run' / 'config.yaml'}", "--ckpt_path=best"]) == 0

    assert json.loads((tmp_path / "run" / "test_best.json").read_text())["samples"] == 4


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_class_may_be_named_before_or_after_a_config_for_a_store(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = f"--config={CONFIG}"

    data = printed(capsys, *((TOY, config) if place == "before" else (config, TOY)), "--data.samples=80")

    assert data == {"class_path": "toy_data.Toy", "init_args": {"samples": 80, "batch_size": 128}}


def test_defaults_are_those_of_the_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, TOY) == {"class_path": "toy_data.Toy", "init_args": {"samples": 64, "batch_size": 16}}


@pytest.mark.parametrize(
    "said",
    [
        {"store": "s", "batch_size": 4},
        {"class_path": "FeatureData", "init_args": {"store": "s", "batch_size": 4}},
        {"class_path": "theia.data.datamodule.FeatureData", "init_args": {"store": "s", "batch_size": 4}},
    ],
)
def test_feature_data_are_written_as_they_always_were(
    said: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": said}))

    data = printed(capsys, f"--config={tmp_path / 'config.yaml'}", "--data.seed=3")

    assert "class_path" not in data
    assert (data["store"], data["batch_size"], data["seed"]) == ("s", 4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=toy_data.Nothing"], "toy_data.Nothing"),
        (["--data=torch.nn.Linear"], "TrainingData"),
        (["--data=toy_data.Unfinished"], "Unfinished"),
        ([TOY, "--data.colour=3"], "colour"),
        (["--data=null"], "TrainingData"),
    ],
)
def test_what_is_no_training_data_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["fit", *arguments, f"--run_folder={tmp_path / 'run'}"])
    except SystemExit as stop:
        code = stop.code

    said = capsys.readouterr().err
    assert code in (1, 2)
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_scorers_of_data_without_an_order_are_refused_before_any_work(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--config={run / 'config.yaml'}", "--data=toy_data.Unordered", "--scorers=readout"]

    assert main(["test", *arguments, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"]) == 1

    assert "ordered_dataloader" in capsys.readouterr().err
    assert not (run / "test_last.json").exists()


def test_a_sweep_over_data_without_a_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"data": {"class_path": "toy_data.Toy"}}))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": str(base), "rows": {"a": {"model.warmup": 0.1}}}))

    assert main(["ablate", f"--config={tmp_path / 'sweep.yaml'}", f"--out={tmp_path / 'out'}", "--dry_run"]) == 1

    assert "toy_data.Toy" in capsys.readouterr().err


def test_words_about_the_data_move_only_where_a_class_is_named() -> None:
    assert data_last(["fit", "--data.x=1", "--config", "c"]) == ["fit", "--data.x=1", "--config", "c"]
    assert data_last(["fit", "--data", "A", "--data.x", "1", "--config", "c", "--model.y=2"]) == [
        "fit", "--config", "c", "--model.y=2", "--data", "A", "--data.x", "1",
    ]  # fmt: skip


def test_options_are_flat_however_they_are_written() -> None:
    assert flat(None) == {"class_path": "FeatureData"}
    assert flat({"store": "s"}) == {"class_path": "FeatureData", "store": "s"}
    assert flat({"class_path": "a.B", "init_args": {"x": 1}}) == {"class_path": "a.B", "x": 1}
    assert flat({"class_path": "a.B"}) == {"class_path": "a.B"}
