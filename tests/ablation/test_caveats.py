import json
from pathlib import Path
from typing import Any

from ablation.small_sweep import make_run

from theia.ablation.caveats import caveats
from theia.ablation.run import Run


def finished(folder: Path, row: str, environment: dict[str, Any], scorers: list[str], **data: Any) -> Run:
    run = make_run(folder, row)
    run.config["data"].update(data)
    (run.folder / "environment.json").write_text(json.dumps(environment))
    report = {"store": {"manifest_sha256": "abc"}, "after": {}, "scores": {}, "scorers": scorers}
    (run.folder / "test_last.json").write_text(json.dumps(report))
    return run


def test_what_is_alike_needs_no_words(tmp_path: Path) -> None:
    environment = {"versions": {"torch": "2.9"}, "device": "cuda:0", "store": {"teachers": {"x": 1}}}
    other = {**environment, "store": {"teachers": {"y": 1}}}  # of its own teachers
    assert (
        caveats([finished(tmp_path, "a", environment, ["readout"]), finished(tmp_path, "b", other, ["readout"])]) == []
    )


def test_what_differs_is_told_with_the_runs(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path, "a", {"versions": {"torch": "2.9"}, "device": "cpu"}, ["readout"], holdout=0.01),
        finished(tmp_path, "b", {"versions": {"torch": "2.9"}, "device": "cpu"}, ["readout"], holdout=0.01),
        finished(tmp_path, "c", {"versions": {"torch": "2.8"}}, [], holdout=0.1),
    ]
    assert caveats(runs) == [
        "**Scored on different images, so not to be compared: `data.holdout` is 0.01 in 2 runs, 0.1 in c, seed 0.**",
        "Trained with different torch: 2.9 in 2 runs, 2.8 in c, seed 0.",
        "Trained with different device: cpu in 2 runs, unknown in c, seed 0.",
        "c, seed 0 has no scores of readout yet; the others of it are shown.",
    ]
