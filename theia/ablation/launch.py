"""Jobs, one for each run, and two ways to launch them: as processes on this machine, or as an array of SLURM jobs."""

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

from theia.ablation.sweep_run import CHECKPOINT, Run, lock
from theia.errors import ConfigError
from theia.scoring.contract import scorer_names
from theia.utils.arguments import MOST_PROCESSES, check_number
from theia.utils.device import core_count
from theia.utils.files import write_whole

logger = logging.getLogger(__name__)

Launcher = Literal["local", "slurm"]
Watch = Callable[[], None]

# How long a training may take to write its checkpoint when it is asked to stop.
_GRACE_S = 60.0
_POLL_S = 1.0
_POLL_OF_PROCESSES_S = 0.5
# How often SLURM may run out of time on a job: each time, its training resumes from a checkpoint.
_TIMEOUTS = 1000
# SLURM's accounting hears of a job some time after its submission.
_UNKNOWN_S = 300.0


def check_launcher(launcher: Launcher, jobs: int) -> None:
    """Checks before anything starts whether it can be started.

    Args:
        launcher: Where to run.
        jobs: Number of runs at a time.

    Raises:
        ConfigError: If SLURM or submitit is missing here, or the number of jobs is out of range.
    """
    check_number("jobs", jobs, 1, MOST_PROCESSES)
    if launcher != "slurm":
        return
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError("The launcher 'slurm' needs submitit. Install it: pip install 'theia[slurm]'.")
    if shutil.which("srun") is None or shutil.which("sbatch") is None:
        raise ConfigError(
            "There is no SLURM here: srun and sbatch are not found. Start the sweep on a login node of the cluster, or "
            "give --launcher local."
        )


@dataclass(eq=False)
class Job:
    """What is left to do for one run. A job can be repeated at any time, on any machine that sees the folder.

    Attributes:
        run: The run to train and test.
        environment: Environment variables to add to those of this process.
        program: The command that starts ``theia``.
    """

    run: Run
    environment: Mapping[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = (sys.executable, "-m", "theia")

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._kill_at = float("inf")

    def __call__(self) -> int:
        """Trains and tests, as far as that is left to do.

        Returns:
            Exit status of the first command that failed; 0 if none did.
        """
        while not self._stop.is_set():
            with lock(self.run.lock) as held:
                if held is not None:
                    return self._work(held)
            # The training of a sweep that was killed may still run; it holds the lock until it ends.
            time.sleep(_POLL_OF_PROCESSES_S)
        return 128 + signal.SIGTERM

    def stop(self) -> None:
        """Asks the running command to write its checkpoint and end, and starts no other."""
        self._stop.set()
        child = self._child
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGTERM)
            self._kill_at = time.monotonic() + _GRACE_S

    def checkpoint(self) -> Any:
        """Stops, and returns what submitit puts into the queue again; it calls this on preemption and on timeout."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self._child is not None:
            self._wait(self._child)
        return DelayedSubmission(Job(self.run, self.environment, self.program))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles a job without its event and process, which belong to this machine."""
        return type(self), (self.run, self.environment, self.program)

    def commands(self) -> list[list[str]]:
        """Arguments of ``theia`` for the training and for the test."""
        options = ["--config", str(self.run.config_file), "--ckpt_path"]
        test = ["test", *options, CHECKPOINT, "--compare_untrained", "false"]
        # A test replaces its report, so that all scorers of the earlier one have to run again, but none by other data.
        report = self.run.report or {"scorers": []}
        plain = {name.partition("@")[0]: name for name in report["scorers"]}
        again = {name: full for name, full in plain.items() if name in scorer_names()}
        scorers = again | {name.partition("@")[0]: name for name in self.run.scorers}
        chosen = ["--scorers", ",".join(scorers.values())] if scorers else []
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
                # Ctrl-C must reach this process alone, which then stops its children.
                start_new_session=True,
            )
        if self._stop.is_set():  # it was set while the child started
            self.stop()
        return self._wait(self._child)

    def _wait(self, child: "subprocess.Popen[bytes]") -> int:
        # Not child.wait(): it holds a lock, for which a signal handler in the same thread would wait forever.
        while (code := child.poll()) is None:
            if time.monotonic() > self._kill_at:
                child.kill()
            time.sleep(_POLL_OF_PROCESSES_S)
        return code


def _environment() -> dict[str, str]:
    """This process's environment without SLURM's variables, which would have Lightning expect one task per device."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


Ended = Callable[[Job, int], None]  # a job and its exit status


def run_locally(jobs: Sequence[Job], parallel: int, watch: Watch, ended: Ended) -> None:
    """Carries out jobs on this machine; Ctrl-C stops those that are running.

    Args:
        jobs: Jobs to carry out.
        parallel: Number of jobs at a time. They share the GPUs and cores evenly.
        watch: Called about every second.
        ended: Called for each job that has ended.
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

    submitit puts a job that is preempted or out of time into the queue again, after it has written its checkpoint.

    Args:
        jobs: Jobs to carry out.
        parallel: Number of jobs of the array that may run at a time.
        watch: Called about every second.
        ended: Called for each job that has ended.
        folder: Folder for submitit's files.
        options: Options of ``submitit.AutoExecutor.update_parameters``, such as partition, time and GPUs.
        cluster: Kind of submitit's executor; ``"debug"`` and ``"local"`` need no SLURM.

    Raises:
        ConfigError: If submitit refuses the options.
    """
    import submitit

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
    """Ignores further signals, which would only interrupt the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _submitted(job: Job) -> Path:
    """A file with the id of the SLURM job that was submitted for a run."""
    return job.run.folder / "slurm_job"


def _still_queued(job: Job, folder: Path) -> Any:
    """Handle of the SLURM job that an earlier sweep submitted for the same run, if it has not ended."""
    import submitit

    if not _submitted(job).exists():
        return None
    handle: Any = submitit.SlurmJob(folder, _submitted(job).read_text())
    queued = {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "SUSPENDED", "RESIZING"}
    if time.time() - _submitted(job).stat().st_mtime < _UNKNOWN_S:
        queued.add("UNKNOWN")
    return handle if handle.state in queued else None


def _status(handle: Any, job: Job) -> int:
    try:
        return int(handle.result())
    except Exception as error:
        # Whatever it was, a failed node, a limit or an import, belongs in the log of the run.
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
    """Environment variables for each of several jobs at a time: its share of the GPUs and cores."""
    import torch  # takes seconds, and only this needs it

    if parallel == 1:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(index) for index in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    shares = []
    for slot in range(parallel):
        share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, core_count() // parallel)))}
        if gpus:
            share["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot::parallel]) or gpus[slot % len(gpus)]
        shares.append(share)
    return shares
