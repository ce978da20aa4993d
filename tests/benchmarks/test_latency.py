import json
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.latency import __main__ as command
from benchmarks.latency import cuda, runtimes
from benchmarks.latency.report import table
from benchmarks.latency.rows import Row, check_threads, distance, measure
from benchmarks.latency.runtimes import BASELINE, DEFAULT, RUNTIMES, Case, Started, eager
from benchmarks.latency.trained import random_encoder, trained_encoder
from benchmarks.throughput.measure import BenchmarkError, Cost, ParityError
from theia.encoder.encoder import Encoder
from theia.export.onnx import photographs

SMALL = {"width": 48, "depth": 2, "heads": 3}
# Compiling takes longer than all the rest. OpenVINO in the process of other tests has crashed those that fork or
# compile.
QUICK = {name: runtime for name, runtime in RUNTIMES.items() if not name.startswith(("compiled", "OpenVINO"))}
# In float32 as well, Encoder.compile has its test beside the encoder's.
COMPILED_ONCE = {name: runtime for name, runtime in RUNTIMES.items() if name != "compiled"}
PHOTOGRAPHS = photographs(224, 224)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # In turns of milliseconds the processor's clock, which ticks every ten, tells nothing.
    monkeypatch.setattr("benchmarks.latency.rows.check_threads", lambda *_: None)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(random_encoder("theia_tiny", **SMALL), 1, 1, tmp_path)


def rows_of(case: Case, ways: dict[str, runtimes.Runtime], pairs: int = 2, **options: Any) -> list[Row]:
    options = {"model": "mini", "weights": "given", "turn_s": 0.01} | options
    return measure(case, ways, PHOTOGRAPHS, pairs, **options)


def check(rows: list[Row], names: list[str], pairs: int) -> None:
    assert [row.runtime for row in rows] == names
    assert [row.missing for row in rows] == [None] * len(rows)
    for row in rows:
        assert len(row.costs) == len(row.speedup) == len(row.cpu_speedup) == pairs
        assert all(cost.wall_s > 0 and cost.cpu_s > 0 for cost in row.costs)
    found = {row.runtime: row for row in rows}
    assert found[BASELINE].speedup == [1.0] * pairs
    assert found[BASELINE].distance == 0
    for row in rows[1:]:
        # The precisions are told apart by what they cost in accuracy.
        assert row.distance < 1e-9 if row.precision == "float32" else 1e-9 < row.distance < 1e-3


def test_every_runtime_gives_the_same_tokens_and_its_times(case: Case) -> None:
    rows = rows_of(case, QUICK)

    check(rows, list(QUICK), 2)
    assert {row.threads for row in rows} == {1}
    precisions = {row.runtime: row.precision for row in rows}
    assert precisions["ONNX Runtime, int8"] == "int8"


def all_rows(folder: Path) -> list[Row]:
    torch.set_num_threads(1)
    shallow = random_encoder("theia_tiny", **{**SMALL, "depth": 1})  # each block takes long to compile
    return rows_of(Case(shallow, 1, 1, folder), COMPILED_ONCE, turn_s=0.2)


@pytest.mark.slow
def test_all_runtimes_of_the_command_give_the_same_tokens(tmp_path: Path) -> None:
    # In a process of its own, as the command's.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        rows = processes.submit(all_rows, tmp_path).result()
    check(rows, list(COMPILED_ONCE), 2)
    assert {row.runtime: row.precision for row in rows}["OpenVINO, float32"] == "float32"


@pytest.mark.gpu
def test_every_runtime_of_a_gpu_gives_the_same_tokens(case: Case) -> None:
    rows = rows_of(case, cuda.RUNTIMES, device="cuda")

    assert [row.runtime for row in rows] == list(cuda.RUNTIMES)
    assert all(row.distance < (1e-5 if row.precision == "float32" else 1e-3) for row in rows)


def test_distance_is_one_minus_the_cosine_of_the_worst_image_however_small_it_is() -> None:
    angles = np.array([0.0, 1e-3, 1e-9])
    expected = np.tile([[[1.0, 0.0]]], (3, 1, 1))
    found = 7 * np.stack([np.cos(angles), np.sin(angles)], 1)[:, None]

    assert distance(expected, found) == pytest.approx(1 - math.cos(1e-3), rel=1e-6)
    assert distance(expected[2:], found[2:]) == pytest.approx(5e-19, rel=1e-6)


def test_a_runtime_that_gives_other_tokens_is_refused(case: Case) -> None:
    def mirrored(case: Case) -> Started:
        run = eager(case).run
        return Started(lambda images: run(images[:, :, ::-1].copy()), "float32", 1)

    with pytest.raises(ParityError, match=r"'mirror' \(float32\)"):
        rows_of(case, {BASELINE: eager, "mirror": mirrored})


def test_tokens_of_all_photographs_are_compared(case: Case) -> None:
    seen: list[np.ndarray] = []

    def watched(case: Case) -> Started:
        run = eager(case).run
        return Started(lambda images: seen.append(images) or run(images), "float32", 1)

    case.batch_size = 3
    rows_of(case, {BASELINE: eager, "watched": watched})

    assert {len(images) for images in seen} == {3}
    assert np.array_equal(np.concatenate(seen[:2])[:4], PHOTOGRAPHS)


@pytest.mark.parametrize(
    ("said", "cpu_s", "fine"), [(1, 1.1, True), (2, 1.0, False), (1, 1.9, False)], ids=["one", "says two", "takes two"]
)
def test_more_threads_than_given_are_refused(said: int, cpu_s: float, fine: bool) -> None:
    turns = [Cost(1.0, cpu_s)] * 3
    if fine:
        check_threads("quick", turns, said, 1)
    else:
        with pytest.raises(BenchmarkError, match=r"'quick' .* 1 threads"):
            check_threads("quick", turns, said, 1)


