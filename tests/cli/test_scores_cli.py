import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from trajectories.discs import record

from theia.cli.main import main
from theia.data.datamodule import FeatureData
from theia.probing import comparison
from theia.probing.heads import Fit
from theia.scoring import contract
from theia.scoring import scorers as scoring
from theia.scoring.contract import Trained
from theia.scoring.scorers import write_report

pytestmark = pytest.mark.usefixtures("one_parser")

OPTIONS = ["--trainer.accelerator=cpu", "--model.width=16", "--model.depth=1", "--model.heads=2", "--data.workers=0"]
Register = Callable[[Callable[[Trained], Any]], None]


def command_line(store: Path, run: Path, *more: str) -> list[str]:
    return [
        "test", *OPTIONS, f"--data.store={store}", "--data.teachers=alpha", f"--run_folder={run}",
        "--ckpt_path=last", "--compare_untrained=false", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose student was distilled from one of the store's two teachers. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = [f"--data.store={store}", "--data.teachers=alpha", f"--run_folder={folder}", "--data.batch_size=16"]
    assert main(["fit", *OPTIONS, *options, "--trainer.max_steps=3"]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, for one test."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Installs one scorer, named ``fox``."""

    def install(scorer: Callable[[Trained], Any]) -> None:
        monkeypatch.setattr(contract, "find_scorer", lambda name: {"fox": scorer}[name])

    return install


def test_a_teacher_that_the_student_never_saw_is_scored(
    store: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command_line(store, run, "--scorers=readout,classification", "--scorer_images=64")) == 0

    report = json.loads((run / "test_last.json").read_text())
    assert report["scorers"] == ["readout", "classification"]
    assert report["scorer_images"] == 64
    assert report["scores"]["readout/explained_variance/beta"] <= 1
    assert 0 <= report["scores"]["classification/linear_probe_accuracy"] <= 1
    assert "test/cosine/beta" not in report["after"]
    shown = capsys.readouterr()
    cosine = f"{report['scores']['readout/cosine/beta']:.3f}"
    rows = [line.split() for line in shown.out.splitlines()]
    assert any(row[:3] == ["beta", "no", cosine] for row in rows)
    assert any(row[:2] == ["alpha", "yes"] for row in rows)
    assert "Scorer readout: Fits a linear translator to every teacher" in shown.err


def test_another_store_s_teachers_are_read_out(
    store: Path, run: Path, tmp_path: Path, make_split: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, rows in (("train", 40), ("val", 20)):
        make_split(tmp_path / "other", split, rows, "float16")
    other = f"readout@{tmp_path / 'other'}"
    assert main(command_line(store, run, f"--scorers={other}", "--scorer_images=30")) == 0
    report = json.loads((run / "test_last.json").read_text())
    assert report["scorers"] == [other]
    assert report["scorer_data"] == {other: FeatureData(str(tmp_path / "other")).store.manifest_sha256}
    assert main(command_line(store, run, "--scorers=readout", "--scorer_images=30")) == 0
    own = json.loads((run / "test_last.json").read_text())
    assert set(report["scores"]) == set(own["scores"])
    assert report["scores"] != own["scores"]
    assert f"{report['scores']['readout/cosine/beta']:.3f}" in capsys.readouterr().out


def test_the_report_counts_what_scorers_can_fit_to(
    store: Path, run: Path, register: Register, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FeatureData, "scorers_fit_to", 7)  # as if the others were views
    register(lambda trained: {"most": trained.images})
    assert main(command_line(store, run, "--scorers=fox", "--scorer_images=30")) == 0
    report = json.loads((run / "test_last.json").read_text())
    assert (report["scorer_images"], report["scores"]["fox/most"]) == (7, 30)
    assert "fitted on 7 training images" in capsys.readouterr().out


def test_the_run_s_own_config_takes_scorers_as_a_list(store: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "scorers.yaml").write_text("scorers: [classification]\n")
    # The last one could tell where a run has been moved to, and is not of a run.
    configs = [f"--config={run / 'config.yaml'}", f"--config={tmp_path / 'scorers.yaml'}", f"--run_folder={run}"]

    assert main(["test", *configs, "--ckpt_path=last", "--compare_untrained=false"]) == 0

    assert json.loads((run / "test_last.json").read_text())["scorers"] == ["classification"]


def test_without_scorers_the_report_says_so(store: Path, run: Path) -> None:
    assert main(command_line(store, run)) == 0

    report = json.loads((run / "test_last.json").read_text())
    assert (report["scorers"], report["scores"], report["scorer_images"]) == ([], {}, None)


@pytest.mark.parametrize("command", ["fit", "test"])
def test_an_unknown_scorer_is_one_line_before_any_work(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "scorers.yaml").write_text("scorers: raedout\n")
    options = [f"--data.store={store}", f"--run_folder={tmp_path / 'run'}", f"--config={tmp_path / 'scorers.yaml'}"]

    assert main([command, *OPTIONS, *options]) == 1

    (line,) = [line for line in capsys.readouterr().err.splitlines() if "raedout" in line]
    assert line.startswith(f"theia {command}: No scorer named 'raedout'. Did you mean 'readout'?")
    assert not (tmp_path / "run").exists()


def test_no_images_to_fit_on_are_refused(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command_line(store, tmp_path, "--scorer_images=0")) == 1

    assert "scorer_images is 0" in capsys.readouterr().err


def test_what_a_scorer_is_given(store: Path, run: Path, register: Register) -> None:
    seen: dict[str, Any] = {}

    def fox(trained: Trained) -> Mapping[str, float]:
        parts = {"train": trained.train, "held_out": trained.held_out}
        for name, part in parts.items():
            seen[name] = [row for _ in range(2) for batch in part() for row in batch.rows.tolist()]
        batch = next(iter(trained.train()))
        seen.update(trained=trained, teachers=set(batch.patches), random=torch.rand(1).item())
        for name, part in parts.items():
            batches = list(part(features=False))
            assert [row for batch in batches for row in batch.rows.tolist()] == seen[name][: len(seen[name]) // 2]
            assert all(not batch.patches and batch.labels is not None for batch in batches)
        return {"one": 1, "two/beta": torch.tensor(2.0)}  # numbers of other kinds

    register(fox)
    arguments = command_line(store, run, "--scorers=fox", "--scorer_images=30", "--seed_everything=7")
    assert main(arguments) == 0
    first = dict(seen)
    assert main(arguments) == 0

    trained = seen["trained"]
    assert len(set(seen["train"])) == 30
    assert seen["train"][:30] == seen["train"][30:] == sorted(set(seen["train"]))
    assert seen["held_out"] == list(range(20)) * 2
    assert seen["teachers"] == set(trained.shapes) == set(trained.statistics) == {"alpha", "beta"}
    assert trained.encoder.teachers == ["alpha"]
    assert not trained.encoder.training
    assert not any(parameter.requires_grad for parameter in trained.encoder.parameters())
    assert trained.checkpoint == run / "checkpoints" / "last.ckpt"
    assert trained.seed == 7
    assert (seen["train"], seen["random"]) == (first["train"], first["random"])
    assert json.loads((run / "test_last.json").read_text())["scores"] == {"fox/one": 1, "fox/two/beta": 2}


@pytest.mark.slow
def test_of_two_processes_the_first_scores_all_images(store: Path, run: Path) -> None:
    reports = []
    for processes in (1, 2):
        more = ["--scorers=readout", f"--trainer.devices={processes}", "--trainer.strategy=ddp"]
        forked.run(*command_line(store, run, *more))
        reports.append(json.loads((run / "test_last.json").read_text())["scores"])

    assert reports[0] == pytest.approx(reports[1], rel=1e-4)


def fails(trained: Trained) -> Mapping[str, float]:
    raise ZeroDivisionError("no hens")


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (fails, "Scorer 'fox' failed: ZeroDivisionError: no hens"),
        (lambda trained: {"hens/beta": math.nan}, "Scorer 'fox' gave nan for 'hens/beta'"),
        (lambda trained: {"hens": "many"}, "Scorer 'fox' gave 'many' for 'hens'"),
        (lambda trained: 3, "Scorer 'fox' failed: TypeError"),
    ],
)
def test_a_scorer_that_fails_is_named_and_leaves_no_report(
    store: Path, run: Path, register: Register, capsys: pytest.CaptureFixture[str], scorer: Any, message: str
) -> None:
    register(scorer)

    assert main(command_line(store, run, "--scorers=fox")) == 1

    assert message in capsys.readouterr().err
    assert not (run / "test_last.json").exists()


def test_teachers_that_are_not_finished_are_left_out(
    tmp_path: Path, make_split: Any, run: Path, register: Register
) -> None:
    for split, rows in (("train", 80), ("val", 20)):
        make_split(tmp_path / "store", split, rows)
    manifest = tmp_path / "store" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["splits"]["val"]["sets"]["beta"]["complete"] = False
    manifest.write_text(json.dumps(content))
    seen = []
    register(lambda trained: seen.append(set(trained.shapes)) or {})

    assert main(command_line(tmp_path / "store", run, "--scorers=fox")) == 0

    assert seen == [{"alpha"}]


def test_classes_that_are_numbered_differently_are_no_labels(
    tmp_path: Path, make_split: Any, run: Path, register: Register, capsys: pytest.CaptureFixture[str]
) -> None:
    make_split(tmp_path / "store", "train", 80)
    make_split(tmp_path / "store", "val", 20, classes=["odd", "even"])
    seen = []
    register(lambda trained: seen.extend(batch.labels for batch in trained.held_out()) or {})

    assert main(command_line(tmp_path / "store", run, "--scorers=fox")) == 0

    assert set(seen) == {None}
    assert "number their classes differently" in capsys.readouterr().err


def test_a_store_that_holds_out_training_images_fits_on_the_others(
    tmp_path: Path, make_split: Any, register: Register
) -> None:
    make_split(tmp_path / "store", "train", 80)
    shared = [f"--data.store={tmp_path / 'store'}", "--data.holdout=0.1", f"--run_folder={tmp_path / 'run'}"]
    assert main(["fit", *OPTIONS, *shared, "--data.batch_size=16", "--data.fraction=0.5", "--trainer.max_steps=1"]) == 0
    rows: dict[str, set[int]] = {}

    def fox(trained: Trained) -> Mapping[str, float]:
        for name in ("train", "held_out"):
            rows[name] = {row for batch in getattr(trained, name)() for row in batch.rows.tolist()}
        return {}

    register(fox)
    assert main(["test", f"--config={tmp_path / 'run' / 'config.yaml'}", "--ckpt_path=last", "--scorers=fox"]) == 0

    assert len(rows["held_out"]) == 8
    assert rows["train"] | rows["held_out"] == set(range(80))
    assert not rows["train"] & rows["held_out"]


def test_a_table_holds_every_score_once() -> None:
    given = {
        "fox/speed": 1.25,
        "fox/speed/beta": 2.5,
        "fox/height/alpha": 3.75,
        "fox/height/unknown": 4.5,
        "owl/speed": 9,
    }

    shown = scoring.scores_table("fox", given, ["beta"])

    assert [line.split() for line in shown.splitlines() if "--" not in line] == [
        ["fox", "distilled", "speed", "height"],
        ["beta", "yes", "2.500"],
        ["alpha", "no", "3.750"],
        ["unknown", "no", "4.500"],
        ["overall", "1.250"],
    ]


def test_a_report_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "test_last.json"

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_report(path, {"scores": {}})
        assert not path.exists()
    write_report(path, {"scores": {}})
    assert json.loads(path.read_text()) == {"scores": {}}
    assert list(path.parent.iterdir()) == [path]


def test_a_student_is_scored_on_recorded_trajectories(run: Path, store: Path, tmp_path: Path) -> None:
    data = record(tmp_path / "robot", episodes=6, frames=20)

    assert main(command_line(store, run, f"--scorers=dynamics@{data}")) == 0

    report = json.loads((run / "test_last.json").read_text())
    assert report["scorers"] == [f"dynamics@{data}"]
    assert set(report["scores"]) == {"dynamics/plan_error", "dynamics/motion_error"}
    assert all(0 < error < 5 for error in report["scores"].values())


def test_a_student_is_scored_on_rooms_as_the_probe_does(
    run: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = replace(comparison.PRESETS["small"], head=Fit(1, 0.5, 4, 5e-3), rooms=(2, 1))
    monkeypatch.setitem(comparison.PRESETS, "small", quick)
    assert main(command_line(store, run, "--scorers=dense")) == 0
    scores = json.loads((run / "test_last.json").read_text())["scores"]

    checkpoint = str(run / "checkpoints/last.ckpt")
    options = ["--data", "scenes", "--out", str(tmp_path / "probes"), "--device", "cpu"]
    assert main(["probe", "dense", "--encoders", checkpoint, *options]) == 0
    (probed,) = (tmp_path / "probes").glob("*.json")
    _, figures = json.loads(probed.read_text())["figures"].values()
    same = {
        "depth_rmse": "depth/rmse", "normals_rmse": "normals/angular_rmse", "mean_iou": "segmentation/mean_iou",
        "recall_10px": "correspondence/recall_10px",
    }  # fmt: skip
    assert scores == {
        f"dense/{name}": pytest.approx(figures[figure]["mean"], rel=1e-4) for name, figure in same.items()
    }


@pytest.mark.parametrize(
    ("scorers", "noun"),
    [
        ("dynamics", "dynamics@FOLDER"),
        ("dense@nowhere", "nowhere"),
        ("dynamics@nowhere", "nowhere"),
        ("readout,readout@x", "twice"),
    ],
)
def test_what_a_scorer_of_trajectories_lacks_is_said(
    run: Path, store: Path, capsys: pytest.CaptureFixture[str], scorers: str, noun: str
) -> None:
    assert main(command_line(store, run, f"--scorers={scorers}")) == 1

    assert noun in capsys.readouterr().err
