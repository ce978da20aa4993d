"""Lightning callbacks by which a test has a training end or stand still, for ``--trainer.callbacks``."""

import os
import select
import signal
from pathlib import Path
from typing import Any

import lightning as L
import psutil


class Stopping(L.Callback):
    """Ends a training as its last step would.

    Args:
        file: As soon as it is there.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or self.file.exists()


class Standing(L.Callback):
    """Has a training stand still before a step, until a signal comes that it answers, or it is let go.

    Args:
        folder: Holds a file named after the step as long as trainings are to stand still before it. One that does
            leaves a file named after its process.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        held = self.folder / f"step_{trainer.global_step}"
        if not held.exists():
            return
        signalled, tell = os.pipe()
        os.set_blocking(tell, False)
        before = signal.set_wakeup_fd(tell)
        try:
            (self.folder / f"pid_{os.getpid()}").touch()
            while held.exists() and not select.select([signalled], [], [], 0.02)[0]:
                pass
        finally:
            signal.set_wakeup_fd(before)
            os.close(signalled)
            os.close(tell)


def hold(folder: Path, step: int) -> Path:
    """Has trainings stand still before a step as long as the file is there that this gives."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step}"
    path.touch()
    return path


def standing(folder: Path) -> list[psutil.Process]:
    """Trainings that have come to stand still, and live."""
    numbers = [int(path.name.removeprefix("pid_")) for path in folder.glob("pid_*")]
    return [psutil.Process(number) for number in numbers if psutil.pid_exists(number)]
