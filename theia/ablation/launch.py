"""Launchers: the same jobs as processes of this machine, or as an array of SLURM jobs."""

import importlib.util
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import torch

from theia.ablation.job import Job
from theia.errors import ConfigError
from theia.utils.files import write_whole
from theia.utils.numbers import MOST_PROCESSES, check_number

Launcher = Literal["local", "slurm"]
Ended = Callable[[Job, int], None]  # a job and its exit status
Watch = Callable[[], None]

_POLL_S = 1.0
_TIMEOUTS = 1000
_UNKNOWN_S = 300.0

logger = logging.getLogger(__name__)


def check(launcher: Launcher, jobs: int) -> None:
    """Says before anything starts what could not be started.

    Raises:
        ConfigError: If there is no SLURM or no submitit here, or the number of jobs is none.
    """
    check_number("jobs", jobs, 1, MOST_PROCESSES)
    if launcher != "slurm":
        return
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError("The launcher 'slurm' needs submitit. Install it: pip install 'theia[slurm]'.")
    if shutil.which("srun") is None or shutil.which("sbatch") is None:
        raise ConfigError(
            "There is no SLURM here: srun and sbatch are not found. Start the sweep on a login node of the cluster, or "
            "take --launcher local."
        )


def run_locally(jobs: Sequence[Job], parallel: int, watch: Watch, ended: Ended) -> None:
    """Carries out jobs on this machine, so many at a time; Ctrl-C ends those that are running.

    Args:
        jobs: What to do.
        parallel: How many at a time. They share the GPUs and cores evenly.
        watch: Called about every second.
        ended: Called for each job that came to an end.
    """
    slots: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for share in _shares(parallel):
        slots.put(share)

    def carry_out(job: Job) -> int:
        job.environment = {**job.environment, **(share := slots.get())}
        try:
            return job()
        finally:
            slots.put(share)

    with ThreadPoolExecutor(parallel) as pool:
        futures: dict[Future[int], Job] = {}
        try:
            for job in jobs:
                futures[pool.submit(carry_out, job)] = job
            _follow(futures, watch, ended)
        except BaseException:
            _be_patient()
            logger.info("Stopping: trainings write their checkpoints, which may take a minute.")
            for future in futures:
                future.cancel()
            for job in jobs:
                job.stop()
            raise


def run_on_slurm(
    jobs: Sequence[Job],
    parallel: int,
    watch: Watch,
    ended: Ended,
    folder: Path,
    options: Mapping[str, Any],
    cluster: str = "slurm",
) -> None:
    """Submits jobs as one array and follows it; Ctrl-C cancels it.

    A job that is preempted or out of time writes its checkpoint and goes into the queue again, as submitit does it.

    Args:
        jobs: What to do.
        parallel: How many of the array may run at a time.
        watch: Called about every second.
        ended: Called for each job that came to an end.
        folder: For submitit's files.
        options: Of ``submitit.AutoExecutor.update_parameters``: partition, time, GPUs.
        cluster: Of submitit: ``"debug"`` and ``"local"`` need no SLURM.

    Raises:
        ConfigError: If submitit knows no such option.
    """
    import submitit

    # As often as need be: every time the training goes on from its checkpoint.
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=_TIMEOUTS)
    try:
        executor.update_parameters(name="theia-ablate", slurm_array_parallelism=parallel, **options)
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"submitit does not take the options {dict(options)}: {error}") from error
    queued = [(_still_queued(job, folder), job) for job in jobs]
    waiting: dict[Any, Job] = {handle: job for handle, job in queued if handle is not None}
    new = [job for handle, job in queued if handle is None]
    if new:
        with executor.batch():
            handles = [executor.submit(job) for job in new]
        waiting |= zip(handles, new, strict=True)
    try:
        for handle, job in waiting.items():
            write_whole(_submitted(job), handle.job_id)
        while waiting:
            watch()
            for handle in [handle for handle in waiting if handle.done()]:
                job = waiting.pop(handle)
                ended(job, _status(handle, job))
            time.sleep(_POLL_S)
    except BaseException:
        _be_patient()
        for handle, job in waiting.items():
            handle.cancel()
            _submitted(job).unlink(missing_ok=True)
        raise


def _be_patient() -> None:
    """Further signals would only interrupt the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _submitted(job: Job) -> Path:
    return job.run.folder / "slurm_job"


def _still_queued(job: Job, folder: Path) -> Any:
    """The job that a sweep which is no more has submitted for the same run."""
    import submitit

    if not _submitted(job).exists():
        return None
    handle: Any = submitit.SlurmJob(folder, _submitted(job).read_text())
    queued = {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "SUSPENDED", "RESIZING"}
    # The accounting hears of a job some time after its submission.
    if time.time() - _submitted(job).stat().st_mtime < _UNKNOWN_S:
        queued.add("UNKNOWN")
    return handle if handle.state in queued else None


def _status(handle: Any, job: Job) -> int:
    try:
        return int(handle.result())
    except Exception as error:
        # A node that failed, a limit, an import: whatever it was must stand in the log of the run.
        with job.run.log.open("a") as log:
            log.write(f"{type(error).__name__}: {error}\n")
        return 1


def _follow(futures: Mapping[Future[int], Job], watch: Watch, ended: Ended) -> None:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for future in done:
            ended(futures[future], future.result())
        watch()


def _shares(parallel: int) -> list[dict[str, str]]:
    """Environment of each of so many jobs at a time: its part of the GPUs and cores."""
    if parallel == 1:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(index) for index in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    cores = len(os.sched_getaffinity(0))
    shares = []
    for slot in range(parallel):
        share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // parallel)))}
        if gpus:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot::parallel]) or gpus[slot % len(gpus)]
        shares.append(share)
    return shares
