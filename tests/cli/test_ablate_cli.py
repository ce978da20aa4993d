import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import yaml
from events import aged, changed, has_ended, wait_for
from trainings import hold, standing

from theia.ablation.sweep_run import lock
from theia.cli.main import main

pytestmark = pytest.mark.usefixtures("one_parser")

FIT = [
    "--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=2",
    "--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false", "--model.width=16", "--model.depth=1",
    "--model.heads=2", "--data.batch_size=16", "--data.workers=0",
]  # fmt: skip


def sweep_file(folder: Path, **content: object) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "sweep"), "teachers": "singles", **content}))
    return str(path)


@pytest.fixture
def ablate(store: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: str, **content: object) -> int:
        options = [f"--data.store={store}", *FIT, *arguments]
        return main(["ablate", "--config", sweep_file(tmp_path, **content), *options])

    return run


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"sweep.yaml"}


def test_a_plan_shows_commands_and_cost_and_writes_nothing(
    ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("--dry_run", "--seeds=1,2", teachers=["all", ["beta"]], options={"model.registers": 4}) == 0
    out = capsys.readouterr().out
    assert out.count("theia fit ") == 4
    assert "--model.registers=4" in out
    assert f"--run_folder={tmp_path}/sweep/beta/seed_2" in out
    assert "0 of 4 runs are finished. To do: 4 runs, 40 steps, 640 images" in out
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"rows": {"a": {"model.registers": 3}}}, [], "row 'a': --model.registers: "),
        ({"rows": {"a": {"model.colour": 3}}}, [], "--model.colour=3"),
        ({"rows": {"a": {"model.wide_last": 100}}}, [], "does not take row 'a': The last block cannot"),
        ({"rows": {"a": {"model.translator": "ladder", "model.lift": 8}}}, [], "Leave out model.lift"),
        ({"rows": {"a": {"data.image_sizes": [30]}}}, [], "data.image_sizes has 30"),
        ({"rows": {"a": {"data.image_sizes": [16], "model.patch_dropout": 0.5}}}, [], "do not go together"),
        ({"rows": {"a": {"data.teachers": ["alpha"], "data.teachers_per_step": 2}}}, [], "there are 1 teachers: alpha"),
        ({"rows": {"a": {"data.batch_size": 999}}}, [], "fewer than one global batch of 999"),
        ({"rows": {"a": {"data.weights": {"web": 2}}}}, [], "data.weights names 'web'"),
        ({"rows": {"a": {"data.teachers": ["x", "alpha"]}, "b": {"data.teachers": ["y", "x"]}}}, [],
         "x (of a, b); y (of b)"),
        ({"product": {"model.size": []}}, [], "product.model.size"),
        ({"teachers": None}, [], "no rows"),
        ({"teachers": "triples"}, [], "'triples'"),
        ({"reference": "gamma"}, [], "--reference: there is no row 'gamma'"),
        ({"scorers": "robot"}, [], "'robot'"),
        ({"scorers": "dynamics"}, [], "dynamics@FOLDER"),
        ({"scorers": "dynamics@/nowhere"}, [], "/nowhere"),
        ({"scorers": "dense@/nowhere"}, [], "/nowhere"),
        ({"scorers": "readout@/nowhere"}, [], "/nowhere"),
        ({"scorers": ["dense", "dense@/nowhere"]}, [], "names dense twice"),
        ({}, ["--jobs=0"], "jobs is 0"),
        ({"options": {"ckpt_path": "x.ckpt"}}, [], "sets ckpt_path"),
        ({}, ["--data.seed", "7"], "sets data.seed"),
        ({}, ["--seeds=1,1"], "seeds is '1,1'"),
        ({}, ["--seeds=x"], "seeds is 'x'"),
        ({}, ["--seeds=4294967296"], "2**32"),
        ({}, ["--seeds", "0", "1"], "second value of --seeds"),
        ({}, ["--checkpoint_every", "5"], "--options.checkpoint_every"),
        ({}, ["--only=gamma"], "--only: there is no row 'gamma'"),
        ({"teachers": ["alpha"]}, [], "[[alpha]]"),
        ({}, ["--data.store=/nowhere"], "/nowhere"),
        ({}, ["--base=/nowhere.yaml"], "/nowhere.yaml"),
        ({"rows": {"a": {"data.teachers": []}}}, [], "row 'a': --data.teachers"),
        ({}, ["--data.teachers=alpha"], "sets data.teachers itself"),
        ({"teachers": None, "rows": {"a": {"model": {"registers": 0}}, "b": {"model.registers": 4}},
          "options": {"model.registers": 8}}, [], "sets model.registers itself"),
        ({}, ["--slurm.timeout_min=3"], "--slurm"),
        ({"only": ""}, [], "--only"),
        ({"teachers": []}, [], "--teachers"),
        ({}, ["--model.depth=x"], "the base of the sweep: --model.depth: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_starts(
    content: dict, arguments: list[str], message: str, ablate: Callable[..., int], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert ablate(*arguments, **content) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert files(tmp_path) == set()


def test_a_row_may_say_that_a_list_of_lightnings_is_empty(
    ablate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    monkeypatch.setenv("HOME", str(store.parent))
    rows = {"a": {"trainer.callbacks": [], "data.store": f"~/{store.name}"}, "b": {}}
    assert ablate("--dry_run", teachers=None, rows=rows, scorers=[]) == 0


def test_slurm_where_there_is_none(
    ablate: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ablate("--launcher=slurm") == 1
    assert "SLURM" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rowz": {"a": {"model.size": "tiny"}}}, "rowz"),
        ({"rows": {"a": None}}, "--rows: "),
        ({"product": {"model.size": "tiny"}}, "--product: "),
    ],
)
def test_a_sweep_file_that_does_not_parse(
    content: dict, message: str, ablate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ablate(**content)
    assert message in capsys.readouterr().err


def test_a_row_that_stands_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "twice.yaml").write_text(
        f"out: {tmp_path}/sweep\nrows:\n  a: {{model.size: tiny}}\n  a: {{model.size: base}}\n"
    )
    assert main(["ablate", "--config", str(tmp_path / "twice.yaml")]) == 1
    assert "twice.yaml" in (said := capsys.readouterr().err)
    assert "'a' twice" in said
    assert "line 3" in said


def test_a_name_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "on.yaml").write_text(f"out: {tmp_path}/sweep\nrows:\n  On: {{model.size: tiny}}\n")
    assert main(["ablate", "--config", str(tmp_path / "on.yaml")]) == 1
    assert "on.yaml, line 3" in capsys.readouterr().err


