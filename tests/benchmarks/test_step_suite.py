from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.throughput import gpu, step
from benchmarks.throughput.measure import BenchmarkError, Measure, Settings
from benchmarks.throughput.report import table


@pytest.mark.slow
def test_the_suite_measures_every_step_and_its_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each number of channels would take a compiled loss of its own.
    for name in ("CDIV", "ALL_FIVE"):
        narrow = {teacher: (8, rows) for teacher, (_, rows) in getattr(step, name).items()}
        monkeypatch.setattr(step, name, narrow)

    result = step.run(Settings(tmp_path, pairs=2, small=True))

    assert len(result.measures) == 14
    assert all(value > 0 for measure in result.measures for value in measure.values)
    assert all(parity["loss_relative_difference"] < 1e-5 for parity in result.details["parity"].values())
    assert {len(runs) for costs in result.details["costs"].values() for runs in costs.values()} == {2}


def test_without_a_gpu_its_suite_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    with pytest.raises(BenchmarkError, match="needs a CUDA device"):
        gpu.run(Settings(tmp_path))


def test_cases_that_would_end_too_late_are_left_out() -> None:
    now = [30.0]

    def case(name: str, seconds: float) -> Callable[[], list[Measure]]:
        def measure() -> list[Measure]:
            now[0] += seconds
            return [Measure(name, [seconds])]

        return measure

    # The first is expected to take 100 s. It ends at 70, the second at 190; a third of 120 s would end after 300.
    cases = {name: case(name, seconds) for name, seconds in (("a", 40), ("b", 120), ("c", 1), ("d", 1))}

    measures, left_out = gpu.in_time(cases, 300, clock=lambda: now[0])

    assert [measure.name for measure in measures] == ["a", "b"]
    assert left_out == ["c", "d"]
    assert gpu.in_time(cases, now[0] + 99, clock=lambda: now[0]) == ([], ["a", "b", "c", "d"])


@pytest.mark.slow
def test_the_suite_for_a_gpu_measures_what_it_has_time_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(work: Callable[[], object], device: torch.device) -> float:
        work()
        return 1e-3  # stands in for the clock of a GPU

    three, five = ({name: (8, 16) for name in getattr(gpu, teachers)} for teachers in ("CDIV", "ALL_FIVE"))
    changes = {
        "CDIV": three, "ALL_FIVE": five, "_FULL": [("base", three), ("tiny", three), ("small", five)], "_BATCH": 4,
        "_DEVICE": "cpu", "_seconds": seconds,
    }  # fmt: skip
    for name, value in changes.items():
        monkeypatch.setattr(gpu, name, value)
    answers = iter([True])  # to the suite, and not to the compiler
    monkeypatch.setattr("torch.cuda.is_available", lambda: next(answers, False))
    real = gpu.in_time
    times = iter([0, 60, 60, 121, 400])  # begin and end of two cases, begin of the third
    monkeypatch.setattr(gpu, "in_time", lambda cases, end: real(cases, 440, partial(next, times)))

    result = gpu.run(Settings(tmp_path, pairs=2, small=True))

    late = "small, all five teachers, batch 4"
    assert result.details["left_out"] == [late]
    assert late in table({"gpu": result})
    assert [measure.name.split(", ")[0] for measure in result.measures] == [
        "measured bfloat16 matrix product", "measured device copy", "training step", "training step",
        "GPU-hours of the published recipe", "share of the measured matrix rate", "GPU-hours of the published recipe",
        "share of the bound (compute + memory", "fused loss", "images/s with the loader",
    ]  # fmt: skip
    assert all(value > 0 for measure in result.measures for value in measure.values)
    base = result.details["steps"]["base, C+Di+V, batch 4"]
    assert result.measures[4].values == pytest.approx([1_281_167 * 50 / 4 * s / 3600 for s in base["seconds"]])
    # One product of 64 x 64 matrices in a millisecond is the rate that the step has its share of.
    assert result.measures[5].values == pytest.approx([base["flop"] / s / (2 * 64**3 / 1e-3) for s in base["seconds"]])
