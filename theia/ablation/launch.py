"""Launchers: the same jobs as processes of this machine, or as an array of SLURM jobs."""

import importlib.util
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import torch

from theia.ablation.run import CHECKPOINT, Run, lock
from theia.errors import ConfigError
from theia.scoring.contract import scorer_names
from theia.utils.arguments import MOST_PROCESSES, check_number
from theia.utils.files import write_whole

logger = logging.getLogger(__name__)

# How long a training may take to write its checkpoint when it is asked to stop.
_GRACE_S = 60.0
_POLL_OF_PROCESSES_S = 0.5


@dataclass(eq=False)
class Job:
    """One run, from where it is to its scores. Can be carried out again at any time, on any machine.

    Attributes:
        run: What to train and test.
        environment: Variables beside those of the process.
        program: How to start ``theia``.
    """

    run: Run
    environment: Mapping[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = (sys.executable, "-m", "theia")

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._kill_at = float("inf")

    def __call__(self) -> int:
        """Does what is left to do.

        Returns:
            Exit status of the first command that failed; 0 if all is done.
        """
        while not self._stop.is_set():
            with lock(self.run.lock) as held:
                if held is not None:
                    return self._work(held)
            # A sweep that was killed left its training behind, which holds the lock until it has come to its end.
            time.sleep(_POLL_OF_PROCESSES_S)
        return 128 + signal.SIGTERM

    def stop(self) -> None:
        """Asks the command that is running to write its checkpoint and end, and starts no other."""
        self._stop.set()
        child = self._child
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGTERM)
            self._kill_at = time.monotonic() + _GRACE_S

    def checkpoint(self) -> Any:
        """What submitit does when a job is preempted or out of time: stop, and put it into the queue again."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self._child is not None:
            self._wait(self._child)
        return DelayedSubmission(Job(self.run, self.environment, self.program))

    def __reduce__(self) -> tuple[Any, ...]:
        """For other machines: made anew there, as an event and a process are of this one."""
        return type(self), (self.run, self.environment, self.program)

    def commands(self) -> list[list[str]]:
        """Arguments of ``theia``, one list per command."""
        options = ["--config", str(self.run.config_file), "--ckpt_path"]
        test = ["test", *options, CHECKPOINT, "--compare_untrained", "false"]
        # A test writes its report anew: what was scored before must be scored again.
        report = self.run.report or {"scorers": []}
        earlier = [name for name in report["scorers"] if name in scorer_names()]
        scorers = dict.fromkeys([*self.run.scorers, *earlier])
        chosen = ["--scorers", ",".join(scorers)] if scorers else []
        return [["fit", *options, "last"], [*test, *chosen]]

    def _work(self, held: int) -> int:
        fit, test = self.commands()
        self.run.failed.unlink(missing_ok=True)
        code = 0
        if not (self.run.trained.exists() and (self.run.folder / f"checkpoints/{CHECKPOINT}.ckpt").exists()):
            code = self._carry_out(fit, held)
            if code == 0:
                write_whole(self.run.trained, "")
        if code == 0 and not self.run.finished:
            code = self._carry_out(test, held)
        if code and not self._stop.is_set():
            write_whole(self.run.failed, f"{code}\n")
        return code

    def _carry_out(self, arguments: Sequence[str], held: int) -> int:
        if self._stop.is_set():
            return 128 + signal.SIGTERM
        with self.run.log.open("ab") as log:
            log.write(f"$ {shlex.join(['theia', *arguments])}\n".encode())
            log.flush()
            self._child = subprocess.Popen(
                [*self.program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_environment(), **self.environment},
                pass_fds=[held],
                # Ctrl-C reaches this process alone, which then ends its children one after the other.
                start_new_session=True,
            )
        if self._stop.is_set():  # set while the child was being started
            self.stop()
        return self._wait(self._child)

    def _wait(self, child: "subprocess.Popen[bytes]") -> int:
        # Not child.wait(): it holds a lock, and a signal may bring a second wait into the very same thread.
        while (code := child.poll()) is None:
            if time.monotonic() > self._kill_at:
                child.kill()
            time.sleep(_POLL_OF_PROCESSES_S)
        return code


def _environment() -> dict[str, str]:
    """Without SLURM's variables: Lightning would take the job for one that SLURM starts once for each device."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


Launcher = Literal["local", "slurm"]
Ended = Callable[[Job, int], None]  # a job and its exit status
Watch = Callable[[], None]

_POLL_S = 1.0
_TIMEOUTS = 1000
_UNKNOWN_S = 300.0


def check_launcher(launcher: Launcher, jobs: int) -> None:
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