def test_rows_may_share_options_and_have_stores_of_their_own(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shared.yaml").write_text(
        f"out: {tmp_path}/sweep\nrows:\n  a: &a {{data.store: {store}}}\n  b: {{<<: *a, model.registers: 4}}\n"
    )
    assert main(["ablate", "--config", str(tmp_path / "shared.yaml"), *FIT, "--dry_run"]) == 0
    assert capsys.readouterr().out.count("theia fit ") == 2


def test_a_folder_that_cannot_be_written(
    ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep").touch()
    assert ablate() == 1
    assert "sweep is not a folder" in capsys.readouterr().err


def test_scores_from_elsewhere_are_checked_first(
    ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "robot.csv").write_text("row,success\ngamma,1\n")
    assert ablate("--scores", str(tmp_path / "robot.csv")) == 1
    assert "robot.csv, line 2: the sweep has no row 'gamma'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("log.txt"))
    # Rows that are not run now are no strangers.
    (tmp_path / "robot.csv").write_text("row,success\nbeta,1\n")
    assert ablate("--scores", str(tmp_path / "robot.csv"), "--only=alpha", "--dry_run") == 0


def test_a_teacher_that_is_unfinished_is_left_out(
    ablate: Callable[..., int], store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(store, tmp_path / "store")
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["splits"]["train"]["sets"]["beta"]["complete"] = False
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    option = f"--data.store={damaged}"
    assert ablate("--dry_run", option) == 0
    said = capsys.readouterr()
    assert said.out.count("theia fit ") == 1
    assert "Left out" in said.err
    assert "beta" in said.err
    assert ablate("--dry_run", option, teachers=["singles", ["alpha", "beta"]]) == 1
    assert "beta (of alpha+beta)" in capsys.readouterr().err


def test_equal_rows_are_told(ablate: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"a": {"model.registers": 4}, "b": {"model.registers": "4"}, "c": {"model.registers": 1}}
    assert ablate("--dry_run", "--only", "a,b", teachers=None, rows=rows) == 0
    said = capsys.readouterr()
    assert said.out.count("theia fit ") == 2
    assert "2 times: a; b" in said.err


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.limit_train_batches=0.4"], 4), (["--trainer.limit_train_batches=3"], 6),
        (["--trainer.overfit_batches=2"], 4), (["--trainer.overfit_batches=0"], 10), (["--trainer.max_steps=7"], 7),
        (["--trainer.max_epochs=-1", "--trainer.max_steps=700"], 700),
    ],
)  # fmt: skip
def test_steps_of_a_run(
    options: list[str], steps: int, ablate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("--dry_run", *options, teachers=["all"]) == 0
    assert f"To do: 1 runs, {steps} steps" in capsys.readouterr().out


def test_a_second_sweep_in_one_folder_is_refused(
    ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock(tmp_path / "sweep/.lock"):
        assert ablate() == 1
    assert "Another sweep" in capsys.readouterr().err


def test_a_report_needs_a_sweep_with_something_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "report", str(tmp_path / "nowhere")]) == 1
    assert "sweep.json" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text("{}")
    assert main(["ablate", "report", str(tmp_path)]) == 1
    assert "sweep.json" in capsys.readouterr().err


