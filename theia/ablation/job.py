"""What a launcher carries out: ``theia fit``, then ``theia test``, each a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from theia.ablation.lock import lock
from theia.ablation.run import CHECKPOINT, Run
from theia.scoring import registry
from theia.utils.files import write_whole

# How long a training may take to write its checkpoint when it is asked to stop.
_GRACE_S = 60.0
_POLL_S = 0.5


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
            time.sleep(_POLL_S)
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
        earlier = [name for name in report["scorers"] if name in registry.names()]
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
            log.write(f"$ theia {' '.join(arguments)}\n".encode())
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
            time.sleep(_POLL_S)
        return code


def _environment() -> dict[str, str]:
    """Without SLURM's variables: Lightning would take the job for one that SLURM starts once for each device."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
