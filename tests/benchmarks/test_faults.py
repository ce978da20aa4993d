"""Planted faults are what they are said to be, and the figures and verdicts follow from known numbers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import forked
import numpy as np
import pytest
from scipy import stats
from store import small_store

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import faults
from benchmarks.evidence.__main__ import main
from theia.store.reader import FeatureStore
from theia.types import TeacherSpec
from theia.utils.estimates import Estimate

COLOR = TeacherSpec(name="color", channels=6, grid_hw=(8, 8), licence="Apache-2.0", weights="none")
ROUNDING = 2e-3  # of float16, relative


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    for split in ("train", "val"):
        small_store.extract(root, split, [COLOR])
    assert "clean, loud, dominated, dead, pattern, twin, easy, shuffled" in faults.plant(root)
    return root


def features(root: Path, name: str, split: str = "train") -> faults.Array:
    return faults.read(FeatureStore(root), split, name)[1]


def normal(root: Path, name: str) -> faults.Array:
    clean = features(root, "clean")
    return np.asarray((features(root, name) - clean.mean((0, 1))) / clean.std((0, 1)))


def test_clean_features_are_means_of_four_cells(planted: Path) -> None:
    for split in ("train", "val"):
        cells = features(planted, "color", split).reshape(-1, 8, 8, 6)
        clean = features(planted, "clean", split).reshape(-1, 4, 4, 6)
        expected = cells[:, 2:4, 4:6].reshape(-1, 4, 6).mean(1)
        np.testing.assert_allclose(clean[:, 1, 2], expected, rtol=ROUNDING, atol=ROUNDING)


def test_loud_and_dead(planted: Path) -> None:
    clean = features(planted, "clean")
    np.testing.assert_allclose(features(planted, "loud"), 100 * clean, rtol=ROUNDING)
    np.testing.assert_array_equal(features(planted, "dead")[..., :6], clean)
    assert np.unique(features(planted, "dead")[..., 6]).tolist() == [3.0]


def test_one_direction_has_a_hundred_times_the_variance_of_the_rest(planted: Path) -> None:
    axis, clean, found = faults.direction(6), normal(planted, "clean"), normal(planted, "dominated")
    assert np.linalg.norm(axis) == pytest.approx(1)
    covariance = np.cov(found.reshape(-1, 6).T, ddof=0)
    along = axis @ covariance @ axis
    assert along == pytest.approx(100 * (np.trace(covariance) - along), rel=0.02)
    others = np.eye(6) - np.outer(axis, axis)
    np.testing.assert_allclose(found @ others, clean @ others, atol=0.05)  # float16 of what is 25 times as large


def test_a_pattern_is_the_same_in_all_images(planted: Path) -> None:
    for split in ("train", "val"):
        added = features(planted, "pattern", split) - features(planted, "clean", split)
        expected = faults.pattern(16, 6) * features(planted, "clean").std((0, 1))
        np.testing.assert_allclose(added, np.broadcast_to(expected, added.shape), atol=0.01)


def test_a_twin_is_turned_and_an_easy_teacher_the_same_everywhere(planted: Path) -> None:
    clean, twin, easy = (normal(planted, name) for name in ("clean", "twin", "easy"))
    assert np.abs(twin - clean).max() > 0.5
    np.testing.assert_allclose(np.linalg.norm(twin, axis=-1), np.linalg.norm(clean, axis=-1), atol=0.01)
    np.testing.assert_allclose(easy, np.broadcast_to(100 * clean.mean(1, keepdims=True), easy.shape), atol=0.2)


def test_shuffled_features_are_of_other_images_under_the_same_keys(planted: Path) -> None:
    for split in ("train", "val"):
        both = FeatureStore(planted).open_split(split, ["clean", "shuffled"])  # refuses keys that differ
        assert len(both) == 9
        clean, shuffled = features(planted, "clean", split), features(planted, "shuffled", split)
        source = [int(np.abs(clean - one).mean((1, 2)).argmin()) for one in shuffled]
        assert sorted(source) == list(range(9))
        assert all(place != origin for place, origin in enumerate(source))
        np.testing.assert_allclose(shuffled, clean[source], atol=0.01)


def test_a_killed_planting_goes_on(tmp_path: Path) -> None:
    for split in ("train", "val"):
        small_store.extract(tmp_path, split, [COLOR])

    def killed(call: int) -> None:
        small_store.kill_at(call)
        faults.plant(tmp_path)

    for call in (30, 60, 100):
        assert small_store.in_child(lambda call=call: killed(call)) < 0
    faults.plant(tmp_path)
    assert set(faults.PLANTED) <= set(FeatureStore(tmp_path).finished_teachers(["train", "val"]))
    before = small_store.contents(tmp_path)
    assert "nothing new" in faults.plant(tmp_path)
    assert small_store.contents(tmp_path) == before


def test_planting_needs_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_store.extract(tmp_path, teachers=[small_store.ODD])
    assert main(["plant", "--store", str(tmp_path)]) == 1
    assert "no features of 'color'. Extract them: theia extract" in capsys.readouterr().err
    assert main(["measure", "--sweep", str(tmp_path), "--store", str(tmp_path)]) == 1
    assert "--stages faults" in capsys.readouterr().err


def test_features_in_int8_are_not_taken_for_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        small_store.extract(tmp_path, split, [COLOR], "int8")
    before = small_store.contents(tmp_path)
    assert main(["plant", "--store", str(tmp_path)]) == 1
    assert "has 'color' in int8 or as components. Extract it into another store" in capsys.readouterr().err
    assert small_store.contents(tmp_path) == before


def test_figures_of_known_predictions() -> None:
    clean = np.random.default_rng(5).standard_normal((200, 16, 6))
    axis, planted = faults.direction(6), faults.pattern(16, 6)
    perfect = faults.figures(clean, clean)
    assert perfect == pytest.approx({"rest": 1, "share": 0, "content": 1})
    found = faults.figures(clean + 0.4 * planted, clean)
    assert (found["share"], found["content"]) == pytest.approx((0.4, 1))
    assert faults.figures(0 * clean, clean)["content"] == pytest.approx(0)
    assert faults.figures(0.5 * clean, clean)["content"] == pytest.approx(0.75)
    wrong = clean + 50 * np.random.default_rng(6).standard_normal((200, 16, 1)) * axis
    assert faults.figures(wrong, clean)["rest"] == pytest.approx(1)
    assert faults.figures(wrong, clean)["content"] < -100
    only = (clean @ axis)[..., None] * axis
    assert faults.figures(only, clean)["rest"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("gain", "damage", "said"),
    [
        ((-0.3, -0.1), (0.1, 0.3), "worse"),
        ((-0.1, 0.1), (0.1, 0.3), "no difference"),
        ((0.0, 0.0), (0.1, 0.3), "no difference"),
        ((0.15, 0.25), (0.1, 0.3), "removes it"),
        ((0.15, 0.18), (0.1, 0.3), "helps"),  # some of the 0.2 is left
        ((0.01, 0.4), (0.1, 0.3), "helps"),  # less than half of the 0.2 is sure
        ((0.15, 0.25), (-0.1, 0.3), "helps"),  # there may be nothing to remove
    ],
)
def test_verdicts_follow_from_intervals(gain: Sequence[float], damage: Sequence[float], said: str) -> None:
    pair = (Estimate(sum(ends) / 2, *ends, 3) for ends in (gain, damage))
    assert faults.verdict(*pair) == said


def test_one_seed_has_no_verdict() -> None:
    assert faults.verdict(Estimate(0.2, None, None, 1), Estimate(0.2, None, None, 1)) == "one seed"


def test_cures_are_paired_differences(tmp_path: Path) -> None:
    values = {
        "paper on clean": [0.01, 0.02, 0.0], "shift on clean": [0.02, 0.0, 0.01],
        "paper on pattern": [0.7, 0.8, 0.9], "shift on pattern": [0.0, 0.01, 0.02],
    }  # fmt: skip
    runs = [
        {"row": row, "seed": seed, "teachers": [row.split()[-1]], "scores": {"share": of_seeds[seed]}}
        for row, of_seeds in values.items() for seed in range(3)
    ]  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps({"runs": runs}))
    (cure,) = faults.cures(tmp_path)
    assert (cure.ingredient, cure.verdict) == ("shift", "removes it")
    assert cure.values["paper"]["with"].mean == pytest.approx(0.8)
    test = stats.ttest_rel(values["paper on pattern"], values["shift on pattern"])  # less of the pattern is better
    assert cure.gain.mean == pytest.approx(0.79)
    assert (cure.gain.low, cure.gain.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert cure.damage.mean == pytest.approx(0.79)
    assert cure.gain_without.mean == pytest.approx(0)
    assert faults.cures(tmp_path / "nowhere") == []


def test_every_row_is_one_of_a_copy_and_an_ingredient() -> None:
    rows = faults.rows()
    assert rows["whitened on dominated"] == {"data.teachers": ["dominated"], "model.normalizer": "whiten"}
    assert {name for row in rows.values() for name in row["data.teachers"]} == set(faults.PLANTED)


def test_recordings_are_asked_for_where_they_are_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out"), "--dry_run"]
    assert main(["run", "--stages", "faults,bounds", *out]) == 1
    assert "The stage bounds needs recordings: give --data FOLDER, or choose --stages faults" in capsys.readouterr().err
    assert main(["run", "--stages", "faults", *out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["theia", "store"], ["theia", "ablate"], ["python", "-m"]]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_stage_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    forked.commands(monkeypatch, evidence)
    monkeypatch.setattr(faults, "FAULTS", [fault for fault in faults.FAULTS if fault.ingredients == ("shift",)])
    short = "--trainer.max_epochs=1 --trainer.check_val_every_n_epoch=1 --trainer.limit_train_batches=2"
    command = [
        "run", "--stages", "faults", "--seeds", "0", "--out", str(tmp_path),
        "--options", f"{short} --model.width=24 --model.depth=1 --model.heads=1",
    ]  # fmt: skip
    assert main(command) == 0
    assert "## Planted faults" in capfd.readouterr().out
    first = json.loads((tmp_path / "evidence.json").read_text())
    share, content = first["faults"]
    assert (share["verdict"], content["figure"]) == ("one seed", "explained variance of the content")
    assert abs(share["values"]["paper"]["without"]["mean"]) < 0.1
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    os.utime(tmp_path / "evidence.json", (0, 0))
    assert main(command) == 0  # nothing is left to do
    assert "4 of 4 runs done" in capfd.readouterr().err
    assert json.loads((tmp_path / "evidence.json").read_text())["faults"] == first["faults"]
