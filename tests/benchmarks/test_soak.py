import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import __main__ as soaking
from benchmarks.soak.report import grown, summarize
from benchmarks.soak.watch import Sample, Watch, slope_per_hour

# Two processes that both touch the same 50 MB.
_HOLDS_50_MB = """
import mmap, os, sys
memory = mmap.mmap(-1, 50_000_000)
os.fork()
touched = sum(memory[at] for at in range(0, 50_000_000, 4096))
print("ready", flush=True)
sys.stdin.read()
"""


def sample(minute: float, pss_mb: float) -> Sample:
    return Sample(60 * minute, pss_mb, 0, 0, 30, 5, 3, 0)


def test_slope_is_that_of_the_line() -> None:
    assert slope_per_hour([0, 1800, 3600], [10, 11, 12]) == pytest.approx(2)


def test_warm_up_is_left_out() -> None:
    samples = [sample(minute, 100 if minute < 33 else 500 + minute) for minute in range(100)]

    memory = summarize(samples)["pss_mb"]

    assert memory["slope_per_hour"] == pytest.approx(60)
    assert memory["after_warm_up"] == pytest.approx(537.5)
    assert memory["end"] == pytest.approx(594.5)


def test_growth_is_told_from_swings() -> None:
    swings = summarize([sample(minute, 500 + 20 * (minute % 3)) for minute in range(100)])
    grows = summarize([sample(minute, 500 + minute) for minute in range(100)])

    assert grown(swings) == []
    (line,) = grown(grows)
    assert "memory grew from" in line


def test_shared_pages_count_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDS_50_MB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    watch = Watch(process.pid)
    looks = iter([True, False, False])
    (seen,) = watch.follow(lambda: next(looks), 0.01)
    process.communicate("")

    assert seen.processes == 2
    assert 50 < seen.pss_mb < 90
    assert seen.uss_mb < 40
    assert seen.shared_memory == 0


@pytest.mark.slow
def test_a_short_run_is_watched_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end, look, command = tmp_path / "end", Watch._look, soaking._command

    def looked_at_often_enough(watch: Watch) -> Sample | None:
        if len(watch.samples) == 5:
            end.touch()
        return look(watch)

    def ends_then(*arguments: Any) -> list[str]:
        stopping = ["--trainer.callbacks=trainings.Stopping", f"--trainer.callbacks.file={end}"]
        return [*command(*arguments), *stopping]

    monkeypatch.setattr(Watch, "_look", looked_at_often_enough)
    monkeypatch.setattr(soaking, "_command", ends_then)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))

    path = soaking.soak(minutes=5, folder=tmp_path, results=tmp_path / "results", small=True)

    record = json.loads(path.read_text())
    assert record["left_behind"] == {"processes": 0, "shared_memory": 0}
    assert record["summary"]["processes"]["greatest"] >= 3
    assert len(record["samples"]) > 5
    end.unlink()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["results"]


def test_shared_memory_that_outlives_its_process_is_found() -> None:
    file = Path(f"/dev/shm/soak-{os.getpid()}")
    code = f"import mmap, sys; f = open({str(file)!r}, 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 0); print()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; sys.stdout.flush(); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    watch = Watch(process.pid)
    looks = iter([True, False, False])
    (seen,) = watch.follow(lambda: next(looks), 0.01)
    process.communicate("")

    assert seen.shared_memory == 1
    assert watch.left_behind() == {"processes": 0, "shared_memory": 1}
    file.unlink()
