"""However a training ends, it leaves nothing behind: no process, no shared memory."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import forked
import psutil
import pytest
import torch
from events import has_ended, wait_for

pytestmark = pytest.mark.slow

Fit = Callable[..., forked.Started]


@pytest.fixture
def fit(store: Path, tmp_path: Path) -> Iterator[Fit]:
    """Starts ``theia fit`` with two workers and gives it back when it trains."""
    started: list[forked.Started] = []

    def start(epochs: int = 100_000) -> forked.Started:
        run = tmp_path / "run"
        process = forked.theia(
            "fit", f"--data.store={store}", f"--run_folder={run}",
            "--data.batch_size=16", "--data.workers=2", "--model.width=16", "--model.depth=1", "--model.heads=2",
            "--trainer.accelerator=cpu", "--checkpoint_every=3", f"--trainer.max_epochs={epochs}",
            "--trainer.check_val_every_n_epoch=1000",
        )  # fmt: skip
        started.append(process)
        wait_for(lambda: (run / "checkpoints" / "last.ckpt").exists() or process.poll() is not None)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def workers_of(process: forked.Started) -> list[psutil.Process]:
    """The run's reading processes. No file in /dev/shm is in use, so that none can be left there."""
    run = psutil.Process(process.pid)
    workers = run.children(recursive=True)
    assert len(workers) == 4
    used = {Path(area.path) for one in [run, *workers] for area in one.memory_maps()}
    # A semaphore of multiprocessing lies there without a name: it was unlinked as soon as it was made.
    assert not [file for file in used if file.is_relative_to("/dev/shm") and file.exists()]
    return workers


def end_of(process: forked.Started, workers: list[psutil.Process]) -> str:
    """Waits for the end of a run, checks that nothing is left of it, and gives what it said."""
    process.wait()
    wait_for(lambda: all(map(has_ended, workers)))
    return process.err


@pytest.mark.parametrize("which", [0, -1])  # one of validation, which idles, and one of training
def test_a_killed_worker_stops_the_run_with_an_error_that_names_it(fit: Fit, which: int) -> None:
    process = fit()
    workers = workers_of(process)

    workers[which].send_signal(signal.SIGKILL)
    said = end_of(process, workers)

    assert process.returncode == 1
    assert f"(pid {workers[which].pid}) was killed (SIGKILL)" in said
    assert "--ckpt_path last" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_of_all_processes_stops_the_run(fit: Fit, times: int) -> None:
    process = fit()
    workers = workers_of(process)

    for _ in range(times):  # as Ctrl-C does, to the whole group
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        wait_for(lambda: "nterrupt" in process.err or process.poll() is not None)
    said = end_of(process, workers)

    assert process.returncode == 130, process.out + process.err
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("send", [os.kill, os.killpg])  # to the run, by hand; to all its processes, by a scheduler
def test_a_run_that_is_asked_to_stop_says_where_and_does_not_look_like_one_that_has_finished(
    fit: Fit, tmp_path: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    process = fit()
    workers = workers_of(process)

    send(process.pid, number)
    said = end_of(process, workers)

    assert process.returncode == 128 + number
    step = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"Stopped after step {step}, as a signal asked for." in said
    assert "--ckpt_path last" in said


def test_a_run_that_is_killed_leaves_no_worker(fit: Fit) -> None:
    process = fit()
    workers = workers_of(process)

    process.kill()
    end_of(process, workers)

    assert process.returncode == -signal.SIGKILL
