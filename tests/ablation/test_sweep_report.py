"""The report of a folder, whatever has happened to it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from theia.ablation import sweep
from theia.ablation.record import earlier_record, write_record
from theia.ablation.sweep_run import Run
from theia.errors import ConfigError


def finished(folder: Path, row: str, scores: dict[str, float], teachers: dict[str, str] | None = None) -> Run:
    config = {
        "data": {"teachers": ["x"], "batch_size": 8, "store": "s", "val_split": "val", "holdout": 0.01},
        "trainer": {"accumulate_grad_batches": 1},
    }
    run = Run(
        row=row, seed=0, folder=folder / row / "seed_0", options={}, config=config, steps=4, scorers=(),
        store_sha256="abc",
    )  # fmt: skip
    run.prepare()
    store = {"manifest_sha256": "abc", "teachers": {name: {"weights": kind} for name, kind in (teachers or {}).items()}}
    report = {"store": store, "after": scores, "scores": {}, "scorers": []}
    (run.folder / "test_last.json").write_text(json.dumps(report))
    return run


def write(folder: Path, *runs: Run, planned: tuple[str, ...] = (), **provenance: Any) -> None:
    rows = {name: [0] for name in [*(run.row for run in runs), *planned]}
    write_record(folder, runs, [], rows, provenance)


def page(folder: Path) -> str:
    return (folder / "report.md").read_text()


def test_choices_that_cannot_be_kept_are_told_and_cost_no_report(tmp_path: Path) -> None:
    runs = [finished(tmp_path, "a", {"x": 1, "y": math.nan}), finished(tmp_path, "b", {"x": 2})]
    write(tmp_path, *runs, sort_by="y", lower_is_better=["z"], reference="c", planned=("c",))
    summary = sweep.report(tmp_path)
    assert summary is not None
    assert [row.name for row in summary.rows] == ["b", "a"]
    for words in ("the score `y`", "the score `z`", "the reference `c`"):
        assert words in page(tmp_path)
    with pytest.raises(ConfigError, match="'z'"):
        sweep.report(tmp_path, lower_is_better=["z"])


def test_the_page_says_what_it_was_made_with(tmp_path: Path) -> None:
    write(tmp_path, finished(tmp_path, "a", {"x": 1}), finished(tmp_path, "b", {"x": 2}), reference="a", sort_by="x")
    (tmp_path / "robot.csv").write_text("row,success\na,0.5\nb,0.25\n")
    sweep.report(tmp_path, "external/success", tmp_path / "robot.csv", "b")
    said = json.loads((tmp_path / "report.json").read_text())["provenance"]
    assert (said["reference"], said["sort_by"], said["seeds"]) == ("b", "external/success", [0])
    assert said["scores"] == str(tmp_path / "robot.csv")


@pytest.mark.parametrize("damage", [None, "", "a: [", "3"])
def test_a_lost_run_costs_only_itself(tmp_path: Path, damage: str | None) -> None:
    runs = [finished(tmp_path, "a", {"x": 1}), finished(tmp_path, "b", {"x": 2})]
    write(tmp_path, *runs)
    (tmp_path / "robot.csv").write_text("row,seed,success\na,0,0.5\nb,0,0.25\nb,,\n")
    if damage is None:
        runs[0].config_file.unlink()
    else:
        runs[0].config_file.write_text(damage)
    summary = sweep.report(tmp_path, scores=tmp_path / "robot.csv")
    assert summary is not None
    assert [row.name for row in summary.rows] == ["b"]
    assert summary.rows[0].columns["external/success"].mean == 0.25
    assert "lost: a, seed 0" in page(tmp_path)


def test_a_training_of_which_the_options_are_lost_is_not_taken_for_another(tmp_path: Path) -> None:
    run = finished(tmp_path, "a", {"x": 1})
    run.trained.touch()
    run.config_file.write_text("a: [")
    assert "fit.yaml cannot be read" in str(run.problem())


def test_random_weights_are_told_whichever_store_they_are_of(tmp_path: Path) -> None:
    runs = [finished(tmp_path, "a", {"x": 1}, {"clip": "random"}), finished(tmp_path, "b", {"x": 2}, {"clip": "best"})]
    write(tmp_path, *runs, store={"manifest_sha256": "abc", "teachers": {"clip": {"weights": "best"}}})
    sweep.report(tmp_path)
    assert page(tmp_path).splitlines()[2].startswith("**Teachers with random weights: clip.")


def test_what_was_planned_earlier_stays_planned(tmp_path: Path) -> None:
    write(tmp_path, finished(tmp_path, "a", {"x": 1}), planned=("b",))
    earlier = earlier_record(tmp_path)
    assert earlier.with_planned(["a", "c"], [0, 2]) == {"a": [0, 2], "b": [0], "c": [0, 2]}
    (tmp_path / "sweep.json").write_text("{")
    assert earlier_record(tmp_path).runs == ()


def test_a_sweep_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    write(tmp_path, finished(tmp_path, "a", {"x": 1}), finished(tmp_path, "b", {"x": 2}), reference="a")
    record = json.loads((tmp_path / "sweep.json").read_text())
    record["statement"] = record.pop("provenance")
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    summary = sweep.report(tmp_path)
    assert summary is not None
    assert summary.reference == "a"
