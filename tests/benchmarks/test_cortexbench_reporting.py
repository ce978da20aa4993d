"""The report of success against closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cortexbench.reporting import MEAN, compare, load, paired, report
from theia.errors import ConfigError


def write(folder: Path, encoder: str, task: str, seed: int, evaluations: dict[int, list[int]], **more: object) -> None:
    """Files as the command run leaves them; more replaces parts of the last."""
    for epoch, outcomes in evaluations.items():
        record = {
            "encoder": encoder, "task": task, "seed": seed, "epoch": epoch, "last": epoch == max(evaluations),
            "losses": [0.5] * (epoch + 1), "training seconds": 1.0, "rollout seconds": 2.0, "steps": 10,
            "rollouts": [
                {"seed": 50 + place, "success": bool(one), "first_success": 3 if one else None, "steps": 5,
                 "beginning": {"positions": [0.0, place]}}
                for place, one in enumerate(outcomes)
            ],
        } | (more if epoch == max(evaluations) else {})  # fmt: skip
        path = folder / "policies" / encoder.replace(":", "_") / task / f"seed-{seed}" / f"rollouts-{epoch:03d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))


def test_last_and_best_of_each_seed_are_averaged(tmp_path):
    write(tmp_path, "a", "t", 100, {5: [1, 1, 1, 0], 9: [1, 0, 0, 0]})
    write(tmp_path, "a", "t", 200, {5: [0, 0, 0, 0], 9: [1, 1, 0, 0]})
    results, _ = load(tmp_path)
    (line,) = compare(results, "a")
    assert line.last.mean == pytest.approx((0.25 + 0.5) / 2)
    assert line.best == pytest.approx((0.75 + 0.5) / 2)
    assert line.difference is None


def write_scores(folder: Path, encoder: str, task: str, values: list[float]) -> None:
    rollouts = [
        {"seed": 50 + place, "success": None, "first_success": None, "steps": 1000, "rewards": 1000 * value,
         "value": value, "beginning": {"positions": [0.0, place]}}
        for place, value in enumerate(values)
    ]  # fmt: skip
    write(folder, encoder, task, 100, {9: [0] * len(values)}, rollouts=rollouts)


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


def test_scores_are_not_compared_as_if_they_were_successes(tmp_path):
    write_scores(tmp_path, "a", "walker-walk", [0.5, 0.7, 0.6])
    write_scores(tmp_path, "b", "walker-walk", [0.1, 0.2, 0.0])
    results, _ = load(tmp_path)
    found = {line.encoder: line for line in compare(results, "b")}
    assert found["a"].difference.mean == pytest.approx(0.5)
    assert found["a"].difference.p == pytest.approx(2 / 2**3)  # of the signs of three differences
    assert found["a"].anywhere is None


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


def test_mcnemar_by_hand():
    ours = np.array([[1, 1, 1, 1, 1, 1, 0, 1, 0, 1.0]])
    theirs = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 0, 1.0]])
    found = paired(ours, theirs)
    assert found.mean == pytest.approx(0.5)
    assert found.p == pytest.approx(2 * (1 + 7) / 2**7)  # six better and one worse, of seven
    assert paired(ours, ours).p == 1


def test_with_several_seeds_a_rollout_stays_one_whole():
    ours = np.repeat(np.array([[1, 1, 1, 1, 1, 0.0]]), 3, 0)
    theirs = np.zeros((3, 6))
    # All five differences have one sign: of 2 ** 5 signs, two give as much; three seeds bring no more evidence.
    assert paired(ours, theirs).p == pytest.approx(2 / 2**5)


def test_the_mean_is_over_tasks_and_corrected_by_itself(tmp_path):
    for task, outcomes in {"t": [1] * 8, "u": [1, 1, 0, 0, 0, 0, 0, 0]}.items():
        write(tmp_path, "good", task, 100, {9: outcomes})
        write(tmp_path, "blind", task, 100, {9: [0] * 8})
    results, _ = load(tmp_path)
    found = {(line.encoder, line.task): line for line in compare(results, "good")}
    assert found["good", MEAN].last.mean == pytest.approx(0.625)
    assert found["blind", "t"].difference.p == pytest.approx(2 * 2 / 2**8)  # of two comparisons
    assert found["blind", "u"].difference.p == pytest.approx(0.5)
    assert found["blind", MEAN].difference.p == pytest.approx(2 / 2**10)


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


def test_policies_that_began_elsewhere_are_not_compared(tmp_path):
    write(tmp_path, "a", "t", 100, {9: [1, 0]})
    other = [{"seed": 50, "success": True, "first_success": 1, "steps": 5, "beginning": {"positions": [9.0]}}]
    write(tmp_path, "b", "t", 100, {9: [1, 0]}, rollouts=other)
    with pytest.raises(ConfigError, match="of b on t did not begin in the states in which those of a began"):
        report(tmp_path)


def test_an_empty_folder_and_an_unknown_reference_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no finished policy"):
        report(tmp_path)
    write(tmp_path, "a", "t", 100, {9: [1, 0]})
    with pytest.raises(ConfigError, match="--reference is 'b', which is none of the encoders: a"):
        report(tmp_path, "b")
