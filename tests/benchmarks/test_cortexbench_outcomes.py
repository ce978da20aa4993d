"""Success and scores of a run against closed forms."""

import numpy as np
import pytest
from finished_runs import write, write_scores

from benchmarks.cortexbench.outcomes import MEAN, compare, load, paired
from theia.errors import ConfigError


def test_last_and_best_of_each_seed_are_averaged(tmp_path):
    write(tmp_path, "a", "t", 100, {5: [1, 1, 1, 0], 9: [1, 0, 0, 0]})
    write(tmp_path, "a", "t", 200, {5: [0, 0, 0, 0], 9: [1, 1, 0, 0]})
    results, _ = load(tmp_path)
    (line,) = compare(results, "a")
    assert line.last.mean == pytest.approx((0.25 + 0.5) / 2)
    assert line.best == pytest.approx((0.75 + 0.5) / 2)
    assert line.difference is None


def test_scores_are_not_compared_as_if_they_were_successes(tmp_path):
    write_scores(tmp_path, "a", "walker-walk", [0.5, 0.7, 0.6])
    write_scores(tmp_path, "b", "walker-walk", [0.1, 0.2, 0.0])
    results, _ = load(tmp_path)
    found = {line.encoder: line for line in compare(results, "b")}
    assert found["a"].difference.mean == pytest.approx(0.5)
    assert found["a"].difference.p == pytest.approx(2 / 2**3)  # of the signs of three differences
    assert found["a"].anywhere is None


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


def test_tasks_that_differ_do_not_widen_the_interval_of_their_mean(tmp_path):
    for encoder, outcomes in {"a": [1] * 25, "b": [0] * 25}.items():
        write(tmp_path, encoder, "t", 100, {9: outcomes})
        write(tmp_path, encoder, "u", 100, {9: [0] * 25})
    results, _ = load(tmp_path)
    found = {(line.encoder, line.task): line for line in compare(results, "b")}["a", MEAN]
    assert (found.last.low, found.last.high) == (0.5, 0.5)
    assert (found.difference.low, found.difference.high) == (0.5, 0.5)


def test_the_mean_is_over_tasks_with_the_same_seeds(tmp_path):
    for task, seeds in {"t": (100, 200), "u": (200,)}.items():
        for seed in seeds:
            write(tmp_path, "a", task, seed, {5: [1, 1], 9: [1, seed == 100]})
    write(tmp_path, "b", "t", 100, {5: [1, 1], 9: [1, 1]})
    write(tmp_path, "b", "u", 200, {5: [1, 1], 9: [1, 1]})
    results, _ = load(tmp_path)
    found = {(line.encoder, line.task): line for line in compare(results, "a")}
    assert found["a", "t"].last.mean == 0.75
    assert (found["a", MEAN].last.mean, found["a", MEAN].best) == (0.5, 1)
    assert ("b", MEAN) not in found  # no seed on both tasks


def test_tasks_that_the_reference_lacks_are_shown_without_a_difference(tmp_path):
    for encoder, tasks in {"a": ("t", "u"), "b": ("s", "t", "u")}.items():
        for task in tasks:
            write(tmp_path, encoder, task, 100, {9: [1, 0]})
    results, _ = load(tmp_path)
    found = {(line.encoder, line.task): line for line in compare(results, "a")}
    assert found["b", "s"].last.mean == 0.5
    assert found["b", "s"].difference is None
    assert found["b", "t"].difference is not None
    assert found["b", MEAN].last.n == 4  # over the tasks of the reference


def test_the_last_of_thousands_of_epochs_is_the_last(tmp_path):
    write(tmp_path, "a", "t", 100, {999: [0, 0], 1999: [1, 1]})
    results, unfinished = load(tmp_path)
    assert unfinished == []
    assert results["a"]["t"].epochs == (999, 1999)
    assert results["a"]["t"].last.mean() == 1


def test_policies_that_began_elsewhere_are_not_compared(tmp_path):
    write(tmp_path, "a", "t", 100, {9: [1, 0]})
    other = [{"seed": 50, "success": True, "first_success": 1, "steps": 5, "beginning": {"positions": [9.0]}}]
    write(tmp_path, "b", "t", 100, {9: [1, 0]}, rollouts=other)
    with pytest.raises(ConfigError, match="of b on t did not begin in the states in which those of a began"):
        load(tmp_path)
