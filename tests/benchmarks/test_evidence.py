"""What the sweeps say: against closed forms, SciPy, and a whole small run."""

import csv
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from scipy import stats
from trajectories.discs import record

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.findings import (
    COSINE,
    ENTROPY,
    MOTION,
    PLAN,
    READOUT,
    UNSEEN,
    WORST,
    find,
    share,
    time_to_quality,
)
from benchmarks.evidence.report import draw, page
from benchmarks.evidence.stages import PRESETS, Plan


def run_of(row: str, seed: int, teachers: list[str], **scores: float) -> dict[str, Any]:
    return {"row": row, "seed": seed, "teachers": teachers, "scores": scores}


def write_sweep(folder: Path, runs: list[dict[str, Any]], curves: dict[str, list[tuple[int, float, float]]]) -> None:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"runs": runs}))
    for run in runs:
        place = folder / run["row"] / f"seed_{run['seed']}"
        place.mkdir(parents=True)
        with (place / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", "step", "train/loss", "train/cpu_s", "val/cosine/a", "val/cosine/b"])
            # 3 CPU-seconds a step, 6 with the row "cosine"
            writer.writerow([0, 4, 0.9, 30 if run["row"] == "cosine" else 15, "", ""])
            for step, one, other in curves.get(run["row"], []):
                writer.writerow([0, step - 1, "", "", one, other])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Evidence of two sweeps whose figures are known."""
    plan = {"a": [0.5, 0.6, 0.7], "b": [0.6, 0.8, 0.7], "all": [0.4, 0.6, 0.5]}
    teachers = {"a": ["a"], "b": ["b"], "all": ["a", "b"]}
    runs = [
        run_of(row, seed, teachers[row], **{
            PLAN: values[seed], MOTION: 0.3 + 0.1 * seed, ENTROPY: 5 - values[seed],
            READOUT: 0.5, f"{READOUT}/a": 0.4, f"{READOUT}/b": 0.6,
        })
        for row, values in plan.items() for seed in range(3)
    ]  # fmt: skip
    write_sweep(tmp_path / "teachers", runs, {})
    runs = [run_of(row, seed, ["a", "b"], **{PLAN: 0.5}) for row in ("paper", "cosine") for seed in range(2)]
    write_sweep(tmp_path / "ingredients", runs, {
        "paper": [(50, 0.2, 0.4), (100, 0.5, 0.7)], "cosine": [(50, 0.4, 0.6), (100, 0.6, 0.8)],
    })  # fmt: skip
    (tmp_path / "bounds").mkdir()
    means = {"all/seed_0@random": (0.9, 0.8), "teacher:a": (0.4, 0.3), "teacher:b": (0.95, 0.2), "blind": (1.0, 1.0)}
    summary = {name: {"plan": {"mean": p}, "motion": {"mean": m}} for name, (p, m) in means.items()}
    (tmp_path / "bounds" / "probing-dynamics-1.json").write_text(json.dumps({"summary": summary}))
    better = [run_of("a", seed, ["a"], **{PLAN: 0.4 + 0.1 * seed}) for seed in range(2)]
    write_sweep(tmp_path / "beyond", better, {})
    students = {"direct": (["a", "b"], [0.4, 0.5]), "proxy": (["theia"], [0.3, 0.5])}
    write_sweep(tmp_path / "proxy/students", [
        run_of(row, seed, distilled, **{
            PLAN: values[seed], READOUT: 0.9, f"{READOUT}/a": 0.4, f"{READOUT}/b": 0.6, f"{READOUT}/theia": 1.0,
        })
        for row, (distilled, values) in students.items() for seed in range(2)
    ], {"direct": [(50, 0.1, 0.2)]})  # fmt: skip
    write_sweep(tmp_path / "proxy/large", [run_of("large", 0, ["a", "b"], **{PLAN: 0.2})], {"large": [(80, 0.1, 0.2)]})
    (tmp_path / "settings.json").write_text(json.dumps({"data": "/mine/recordings#top", "teachers": ["a", "b"]}))
    return tmp_path


def test_a_share_is_the_part_of_the_way_and_none_where_there_is_no_way() -> None:
    assert share(0.9, 0.6, 0.4) == pytest.approx(0.6)
    assert share(0.9, 1.0, 0.4) == pytest.approx(-0.2)
    assert share(0.9, 0.3, 0.4) == pytest.approx(1.2)
    assert share(0.4, 0.3, 0.4) is None


def test_time_to_quality_is_where_a_line_crosses_the_goal() -> None:
    curves = {
        "paper": {0: [(10, 0.2), (20, 0.6)], 1: [(10, 0.1), (20, 0.4)]},
        "faster": {0: [(10, 0.5), (20, 0.7)], 1: [(10, 0.4), (20, 0.3)]},
        "slower": {0: [(10, 0.1), (20, 0.5)], 2: [(10, 0.1)]},
    }
    found = time_to_quality(curves, "paper")
    assert found["paper"] == {0: 1.0, 1: 1.0}
    assert found["faster"][0] == pytest.approx(0.75)  # halfway from 10 to 20 steps
    assert found["faster"][1] == pytest.approx(0.5)  # at a validation, and before the goal is lost again
    assert found["slower"] == {0: None}  # seed 2 has no counterpart
    assert time_to_quality({"faster": curves["faster"]}, "paper") == {"faster": {}}


def test_tables_shares_and_correlations(out: Path) -> None:
    found = find(out)
    cells = found.tables["teachers"]
    test = stats.ttest_rel([0.5, 0.6, 0.7], [0.4, 0.6, 0.5])
    assert cells["a"][PLAN].difference is not None
    assert cells["a"][PLAN].difference.mean == pytest.approx(0.1)
    low, high = test.confidence_interval(0.95)
    assert (cells["a"][PLAN].difference.low, cells["a"][PLAN].difference.high) == pytest.approx((low, high))
    assert cells["a"][PLAN].p == pytest.approx(test.pvalue)
    assert cells["b"][PLAN].p is None  # all three differences are 0.2
    assert cells["all"][PLAN].difference is None
    # Of a's students, b is unseen; the worst teacher is among those that were distilled.
    assert cells["a"][UNSEEN].mean.mean == pytest.approx(0.6)
    assert cells["a"][WORST].mean.mean == pytest.approx(0.4)
    assert cells["b"][WORST].mean.mean == pytest.approx(0.6)
    assert UNSEEN not in cells["all"]
    assert found.tables["ingredients"]["cosine"][COSINE].mean.mean == pytest.approx(0.7)
    assert found.steps["cosine"][0] == pytest.approx(0.5 + 0.5 * 0.5)
    assert found.compute["cosine"][0] == pytest.approx(2 * 0.75)  # a step costs twice as much
    assert found.tables["ingredients"]["cosine"]["cost"].mean.mean == pytest.approx(600)
    # From 0.9 to 0.4 with teacher a; b is worse than the untrained student in plan, and better in motion.
    assert found.shares["a"][PLAN].mean == pytest.approx((0.9 - 0.6) / 0.5)
    assert PLAN not in found.shares["b"]
    assert found.shares["b"][MOTION].mean == pytest.approx((0.8 - 0.4) / 0.6)
    assert found.shares["all"][PLAN].mean == pytest.approx((0.9 - 0.5) / 0.5)
    assert found.shares["cosine"][PLAN].mean == pytest.approx((0.9 - 0.5) / 0.5)
    assert found.shares["a, beyond"][PLAN].mean == pytest.approx((0.9 - 0.45) / 0.5)
    assert found.entropy[PLAN].r == pytest.approx(-1)
    assert found.entropy[PLAN].n == 3  # the other sweep has no norm entropy


def test_a_proxy_is_no_teacher_of_the_read_outs(out: Path) -> None:
    found = find(out).tables["proxy/students"]
    assert found["proxy"][PLAN].difference is not None
    assert found["proxy"][PLAN].difference.mean == pytest.approx(-0.05)
    assert found["proxy"][READOUT].mean.mean == pytest.approx(0.5)
    assert found["proxy"][UNSEEN].mean.mean == pytest.approx(0.5)
    assert UNSEEN not in found["direct"]
    assert WORST not in found["proxy"]
    assert found["large"]["cost"].mean.mean == pytest.approx(240)  # paid once, for all students of it


def test_sets_of_teachers_are_trained_with_what_is_beyond_the_paper(tmp_path: Path) -> None:
    (command,) = Plan("d", 9, ["a", "b"], [3], "small", tmp_path, 1, ["readout"], []).commands("beyond")
    rows = json.loads(command[command.index("--rows") + 1])
    assert {name: row.pop("data.teachers") for name, row in rows.items()} == {"a": ["a"], "b": ["b"], "all": ["a", "b"]}
    assert rows["all"] == rows["a"] == {"model.optimizer": "timm.optim.Muon", "model.translator": "linear"}
    for size in ("tiny", "small", "base"):  # what both set is the same
        ours, paper = (yaml.safe_load(Path(f"configs/{name}_{size}.yaml").read_text()) for name in ("beyond", "cdiv"))
        assert {**ours, "run_folder": "", "model": {**paper["model"], **ours["model"]}} == {**paper, "run_folder": "",
                "model": {**paper["model"], "optimizer": "timm.optim.Muon", "translator": "linear"}}  # fmt: skip


def test_a_longer_training_costs_as_much_as_the_way_round(tmp_path: Path) -> None:
    def rows(*options: str) -> dict[str, dict[str, Any]]:
        plan = Plan("d", 9, ["a", "b"], [3], "small", tmp_path, 1, ["readout"], options)
        command = plan.commands("proxy")[-1]
        found: dict[str, dict[str, Any]] = json.loads(command[command.index("--rows") + 1])
        return found

    assert rows("--trainer.max_epochs", "8")["direct and longer"]["trainer.max_epochs"] == 24
    assert rows("--trainer.max_epochs=5", "--model.ema=0.9")["direct and longer"]["trainer.max_epochs"] == 15
    epochs = yaml.safe_load(Path("benchmarks/evidence/small.yaml").read_text())["trainer"]["max_epochs"]
    assert rows()["direct and longer"]["trainer.max_epochs"] == 3 * epochs


def test_views_are_trained_as_long_and_read_by_the_store_without_them(tmp_path: Path) -> None:
    plan = Plan("d", 9, ["a", "b", "c"], [0, 1], "small", tmp_path, 1, ["readout", "dense"], [])
    extract, sweep = plan.commands("views")
    assert extract[extract.index("--views") + 1] == "5"
    assert extract[extract.index("--teachers") + 1] == "a,b"
    assert sweep[sweep.index("--trainer.limit_train_batches") + 1] == "0.2"
    assert sweep[sweep.index("--scorers") + 1] == f"readout@{tmp_path / 'store'},dense,dynamics@d"
    assert sweep[sweep.index("--data.store") + 1] == extract[extract.index("--store") + 1]
    rows = json.loads(sweep[sweep.index("--rows") + 1])
    (probe,) = plan.commands("sizes")
    probed = probe[probe.index("--encoders") + 1 : probe.index("--data")]
    assert str(tmp_path / "views/views/seed_1/checkpoints/last.ckpt@448") in probed
    trained = {*rows, *yaml.safe_load(Path("configs/ablations/ingredients.yaml").read_text())["rows"]}
    assert {Path(name).parents[2].name for name in probed} < trained
    assert len(probed) == (6 * 2 + 1) * 2


def test_sizes_are_compared_with_the_paper_s_recipe_at_the_same_size(out: Path) -> None:
    write_sweep(out / "views", [run_of("views", seed, ["a"], **{PLAN: 0.3}) for seed in range(2)], {})
    (out / "sizes").mkdir()
    means = {
        f"{row}/seed_{seed}@{size}": error + 0.01 * seed
        for row, by_size in {"paper": {112: 0.8, 448: 0.9}, "views": {112: 0.6, 448: 0.95}}.items()
        for size, error in by_size.items() for seed in range(2)
    }  # fmt: skip
    means["paper/seed_0@random@448"] = 0.99
    summary = {
        name: {"plan": {"mean": mean}, "motion": {"mean": 0.2}} for name, mean in (means | {"blind": 1.0}).items()
    }
    (out / "sizes" / "probing-dynamics-1.json").write_text(json.dumps({"summary": summary}))
    found = find(out)
    assert found.tables["ingredients"]["views"][PLAN].mean.mean == pytest.approx(0.3)
    assert list(found.sizes) == [112, 224, 448]
    assert found.sizes[224]["views"] == found.tables["ingredients"]["views"]
    differences = [found.sizes[size]["views"][PLAN].difference for size in (112, 224, 448)]
    assert [one and round(one.mean, 6) for one in differences] == [-0.2, -0.2, 0.05]
    assert found.sizes[448]["paper"][PLAN].mean.mean == pytest.approx(0.905)
    assert [found.sizes[size]["untrained"][PLAN].mean.mean for size in (224, 448)] == [0.9, 0.99]
    assert "Pictures resized to 112x112 pixels" in page(found)
    draw(out / "sizes.png", found)


def test_shares_wait_for_the_bounds_of_all_teachers(out: Path) -> None:
    (path,) = (out / "bounds").iterdir()
    summary = json.loads(path.read_text())["summary"]
    del summary["teacher:b"]
    path.write_text(json.dumps({"summary": summary}))
    assert set(find(out).shares) == {"a", "a, beyond"}


def test_the_report_shows_what_is_finished(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(out)]) == 0
    said = capsys.readouterr().out
    assert "| a     | 3       | 0.600 ± 0.248 |" in said
    assert "| cosine       | 0.75     | 0.75     |" in said
    record = json.loads((out / "evidence.json").read_text())
    assert record["bounds"]["untrained"][PLAN] == 0.9
    assert record["settings"]["data"] == "recordings#top"
    assert (out / "evidence.png").stat().st_size > 10_000
    (out / "ingredients/report.json").write_text(json.dumps({"runs": [
        run_of(row, seed, ["a", "b"], **{PLAN: 0.5}) for row, seed in (("paper", 0), ("paper", 1), ("cosine", 1))
    ]}))  # fmt: skip
    assert "| cosine       | –        | 0.75     |" in page(find(out))
    for name in ("teachers", "beyond", "bounds"):
        (out / name).rename(out / f"{name} elsewhere")
    found = find(out)
    draw(out / "half.png", found)
    assert "Sets of teachers" not in page(found)
    (out / "ingredients").rename(out / "ingredients elsewhere")
    draw(out / "none.png", find(out))
    assert not (out / "none.png").exists()
    (out / "evidence.png").unlink()
    (out / "proxy").rename(out / "proxy elsewhere")
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    said = capsys.readouterr().out
    assert "No sweep and no probe is finished yet" in said
    assert "evidence.png" not in said


def test_bad_input_is_said_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = record(tmp_path / "data")
    for options, said in (
        (
            ["--stages", "store,wisdom"],
            "no stage 'wisdom'. Choose from: store, teachers, ingredients, views, sizes, beyond, faults, bounds",
        ),
        (["--seeds", "0,0"], "seeds is '0,0'"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--teachers", "hog"], "--teachers names hog. Give two or more"),
        (["--teachers", "hog,hog"], "--teachers names one twice"),
        (["--teachers", "hog,colour"], "No teacher named 'colour'"),
        (["--teachers", "hog,color", "--stages", "sizes"], "needs ingredients and views, not found"),
    ):
        assert main(["run", "--data", str(data), "--out", str(tmp_path / "out"), *options]) == 1
        assert said in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["run", "--data", str(data), "--out", str(tmp_path / "file")]) == 1
    assert "--out" in capsys.readouterr().err
    assert main(["run", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 1
    assert "no evidence" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_commands_are_shown_without_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = record(tmp_path / "data")
    assert main(["run", "--data", str(data), "--teachers", "hog,color", "--dry_run", "--out", str(tmp_path / "o")]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == [
        "extract", "store", "ablate", "ablate", "extract", "ablate", "probe", "ablate", "extract", "-m", "store",
        "ablate", "-m", "probe", "ablate", "store", "extract", "ablate",
    ]  # fmt: skip
    asked = ["--stages", "tasks", "--dry_run"]
    assert main(["run", "--data", str(data), "--teachers", "hog,color", *asked, "--out", str(tmp_path / "o")]) == 0
    robot, report = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert robot[:4] == ["python", "-m", "benchmarks.cortexbench", "run"]
    assert report[1:3] == ["ablate", "report"]
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_whole_run_goes_on_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    forked.commands(monkeypatch, evidence)
    few = replace(PRESETS["small"], photographs="sample:32", held_out_photographs="sample:16")
    monkeypatch.setitem(PRESETS, "small", few)
    data = record(tmp_path / "data", frames=24)
    short = "--trainer.max_epochs=1 --trainer.limit_train_batches=1 --model.width=24 --model.depth=1 --model.heads=1"
    command = [
        "run", "--data", str(data), "--teachers", "hog,color", "--seeds", "0", "--out", str(tmp_path / "out"),
        "--scorers", "readout", "--options", short, "--stages", "store,teachers,bounds,proxy",
    ]  # fmt: skip
    assert main(command) == 0
    first = json.loads((tmp_path / "out/evidence.json").read_text())
    assert set(first["tables"]["teachers"]) == {"hog", "color", "all"}
    assert set(first["bounds"]) >= {"untrained", "teacher:hog", "teacher:color", "blind"}
    assert set(first["tables"]["proxy/students"]) == {"large", "direct", "direct and longer", "proxy"}
    capfd.readouterr()
    assert main([*command[:-1], "teachers,proxy"]) == 0  # nothing is left to do
    assert "3 of 3 runs done" in capfd.readouterr().err
    assert json.loads((tmp_path / "out/evidence.json").read_text())["tables"] == first["tables"]
    assert main([*command[:-4], "--options=--trainer.max_epochs=2"]) == 1
    assert "as --options. Give the same" in capfd.readouterr().err
