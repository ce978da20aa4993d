from pathlib import Path

import pytest

from benchmarks.throughput import gpu, step
from benchmarks.throughput.measure import BenchmarkError, Settings


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
