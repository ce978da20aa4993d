"""What policies reached, as a sweep's own report reads it."""

import json
from pathlib import Path

import pytest

from benchmarks.cortexbench.sweep_scores import find_run, write_scores
from theia.ablation.summary import read_external


def make_student(sweep: Path, row: str, seed: int) -> str:
    checkpoint = sweep / row / f"seed_{seed}" / "checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (sweep / "sweep.json").write_text("{}")
    return str(checkpoint)


def name_encoder(out: Path, label: str, name: str) -> None:
    folder = out / "policies" / label
    folder.mkdir(parents=True)
    (folder / "encoder.json").write_text(json.dumps({"label": label, "name": name}))


def test_a_sweep_s_report_reads_what_its_students_reached(tmp_path: Path) -> None:
    sweep, out = tmp_path / "teachers", tmp_path / "policies"
    for label, row, seed in (("a", "clip, dinov2", 0), ("b", "clip, dinov2", 1), ("c", "vit", 0)):
        name_encoder(out, label, make_student(sweep, row, seed))
    name_encoder(out, "hog", "teacher:hog")
    values = {
        "a": {"hammer-v3": 0.5, "walker-walk": 0.7}, "b": {"hammer-v3": 0.25, "walker-walk": 0.3},
        "c": {"hammer-v3": 1.0}, "hog": {"hammer-v3": 0.0},
    }  # fmt: skip

    (path,) = write_scores(out, values)

    assert path == out / "scores-teachers.csv"
    found = read_external(path, {"clip, dinov2": [0, 1], "vit": [0]})
    assert found == {
        ("clip, dinov2", 0): {
            "external/hammer-v3": 0.5, "external/walker-walk": 0.7, "external/cortexbench": pytest.approx(0.6)
        },
        ("clip, dinov2", 1): {
            "external/hammer-v3": 0.25, "external/walker-walk": 0.3, "external/cortexbench": pytest.approx(0.275)
        },
        ("vit", 0): {"external/hammer-v3": 1.0},
    }  # fmt: skip


def test_encoders_of_no_sweep_give_no_file(tmp_path: Path) -> None:
    student = make_student(tmp_path / "teachers", "vit", 0)
    (tmp_path / "teachers/sweep.json").unlink()
    assert find_run(student) is None
    assert find_run("teacher:hog") is None
    name_encoder(tmp_path / "out", "student", student)
    assert write_scores(tmp_path / "out", {"student": {"hammer-v3": 1.0}}) == []


def test_an_untrained_student_is_none_of_its_sweep(tmp_path: Path) -> None:
    student = make_student(tmp_path / "teachers", "vit", 0)
    run = find_run(student)
    assert run is not None
    assert run[1:] == ("vit", 0)
    assert find_run(f"{student}@random") is None
