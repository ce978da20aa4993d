import json
from pathlib import Path
from typing import Any

from ablation.small_sweep import make_run

from theia.ablation.summary import caveats
from theia.ablation.sweep_run import Run

Tested = tuple[Run, dict[str, Any]]


def with_report(
    folder: Path, row: str, environment: dict[str, Any], scorers: list[str], store: str = "abc", **data: Any
) -> Tested:
    run = make_run(folder, row)
    run.config["data"].update(data)
    (run.folder / "environment.json").write_text(json.dumps(environment))
    return run, {"store": {"manifest_sha256": store}, "scorers": scorers, "scorer_images": 10 * len(scorers)}


def test_what_is_alike_needs_no_words(tmp_path: Path) -> None:
    environment = {"versions": {"torch": "2.9"}, "device": "cuda:0", "store": {"teachers": {"x": 1}}}
    other = {**environment, "store": {"teachers": {"y": 1}}}  # of its own teachers
    assert (
        caveats([with_report(tmp_path, "a", environment, ["readout"]), with_report(tmp_path, "b", other, ["readout"])])
        == []
    )


def test_what_differs_is_told_with_the_runs(tmp_path: Path) -> None:
    runs = [
        with_report(tmp_path, "a", {"versions": {"torch": "2.9"}, "device": "cpu"}, ["readout"], holdout=0.01),
        with_report(tmp_path, "b", {"versions": {"torch": "2.9"}, "device": "cpu"}, ["readout"], holdout=0.01),
        with_report(tmp_path, "c", {"versions": {"torch": "2.8"}}, [], holdout=0.1),
    ]
    assert caveats(runs) == [
        "**Scored on different images, so not comparable: `data.holdout` is 0.01 in 2 runs, 0.1 in c, seed 0.**",
        "Tested with different scorer_images: 10 in 2 runs, 0 in c, seed 0.",
        "Trained with different torch: 2.9 in 2 runs, 2.8 in c, seed 0.",
        "Trained with different device: cpu in 2 runs, unknown in c, seed 0.",
        "c, seed 0 has no scores of readout yet; its other scores are shown.",
    ]


def test_a_scorer_with_other_data_is_told(tmp_path: Path) -> None:
    scorers = {"a": ["readout", "dense"], "b": ["readout@/s/b"], "c": ["readout@/s/b", "dense"]}
    runs = [with_report(tmp_path, row, {}, names) for row, names in scorers.items()]
    for _, report in runs:
        report["scorer_images"] = 1
    (note,) = [note for note in caveats(runs) if "on different data" in note]
    assert "Scored by readout" in note
    assert "/s/b in 2 runs, that of training in a, seed 0" in note
    for (_, report), state in zip(runs[1:], ("123456789", "another"), strict=True):
        report["scorer_data"] = {"readout@/s/b": state}
    (note,) = [note for note in caveats(runs[1:]) if "on different data" in note]
    assert "/s/b (12345678) in 1 run, /s/b (another) in c, seed 0" in note


def test_the_same_store_by_another_path_is_the_same_and_another_state_is_not(tmp_path: Path) -> None:
    here = with_report(tmp_path, "a", {}, ["readout"], store="abc", holdout=0.01)
    assert caveats([here, with_report(tmp_path, "b", {}, ["readout"], holdout=0.01)]) == []
    (note,) = caveats([here, with_report(tmp_path, "c", {}, ["readout"], store="other", holdout=0.01)])
    assert "abc in 1 run, other in c, seed 0" in note