@pytest.mark.slow
def test_two_rows_from_start_to_report_with_one_that_fails(
    ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {
        "good": {"data.teachers": ["alpha"]},
        "bad": {"model.weights": str(tmp_path / "nothing.pth")},
        "linear": {"model.translator": "linear"},
    }
    content = {"rows": rows, "teachers": None, "reference": "good"}
    forked.sweeps(monkeypatch)
    assert ablate("--jobs=2", **content) == 1

    said = capsys.readouterr()
    assert "Failed: bad, seed 0" in said.out
    assert "nothing.pth" in said.err  # the end of its log
    report = json.loads((tmp_path / "sweep/report.json").read_text())
    assert {row["name"] for row in report["rows"]} == {"good", "linear"}
    good = report["runs"][0]
    assert good["teachers"] == ["alpha"]
    for name in ("test/cosine/alpha", "readout/explained_variance/beta", "classification/knn_accuracy", "images_per_s"):
        assert name in good["scores"]
    assert report["provenance"]["failed"] == ["bad, seed 0"]
    page = (tmp_path / "sweep/report.md").read_text()
    assert report["provenance"]["store"]["manifest_sha256"] in page
    run = tmp_path / "sweep/good/seed_0"
    before = aged(run, "test_last.json") | aged(run, "last.ckpt")

    # Finished rows stay as they are, under whatever path; another option is another sweep.
    rows.pop("bad")
    monkeypatch.chdir(tmp_path)
    assert ablate("--out=sweep", **content) == 0
    assert changed(before) == before
    for dry in ([], ["--dry_run"]):
        assert ablate("--model.learning_rate=0.1", *dry, **content) == 1
    assert "other options: model.learning_rate was 0.0005, is 0.1" in capsys.readouterr().err

    # What is asked for anew adds to what is there.
    assert ablate("--out=sweep", rows={"good": rows["good"]}, teachers=None, seeds=[0]) == 0
    report = json.loads((tmp_path / "sweep/report.json").read_text())
    assert {row["name"] for row in report["rows"]} == {"good", "linear"}

    (tmp_path / "robot.csv").write_text("row,seed,success\ngood,0,0.5\nlinear,0,0.75\n")
    arguments = ["--scores", str(tmp_path / "robot.csv"), "--sort_by", "external/success"]
    assert main(["ablate", "report", str(tmp_path / "sweep"), *arguments]) == 0
    report = json.loads((tmp_path / "sweep/report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["linear", "good"]

    # A sweep remembers its scores from elsewhere; a scorer that fails costs no figures that are there.
    monkeypatch.setattr("theia.cli.ablate.find_scorers", lambda names: dict.fromkeys(names.split(",")))
    capsys.readouterr()
    assert ablate("--out=sweep", "--scores=robot.csv", "--scorers=readout,robot", "--only=good", **content) == 1
    assert "No scorer named 'robot'" in capsys.readouterr().err  # of the process, where it is not installed
    report = json.loads((tmp_path / "sweep/report.json").read_text())
    assert [run["scores"]["external/success"] for run in report["runs"]] == [0.75, 0.5]
    assert report["reference"] == "good"
    assert "no scores of robot" in (tmp_path / "sweep/report.md").read_text()

    # What is lost is told.
    (tmp_path / "sweep/good/seed_0/fit.yaml").unlink()
    assert main(["ablate", "report", str(tmp_path / "sweep"), "--reference=linear"]) == 0
    assert "The run good, seed 0 is lost" in capsys.readouterr().err
    report = json.loads((tmp_path / "sweep/report.json").read_text())
    assert (report["reference"], [row["name"] for row in report["rows"]]) == ("linear", ["linear"])
    assert report["provenance"]["lost"] == ["good, seed 0"]


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_and_interrupted_once_ends_as_if_it_never_was(store: Path, tmp_path: Path) -> None:
    steps, stand = 25, tmp_path / "stand"
    options = {
        "checkpoint_every": 1,
        "trainer.callbacks": [{"class_path": "trainings.Standing", "init_args": {"folder": str(stand)}}],
    }
    content = sweep_file(tmp_path, teachers=["all", "singles"], options=options, scorers="readout")

    def start() -> forked.Started:
        long = ["--trainer.max_epochs=5", "--trainer.check_val_every_n_epoch=100"]
        return forked.theia("ablate", "--config", content, "--jobs=2", f"--data.store={store}", *FIT, *long)

    for step in (6, 12):  # with its children, as when the power fails
        hold(stand, step)
        sweep = start()
        wait_for(lambda: len(standing(stand)) == 2)
        sweep.kill()
        assert sweep.wait() == -signal.SIGKILL
        trainings = standing(stand)
        for training in trainings:
            training.kill()
        wait_for(lambda trainings=trainings: all(map(has_ended, trainings)))
        shutil.rmtree(stand)
    held = hold(stand, 18)
    sweep = start()
    wait_for(lambda: len(standing(stand)) == 2)
    trainings = standing(stand)
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait() == 130, sweep.err
    assert all(map(has_ended, trainings))

    held.unlink()
    sweep = start()
    assert sweep.wait() == 0, sweep.err

    report = json.loads((tmp_path / "sweep/report.json").read_text())
    assert [row["seeds"] for row in report["rows"]] == [[0], [0], [0]]
    for row in ("all", "alpha", "beta"):
        with (tmp_path / f"sweep/{row}/seed_0/metrics.csv").open(newline="") as file:
            logged = [int(line["step"]) for line in csv.DictReader(file) if line["train/loss"]]
        # None twice and in order: each went on where it was. A checkpoint is written just before the row of its step,
        # so a kill in between may cost that row, but no step.
        assert logged == sorted(set(logged))
        assert set(logged) <= set(range(steps))
        assert len(logged) >= steps - 3
