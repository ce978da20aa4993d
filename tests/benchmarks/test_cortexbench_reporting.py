"""The report of a run: its tables, and what must be known to read them."""

import json

import pytest
from finished_runs import write, write_scores

from benchmarks.cortexbench.reporting import report
from theia.errors import ConfigError


def test_scores_are_shown_from_0_to_100_and_rates_beside_them(tmp_path):
    for name, values in {"a": [0.5, 0.7, 0.6], "blind": [0.1, 0.2, 0.0]}.items():
        write_scores(tmp_path, name, "walker-walk", values)
        write(tmp_path, name, "hammer-v3", 100, {9: [1, 1, 0] if name == "a" else [0, 0, 0]})
    text = report(tmp_path)
    rates, scores, mean = text.split("\n\n")[:3]
    assert rates.split()[:3] == ["hammer-v3", "success", "rate"]
    assert "0.67" in rates
    assert "at any step" in rates
    assert scores.startswith("walker-walk")
    assert "score, return / 10" in scores
    assert "60.0" in scores
    assert "10.0" in scores
    assert "at any step" not in scores
    # As in the paper: the mean of 60 and of 100 times 2/3.
    assert "scores, and success x 100" in mean
    assert f"{(60 + 200 / 3) / 2:.1f}" in mean
    assert "which for 1000 steps is the return divided by 10" in text


def test_steps_that_adroit_asks_for_are_said(tmp_path):
    write(tmp_path, "a", "relocate", 100, {9: [1, 0]})
    write(tmp_path, "a", "pen", 100, {9: [1, 0]})
    assert "in more than 20 steps (pen) and 25 steps (relocate)" in report(tmp_path)


def test_demonstrations_of_the_paper_are_said_to_act_on_other_physics(tmp_path):
    write(tmp_path, "a", "pen", 100, {9: [1, 0]})
    (tmp_path / "run.json").write_text(json.dumps({"demonstrations": {"imported": {"pen": "pen-v0.pickle"}}}))
    text = report(tmp_path)
    assert "the physics are those of another release" in text
    assert "other experts" not in text


def test_the_report_names_controls_and_what_it_must_not_be_compared_with(tmp_path):
    write(tmp_path, "random:theia_tiny", "t", 100, {5: [1, 0, 1], 9: [1, 1, 1]})
    write(tmp_path, "blind", "t", 100, {5: [0, 0, 0], 9: [0, 0, 1]})
    write(tmp_path, "state", "t", 100, {5: [1, 1, 1]}, last=False)
    text = report(tmp_path)
    assert "blind (control)" in text
    assert "must not be compared with published ones" in text
    assert "Not finished, and left out: state/t/seed-100" in text
    assert "An interval without width" in text
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["reference"] == "random:theia_tiny"
    assert {line["encoder"] for line in kept["lines"]} == {"blind", "random:theia_tiny"}
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("pictures", "warns"), [("video", True), ("image", False)])
def test_the_report_warns_of_demonstrations_that_are_lossy(tmp_path, pictures, warns):
    write(tmp_path, "a", "t", 100, {9: [1, 0]})
    (tmp_path / "run.json").write_text(json.dumps({"demonstrations": {"pictures": pictures}}))
    assert ("kept as lossy video" in report(tmp_path)) == warns


def test_an_empty_folder_and_an_unknown_reference_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no finished policy"):
        report(tmp_path)
    write(tmp_path, "a", "t", 100, {9: [1, 0]})
    with pytest.raises(ConfigError, match="--reference is 'b', which is none of the encoders: a"):
        report(tmp_path, "b")
