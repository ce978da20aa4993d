import gc
import multiprocessing
import os
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from events import has_ended, wait_for

from theia.data.loader import FeatureLoader
from theia.data.sampler import TrainingSampler
from theia.errors import WorkerError
from theia.store.reader import FeatureStore, Split


@pytest.fixture
def split(store: Path) -> Split:
    return FeatureStore(store).open_split("train")


def loader(split: Split, workers: int, batch: int = 4) -> FeatureLoader:
    return FeatureLoader(split, TrainingSampler(np.arange(len(split)), batch, seed=1), workers)


def held_by_this_process() -> set[str]:
    """Descriptors, threads, and shared mappings, of which the ring consists, each with what tells it from others."""
    descriptors = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            descriptors.add(f"{path} -> {path.readlink()}")
    threads = {f"thread {thread.id}" for thread in psutil.Process().threads()}
    areas = psutil.Process().memory_maps(grouped=False)
    return descriptors | threads | {f"{area.addr} {area.path}" for area in areas if area.perms.endswith("s")}


def test_a_killed_worker_is_an_error_that_names_it(split: Split) -> None:
    batches = iter(one := loader(split, workers=2))
    next(batches)
    victim = one._workers.pids[1]
    os.kill(victim, signal.SIGKILL)

    with pytest.raises(
        WorkerError, match=rf"worker 1 of 2 \(pid {victim}\) was killed \(SIGKILL\).*train.*--ckpt_path"
    ):
        list(batches)
    assert not psutil.pid_exists(victim)


def test_a_worker_that_dies_idle_stops_other_loaders_too(split: Split) -> None:
    validation, training = (loader(split, workers=1) for _ in range(2))
    list(validation)
    (victim,) = validation._workers.pids
    batches = iter(training)
    next(batches)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: has_ended(psutil.Process(victim)))

    with pytest.raises(WorkerError, match=rf"pid {victim}\)"):
        list(batches)


def test_a_worker_leaves_the_answer_to_a_schedulers_signal_to_the_run(split: Split) -> None:
    one = loader(split, workers=1)
    batches = iter(one)
    next(batches)
    (worker,) = one._workers.pids
    os.kill(worker, signal.SIGTERM)

    assert len(list(batches)) == len(one) - 1
    one.close()
    assert not psutil.pid_exists(worker)


def test_a_loader_whose_worker_died_starts_afresh(split: Split) -> None:
    one = loader(split, workers=1)
    next(iter(one))
    os.kill(one._workers.pids[0], signal.SIGKILL)
    with pytest.raises(WorkerError):
        list(one)
    one.sampler.set_epoch(1)

    assert sorted(row for batch in one for row in batch.rows.tolist()) == list(range(80))


def test_an_error_of_the_programs_own_in_a_worker_is_not_taken_for_a_kill(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "read_into", lambda *_: 1 / 0)

    with pytest.raises(WorkerError, match="ended with status 1; what it printed says why"):
        list(loader(split, workers=1))


def test_ctrl_c_and_signals_that_the_parent_handles_do_not_reach_a_worker(split: Split) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        batches = iter(one := loader(split, workers=1))
        next(batches)
        for number in (signal.SIGINT, signal.SIGUSR1):
            os.kill(one._workers.pids[0], number)

        assert len(list(batches)) == 19
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("ending", ["close", "forget"])
def test_nothing_is_left_of_a_loader(split: Split, ending: str) -> None:
    list(loader(split, workers=2))  # what is opened once and for all is open now
    gc.collect()
    before = held_by_this_process()
    one = loader(split, workers=2)
    batches = iter(one)
    next(batches)
    workers = one._workers.pids

    if ending == "close":
        one.close()
    del one, batches
    gc.collect()

    assert not any(map(psutil.pid_exists, workers))
    assert held_by_this_process() <= before  # what other tests have left may end meanwhile


def test_workers_end_with_the_process_that_they_read_for(split: Split) -> None:
    ours, theirs = multiprocessing.Pipe()

    def read() -> None:
        loaders = [loader(split, workers=2) for _ in range(2)]
        held = [next(iter(one)) for one in loaders]
        theirs.send([pid for one in loaders for pid in one._workers.pids])
        assert held
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    theirs.close()
    workers = [psutil.Process(pid) for pid in ours.recv()]
    process.join()

    wait_for(lambda: all(map(has_ended, workers)))
