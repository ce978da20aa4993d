import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ablation.small_sweep import count, make_job, make_run

from theia.ablation import launch
from theia.ablation.job import Job
from theia.ablation.lock import lock
from theia.ablation.run import Run
from theia.errors import ConfigError


def nothing() -> None: ...


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def carry_out(runs: list[Run], parallel: int = 1) -> dict[str, int]:
    ended: dict[str, int] = {}
    launch.run_locally(
        [make_job(run) for run in runs], parallel, nothing, lambda job, code: ended.update({job.run.row: code})
    )
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
    at_work: list[str] = []
    most: list[int] = []
    both = threading.Barrier(2, timeout=60)

    class Counted(Job):
        def __call__(self) -> int:
            at_work.append(self.run.row)
            both.wait()  # there is a second one
            most.append(len(at_work))
            both.wait()
            status = super().__call__()
            at_work.remove(self.run.row)
            return status

    launch.run_locally([Counted(run, program=make_job(run).program) for run in runs], 2, lambda: None, lambda *_: None)
    assert all(run.finished for run in runs)
    assert most == [2, 2, 2, 2]


def test_cores_and_gpus_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert launch._shares(1) == [{}]
    assert launch._shares(2) == [
        {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "4,6"}, {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "5"},
    ]  # fmt: skip
    assert [share["CUDA_VISIBLE_DEVICES"] for share in launch._shares(4)] == ["4", "5", "6", "4"]


def test_an_interruption_ends_the_children_and_the_next_call_goes_on(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, steps=60) for name in "ab"]

    def interrupt() -> None:
        if all(run.progress()[0] > 3 for run in runs):
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            launch.run_locally([make_job(run) for run in runs], 2, interrupt, lambda *_: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(run.running for run in runs)
    assert not any(run.failed.exists() or run.finished for run in runs)

    assert carry_out(runs, 2) == {"a": 0, "b": 0}
    for run in runs:
        steps = [line.split(",")[1] for line in (run.folder / "metrics.csv").read_text().splitlines()[1:]]
        assert steps == [str(step) for step in range(60)]  # none twice: it went on


def test_a_training_that_a_killed_sweep_left_is_waited_for(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=40)
    code = (
        "import sys; from pathlib import Path; from ablation.small_sweep import *; "
        f"make_job(make_run(Path({str(tmp_path)!r}), steps=40))()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    sweep = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(lambda: run.progress()[0] > 3)
    sweep.kill()
    sweep.wait()
    assert run.running  # its child lives and holds the lock

    assert carry_out([run]) == {"a": 0}
    assert run.finished
    steps = [line.split(",")[1] for line in (run.folder / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(40)]  # no two wrote at a time


def test_waiting_for_another_process_can_be_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    job = make_job(run)
    with lock(run.lock) as held:
        assert held is not None
        thread = threading.Thread(target=job)
        thread.start()
        job.stop()
        thread.join(5)
    assert not thread.is_alive()
    assert not run.log.exists()


def test_a_child_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theia.ablation.job._GRACE_S", 0.2)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    job = Job(run := make_run(tmp_path), program=(sys.executable, "-c", stubborn))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(job()))
    thread.start()
    wait_for(lambda: run.log.exists() and "deaf" in run.log.read_text())
    job.stop()
    thread.join(10)
    assert codes == [-signal.SIGKILL]


def test_a_preempted_job_goes_on_where_it_is_put_into_the_queue_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=60)
    job = make_job(run)
    thread = threading.Thread(target=job)
    thread.start()
    wait_for(lambda: run.progress()[0] > 3)
    again = job.checkpoint()
    thread.join(10)
    assert 3 < run.progress()[0] < 60
    assert not run.running

    assert pickle.loads(pickle.dumps(again)).result() == 0
    steps = [line.split(",")[1] for line in (run.folder / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(60)]


def test_a_child_does_not_know_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    run = make_run(tmp_path)
    show = "import os; print([name for name in os.environ if 'SLURM' in name])"
    assert Job(run, program=(sys.executable, "-c", show))() == 0
    assert run.last_lines(1) == "[]"


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_submitit_drives_the_same_jobs(cluster: str, tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name) for name in "ab"]
    (runs[1].folder / "bad").touch()
    ended: dict[str, int] = {}
    launch.run_on_slurm(
        [make_job(run) for run in runs], 2, nothing, lambda job, code: ended.update({job.run.row: code}),
        tmp_path / "submitit", {"timeout_min": 2}, cluster,
    )  # fmt: skip
    assert ended == {"a": 0, "b": 1}
    assert runs[0].finished


def test_an_option_that_submitit_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="colour"):
        launch.run_on_slurm(
            [make_job(make_run(tmp_path))], 1, nothing, lambda *_: None, tmp_path, {"colour": 1}, "debug"
        )


def test_what_cannot_be_launched_is_said_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs is 0"):
        launch.check("local", 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("srun") is None
    with pytest.raises(ConfigError, match=r"no SLURM here.*--launcher local"):
        launch.check("slurm", 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'theia\[slurm\]'"):
        launch.check("slurm", 1)
