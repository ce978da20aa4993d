"""Writes the checkpoints of a run, ``last.ckpt`` to resume from and ``best.ckpt``; a kill never damages them.

Training goes on while a checkpoint is written: that happens in a thread, from a snapshot, and one at a time.
``last.ckpt`` is written first and ``best.ckpt`` is then a copy of it. Each holds its own held-out loss, so that no file
repeats what another file may contradict. None holds a path, so a run folder may be moved or copied.
"""

import logging
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from theia.errors import CheckpointError, ConfigError
from theia.models.checkpoint import read_checkpoint
from theia.training.background import Background, LaterCheckpoints
from theia.training.records import RESUME, MetricsCSV, Rows
from theia.utils.files import replacing

logger = logging.getLogger(__name__)

LAST, BEST = "last.ckpt", "best.ckpt"
MONITORED = "val/loss"


class StopRequested(Exception):
    """A signal asked the run to stop, and the run has written its checkpoint.

    Attributes:
        number: Number of the signal.
        step: Number of optimisation steps taken.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(number, step)
        self.number, self.step = number, step


class DurableCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file beside its target, then renames it.

    Lightning writes into the machine's temporary folder and copies from there if that is on another file system. A kill
    during that copy would lose both the new checkpoint and the old one.

    Args:
        renamed: Today's names of checkpoint entries, by the names that earlier versions gave them.
    """

    def __init__(self, renamed: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._renamed = dict(renamed or {})

    def load_checkpoint(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Reads a checkpoint of this or of an earlier version; see Lightning."""
        checkpoint = super().load_checkpoint(*args, **options)
        return {self._renamed.get(name, name): value for name, value in checkpoint.items()}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Writes a checkpoint whole or not at all.

        Raises:
            FileError: If the checkpoint cannot be written, for instance on a full disk.
        """
        with replacing(Path(path), again=RESUME) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch reports that its archive is cut short, and hides the reason: a full disk, or a second Ctrl-C.
                if isinstance(error.__context__, OSError | KeyboardInterrupt):
                    raise error.__context__ from error
                raise


class Checkpoints(Checkpoint):
    """Writes ``last.ckpt`` every few steps and minutes, after a validation, at the end, and when a signal asks to stop.

    If a validation is due at the same step, the checkpoint is written after the validation, because Lightning does not
    repeat a validation that was killed. After a validation with the lowest loss so far, the checkpoint is also copied
    to ``best.ckpt``.

    Ctrl-C ends the run after the current step or validation and writes a checkpoint. So do SIGTERM and SIGUSR1, the
    signals by which a scheduler announces the end of a job. A second Ctrl-C ends the run at once. After SIGUSR1 a SLURM
    job is put back into the queue.

    The end of the training, however it comes, waits for the checkpoint that is being written. If one could not be
    written, the next step raises the error.

    Args:
        folder: Folder of the run's checkpoints.
        every_n_steps: Optimisation steps between two checkpoints, which with those that a write takes is the most that
            a killed run loses.
        state: Further plain values to keep in every checkpoint, by name.
        every_minutes: Minutes after which a checkpoint is due even if fewer steps were taken. Several processes look at
            the clock on the steps that log.
    """

    def __init__(
        self,
        folder: str | Path,
        every_n_steps: int,
        state: Mapping[str, Any] | None = None,
        every_minutes: float = math.inf,
    ) -> None:
        self.last, self.best = Path(folder) / LAST, Path(folder) / BEST
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self._background = Background()
        self._state = dict(state or {})
        self._loss: float | None = None  # held-out loss of the current weights, once they are validated
        self._lowest = math.inf
        self._step = self._saved_step = 0
        self._saved_at = time.monotonic()
        self._signal: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The values that every checkpoint keeps, with the held-out loss of its weights."""
        return {**self._state, MONITORED: self._loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the held-out loss of the checkpoint that the run resumes from."""
        self._loss = state[MONITORED]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the step at which the run begins and the lowest loss so far, and starts to handle signals."""
        _check_accumulation(trainer)
        self._step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        source = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
        own = source is not None and source.resolve().parent == self.last.parent.resolve()
        if trainer.is_global_zero:
            self._lowest = lowest_loss(self.best, trainer.global_step)
            # The run may have been killed between writing last.ckpt and best.ckpt.
            if source is not None and own and self._is_lowest():
                self._keep(source)
        if source is not None and not own:
            # A branch of another run: killed before its next checkpoint, it resumes from here and not from scratch.
            self._loss = None  # the old value is from a validation of the other run
            self._save(trainer)
            self._background.wait()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._note)  # Lightning restores the earlier handlers
            # Lightning would ask all processes in every step whether its own handler has seen SIGTERM, and wait for the
            # device to hear the answer. That handler is not in place, and _stops asks on the steps that log.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Saves a checkpoint after an optimisation step if one is due, and stops if a signal asked for it."""
        if trainer.global_step == self._step:
            return  # gradients are being accumulated
        self._step, self._loss = trainer.global_step, None
        self._background.check()
        fetcher = trainer.fit_loop._data_fetcher
        # Lightning has no public way to ask whether a validation is due.
        if fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            return
        stops = self._stops(trainer)
        if stops or trainer.global_step % self.every_n_steps == 0 or self._is_time(trainer):
            # Writes the row of this step before the checkpoint; Lightning would write it afterwards. Loggers that a
            # user adds would write the row twice.
            if all(isinstance(records, Rows) for records in trainer.loggers):
                trainer._logger_connector.update_train_step_metrics()
            self._save(trainer)
        if stops:
            self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves a checkpoint after a validation, together with the validation loss."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        loss = trainer.callback_metrics.get(MONITORED)
        self._loss = None if loss is None else float(loss)
        self._save(trainer, best=trainer.is_global_zero and self._is_lowest())
        if self._stops(trainer, now=True):
            self._stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last checkpoint of the training, if the last step has none yet, and waits until it is written."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)
        self._background.wait()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Waits for the checkpoint that is being written. The error that ends the run stays the one that is raised."""
        try:
            self._background.wait()
        except Exception as error:
            logger.error("The last checkpoint was not written either: %s", error)

    def _save(self, trainer: L.Trainer, best: bool = False) -> None:
        for records in trainer.loggers:
            records.save()
            if isinstance(records, MetricsCSV):
                records.sync()
        strategy = trainer.strategy
        direct = strategy.checkpoint_io
        strategy.checkpoint_io = LaterCheckpoints(
            self._background, direct.save_checkpoint, partial(self._keep, self.last) if best else _nothing
        )
        try:
            trainer.save_checkpoint(self.last, weights_only=False)
        finally:
            strategy.checkpoint_io = direct
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _is_time(self, trainer: L.Trainer) -> bool:
        """Whether so much time has passed that a checkpoint is due."""
        due = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return self._any_process(trainer, due)

    def _is_lowest(self) -> bool:
        """Whether the held-out loss of the current weights is the lowest so far; from then on, it is."""
        if self._loss is None or not self._loss < self._lowest:
            return False
        self._lowest = self._loss
        return True

    def _keep(self, checkpoint: Path) -> None:
        with replacing(self.best, again=RESUME) as temporary:
            shutil.copyfile(checkpoint, temporary)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            logger.info("Interrupted: stopping after this step, or validation. Ctrl-C again stops at once.")
        self._signal = number

    def _stops(self, trainer: L.Trainer, now: bool = False) -> bool:
        """Whether any process was asked to stop."""
        return self._any_process(trainer, self._signal is not None, now)

    def _any_process(self, trainer: L.Trainer, says: bool, now: bool = False) -> bool:
        """Whether one of the processes says yes."""
        if trainer.world_size == 1:
            return says
        # Several processes agree on the steps that log, when they wait for the device anyway.
        if not now and trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return False
        return trainer.strategy.reduce_boolean_decision(says, all=False)

    def _stop(self, trainer: L.Trainer) -> None:
        self._background.wait()
        if trainer.strategy.reduce_boolean_decision(self._signal == signal.SIGUSR1, all=False):
            requeue()
        trainer.strategy.barrier()
        raise StopRequested(self._signal or signal.SIGTERM, trainer.global_step)


def lowest_loss(path: Path, steps: int) -> float:
    """Reads the held-out loss that ``best.ckpt`` holds.

    Args:
        path: Path of ``best.ckpt``, which may be missing.
        steps: Number of steps that the run has taken. A checkpoint of a later step is ignored, as it will be repeated.

    Returns:
        The held-out loss, or infinity if there is no such checkpoint.
    """
    if not path.is_file():
        return math.inf
    try:
        checkpoint = read_checkpoint(path, mmap=True)
    except CheckpointError as error:
        logger.warning("%s The next validation replaces it.", error)
        return math.inf
    if checkpoint["global_step"] > steps:
        return math.inf
    for name, state in checkpoint.get("callbacks", {}).items():
        if name == Checkpoints.__qualname__:
            return math.inf if state[MONITORED] is None else float(state[MONITORED])
        if name.startswith("ModelCheckpoint"):  # a run of an earlier version
            return float(state["best_model_score"])
    return math.inf


def _check_accumulation(trainer: L.Trainer) -> None:
    """Refuses validations in the middle of a step, because a checkpoint cannot hold partly summed gradients.

    Raises:
        ConfigError: If the interval of validations does not fit; the message names the options.
    """
    summed, interval = trainer.accumulate_grad_batches, trainer.val_check_batch
    if summed == 1 or not isinstance(interval, int) or interval == trainer.num_training_batches:
        return  # the last batch of an epoch always ends a step
    # If check_val_every_n_epoch is None, Lightning counts batches across epochs.
    aligned = trainer.check_val_every_n_epoch is not None or trainer.num_training_batches % summed == 0
    if interval % summed == 0 and aligned:
        return
    raise ConfigError(
        f"Validations every {interval} batches would come in the midst of steps of {summed} batches "
        f"(trainer.accumulate_grad_batches). Set trainer.val_check_interval to a multiple of {summed}."
    )


def _nothing() -> None:
    """Stands in for what is not to be done."""


@rank_zero_only
def requeue() -> None:
    """Puts the SLURM job back into the queue; it resumes with ``--ckpt_path last``."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning("SLURM did not take job %s into the queue again: %s. Submit it anew.", job, str(reason).strip())
    else:
        logger.info("SLURM job %s is in the queue again.", job)
