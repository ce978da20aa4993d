import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from ablation.small_sweep import count, hold, make_job, make_run, steps
from events import PATIENCE_S, wait_for

from theia.ablation.launch import Job, _shares, check_launcher, run_locally, run_on_slurm
from theia.ablation.sweep_run import Run, lock
from theia.errors import ConfigError


def nothing() -> None: ...


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_POLL_S", "_POLL_OF_PROCESSES_S"):
        monkeypatch.setattr(f"theia.ablation.launch.{name}", 0.02)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set as soon as a job has found its run locked by another process."""
    event = threading.Event()

    @contextmanager
    def watched(path: Path) -> Iterator[int | None]:
        with lock(path) as held:
            if held is None:
                event.set()
            yield held

    monkeypatch.setattr("theia.ablation.launch.lock", watched)
    return event


def carry_out(runs: list[Run], parallel: int = 1) -> dict[str, int]:
    ended: dict[str, int] = {}
    run_locally([make_job(run) for run in runs], parallel, nothing, lambda job, code: ended.update({job.run.row: code}))
    return ended


def test_each_is_trained_then_tested(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name) for name in "ab"]
    assert carry_out(runs) == {"a": 0, "b": 0}
    assert all(run.finished for run in runs)
    assert runs[0].progress() == (4, None)
    assert runs[0].speed() == {"images_per_s": 100.0, "device_hours": pytest.approx(4 * 8 / 100 / 3600)}
    assert "$ theia fit --config" in runs[0].log.read_text()


def test_a_failure_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name) for name in "abc"]
    (runs[1].folder / "bad").touch()
    assert carry_out(runs) == {"a": 0, "b": 1, "c": 0}
    assert runs[1].last_lines(1) == "the loss is not finite"
    assert runs[1].failed.read_text() == "1\n"
    assert not runs[1].finished

    (runs[1].folder / "bad").unlink()
    assert carry_out(runs) == {"a": 0, "b": 0, "c": 0}
    assert [count(run, "test") for run in runs] == [1, 1, 1]
    assert not runs[1].failed.exists()


def test_two_run_at_a_time_and_no_more(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name) for name in "abcd"]
    held = {run.row: hold(run, 1) for run in runs}
    seen = []

    def let_one_go() -> None:
        begun = [run for run in runs if run.progress()[0] == 1 and held[run.row].exists()]
        if begun and len(begun) >= min(2, sum(file.exists() for file in held.values())):
            seen.append([run.row for run in runs if run.running])
            held[begun[0].row].unlink()

    run_locally([make_job(run) for run in runs], 2, let_one_go, lambda *_: None)
    assert all(run.finished for run in runs)
    assert seen[0] == ["a", "b"]
    assert {len(rows) for rows in seen[:3]} == {2}


def test_cores_and_gpus_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert _shares(1) == [{}]
    assert _shares(2) == [
        {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "4,6"}, {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "5"},
    ]  # fmt: skip
    assert [share["CUDA_VISIBLE_DEVICES"] for share in _shares(4)] == ["4", "5", "6", "4"]


def test_an_interruption_ends_the_children_and_the_next_call_goes_on(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, steps=9) for name in "ab"]
    held = [hold(run, 4) for run in runs]

    def interrupt() -> None:
        if all(run.progress()[0] == 4 for run in runs):
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_locally([make_job(run) for run in runs], 2, interrupt, lambda *_: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(run.running for run in runs)
    assert not any(run.failed.exists() or run.finished for run in runs)

    for file in held:
        file.unlink()
    assert carry_out(runs, 2) == {"a": 0, "b": 0}
    assert [steps(run) for run in runs] == [list(range(9))] * 2  # none twice: it went on


def test_a_training_that_a_killed_sweep_left_is_waited_for(tmp_path: Path, refused: threading.Event) -> None:
    run = make_run(tmp_path, steps=9)
    held = hold(run, 4)
    code = (
        "import sys; from pathlib import Path; from ablation.small_sweep import *; "
        f"make_job(make_run(Path({str(tmp_path)!r}), steps=9))()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    sweep = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(lambda: run.progress()[0] == 4)
    sweep.kill()
    sweep.wait()
    assert run.running  # its child lives and holds the lock

    ended: dict[str, int] = {}
    run_locally(
        [make_job(run)], 1, lambda: refused.is_set() and held.unlink(missing_ok=True),
        lambda job, code: ended.update({job.run.row: code}),
    )  # fmt: skip
    assert ended == {"a": 0}
    assert run.finished
    assert steps(run) == list(range(9))  # no two wrote at a time


def test_waiting_for_another_process_can_be_stopped(tmp_path: Path, refused: threading.Event) -> None:
    run = make_run(tmp_path)
    job = make_job(run)
    with lock(run.lock) as held:
        assert held is not None
        thread = threading.Thread(target=job)
        thread.start()
        assert refused.wait(PATIENCE_S)
        job.stop()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert not run.log.exists()


def test_a_child_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theia.ablation.launch._GRACE_S", 0.2)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True);"
        f"time.sleep({PATIENCE_S})"
    )
    job = Job(run := make_run(tmp_path), program=(sys.executable, "-c", stubborn))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(job()))
    thread.start()
    wait_for(lambda: run.log.exists() and "deaf" in run.log.read_text())
    job.stop()
    thread.join(PATIENCE_S)
    assert codes == [-signal.SIGKILL]


def test_a_preempted_job_goes_on_where_it_is_put_into_the_queue_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=9)
    held = hold(run, 4)
    job = make_job(run)
    thread = threading.Thread(target=job)
    thread.start()
    wait_for(lambda: run.progress()[0] == 4)
    again = job.checkpoint()
    thread.join(PATIENCE_S)
    assert steps(run) == list(range(4))
    assert not run.running

    held.unlink()
    assert pickle.loads(pickle.dumps(again)).result() == 0
    assert steps(run) == list(range(9))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("readout@/stores/b", "classification,readout@/stores/b,dynamics@/data/a"),
        ("dynamics@/data/b", "classification,readout,dynamics@/data/b"),
    ],
)
def test_earlier_scorers_run_again_but_not_by_two_data(tmp_path: Path, wanted: str, expected: str) -> None:
    run = make_run(tmp_path)
    names = ["classification", "readout", "dynamics@/data/a", "uninstalled"]
    report = {"store": {"manifest_sha256": "abc"}, "after": {}, "scores": {}, "scorers": names}
    (run.folder / "test_last.json").write_text(json.dumps(report))
    assert Job(replace(run, scorers=(wanted,))).commands()[1][-2:] == ["--scorers", expected]


def test_a_child_does_not_know_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    run = make_run(tmp_path)
    show = "import os; print([name for name in os.environ if 'SLURM' in name])"
    assert Job(run, program=(sys.executable, "-c", show))() == 0
    assert run.last_lines(1) == "[]"


def test_scores_on_another_state_of_a_scorer_s_data_do_not_count(tmp_path: Path) -> None:
    run = replace(make_run(tmp_path), scorers=("readout@/s",), scorer_data={"readout@/s": "now"})
    path = run.folder / "test_last.json"
    report = {"store": {"manifest_sha256": "abc"}, "after": {}, "scores": {}, "scorers": ["readout@/s"]}
    for recorded, finished in (({"readout@/s": "now"}, True), ({"readout@/s": "before"}, False), ({}, False)):
        path.write_text(json.dumps({**report, "scorer_data": recorded}))
        assert run.finished == finished
        assert run.outdated == ([] if finished else ["readout@/s"])
    path.write_text(json.dumps(report))  # of a version that did not write it
    assert run.finished


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_submitit_drives_the_same_jobs(cluster: str, tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name) for name in "ab"]
    (runs[1].folder / "bad").touch()
    ended: dict[str, int] = {}
    run_on_slurm(
        [make_job(run) for run in runs], 2, nothing, lambda job, code: ended.update({job.run.row: code}),
        tmp_path / "submitit", {"timeout_min": 60}, cluster,
    )  # fmt: skip
    assert ended == {"a": 0, "b": 1}
    assert runs[0].finished


def test_an_option_that_submitit_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="colour"):
        run_on_slurm([make_job(make_run(tmp_path))], 1, nothing, lambda *_: None, tmp_path, {"colour": 1}, "debug")


def test_what_cannot_be_launched_is_said_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs is 0"):
        check_launcher("local", 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("srun") is None
    with pytest.raises(ConfigError, match=r"no SLURM here.*--launcher local"):
        check_launcher("slurm", 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'theia\[slurm\]'"):
        check_launcher("slurm", 1)