@pytest.mark.parametrize(
    ("package", "without", "said"),
    [
        ("openvino", ["OpenVINO, float32", DEFAULT], "pip install openvino"),
        ("onnxruntime", [name for name in QUICK if not name.startswith("eager")], "pip install 'theia[onnx]'"),
    ],
)
def test_a_runtime_that_is_not_installed_is_a_row_that_says_what_to_install(
    case: Case, package: str, without: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = runtimes.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))

    ways = QUICK if package == "onnxruntime" else {BASELINE: eager, **{name: RUNTIMES[name] for name in without}}
    rows = rows_of(case, ways)

    missing = {row.runtime: row.missing for row in rows if row.missing is not None}
    assert list(missing) == without
    text = table(rows)
    for name in without:
        assert f"{name}: {missing[name]}" in text
        assert said in str(missing[name])
    assert text.count("not measured") == len(without)


def test_a_compiler_that_fails_is_a_row_too(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Encoder, **_: Any) -> None:
        self._compile, self._compiled = {}, lambda images: 1 / 0

    monkeypatch.setattr(Encoder, "compile", broken)
    _, row = rows_of(case, {BASELINE: eager, "compiled": RUNTIMES["compiled"]})
    assert row.missing == "torch.compile does not work here: division by zero Install a C++ compiler."


def test_only_the_path_to_deploy_has_a_target_and_random_weights_none_for_their_features() -> None:
    def aims(**values: Any) -> list[float | None]:
        row = Row("m", **{"weights": "trained", "device": "cpu", "batch_size": 1, "runtime": DEFAULT} | values)
        return [measure.aim for measure in row.measures]

    assert aims() == [1.9, None, 1e-5]
    assert aims(weights="random") == [1.9, None, None]
    for other in ({"batch_size": 32}, {"runtime": "ONNX Runtime"}, {"device": "cuda"}):
        assert aims(**other) == [None, None, None]


def test_the_target_is_missed_by_speed_or_by_features() -> None:
    def last_cells(speedup: float, off: float) -> str:
        row = Row(
            "m", "trained", "cpu", 1, DEFAULT, precision="bfloat16", costs=[Cost(1, 1)],
            speedup=[speedup], cpu_speedup=[speedup], distance=off,
        )  # fmt: skip
        return table([row]).splitlines()[2].split("1 - cosine <= 1e-05")[1].strip()

    assert last_cells(1.91, 9e-6) == "yes, yes"
    assert last_cells(1.89, 1.1e-5) == "no, no"


def test_training_brings_the_losses_down() -> None:
    encoder, losses = trained_encoder(steps=24, images=8, **SMALL)

    assert not encoder.training
    for values in losses.values():
        assert np.mean(values[-4:]) < 0.95 * np.mean(values[:4])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on models that take milliseconds."""
    monkeypatch.setattr(
        runtimes,
        "RUNTIMES",
        {**{name: QUICK[name] for name in (BASELINE, "eager, autocast")}, DEFAULT: partial(eager, bfloat16=True)},
    )
    monkeypatch.setattr(command, "measure", partial(measure, turn_s=0.01))
    monkeypatch.setattr(command, "random_encoder", lambda size: random_encoder(size, **SMALL))
    monkeypatch.setattr(command, "trained_encoder", lambda size: trained_encoder(size, 2, 4, 2, **SMALL))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_the_command_prints_the_table_and_writes_everything(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    assert (
        command.main(
            ["--backbones=theia_tiny,theia_small", "--batches=1,2", "--pairs=3", f"--results={tmp_path / 'new'}"]
        )
        == 0
    )

    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert sum(line[:2] == ["theia_tiny", "(trained)"] for line in lines) == 6
    assert sum(line[:2] == ["theia_small", "(random)"] for line in lines) == 6
    assert "Random weights: theia_small." in shown
    assert "Threads of every runtime: 1." in shown
    (path,) = (tmp_path / "new").iterdir()
    written = json.loads(path.read_text())
    assert str(path) in shown
    assert written["versions"]["onnxruntime"]
    assert written["machine"]["cores"] >= 1
    assert written["settings"] == {
        "backbones": ["theia_tiny", "theia_small"], "batches": ["1", "2"], "pairs": 3, "threads": 1,
        "own_encoder": False,
    }  # fmt: skip
    assert [len(losses) for losses in written["training"]["losses"].values()] == [2, 2]
    assert list(written["suites"]) == [
        f"{size}, cpu, batch {batch}" for size in ("theia_tiny", "theia_small") for batch in (1, 2)
    ]
    rows = written["suites"]["theia_small, cpu, batch 1"]["details"]["rows"]
    assert [row["runtime"] for row in rows] == [BASELINE, "eager, autocast", DEFAULT]
    assert {len(row["costs"]) for row in rows} == {3}
    assert torch.get_num_threads() == threads


def test_a_model_of_ones_own_is_shown_without_its_folder(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(command, "load", lambda source: asked.append(source) or random_encoder("theia_tiny", **SMALL))
    source = str(tmp_path / "mine")

    assert command.main([f"--encoder={source}", "--batches=1", "--pairs=1", f"--results={tmp_path / 'r'}"]) == 0

    (path,) = (tmp_path / "r").iterdir()
    assert asked == [source]
    assert "mine (given)" in capsys.readouterr().out
    assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--backbones=theia_tiny,huge", "'huge'"),
        ("--batches=1,0", "'1,0'"),
        ("--pairs=0", "--pairs is 0"),
        ("--threads=0", "--threads is 0"),
        ("--encoder=/no/such/model", "no file or folder"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(
    option: str, said: str, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([option, f"--results={tmp_path / 'none'}"]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
