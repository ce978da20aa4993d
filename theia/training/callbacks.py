"""Callbacks that show progress, throughput, time left and feature pictures during training."""

import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from theia.training.distillation import Distillation, shows_logged
from theia.types import FeatureBatch
from theia.utils.files import replacing
from theia.utils.pictures import ColourBasis, board, colour_basis, is_constant, norm_map, pca_colours
from theia.utils.progress import Progress


class Throughput(L.Callback):
    """Logs how fast a training is, and what it has cost.

    ``train/images_per_s`` is over all processes and timed between logged steps, as are the minutes left.
    ``train/cpu_s`` are the CPU-seconds that the first process has spent in all its training steps, those before a
    resume included and validations not: other work on the machine hardly changes them.
    """

    def __init__(self) -> None:
        self._images = 0
        self._first_step = 0
        self._since: float | None = None
        self._spent = 0.0
        self._spent_since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to count what is spent."""
        self._spent_since = time.process_time()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Goes on counting."""
        self._spent_since = time.process_time()

    def state_dict(self) -> dict[str, Any]:
        """CPU-seconds until now, for a run that goes on."""
        return {"cpu_s": self._spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what the run had spent before."""
        self._spent = state_dict["cpu_s"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: FeatureBatch, batch_idx: int
    ) -> None:
        """Logs on the steps that log anyway; the measured time includes the wait for data."""
        now, step, spent = time.perf_counter(), trainer.global_step, time.process_time()
        self._spent, self._spent_since = self._spent + spent - self._spent_since, spent
        logs = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if logs:
            pl_module.log("train/cpu_s", self._spent, rank_zero_only=True)
        if self._since is None:  # the first step of all or after a validation is not typical
            self._images, self._first_step, self._since = 0, step, now
            return
        self._images += len(batch.images) * trainer.world_size
        if step == self._first_step or not logs:
            return
        seconds = now - self._since
        minutes_left = (trainer.estimated_stepping_batches - step) * seconds / (step - self._first_step) / 60
        shown = shows_logged(trainer)
        pl_module.log("train/images_per_s", self._images / seconds, prog_bar=shown, rank_zero_only=True)
        pl_module.log("minutes_left", minutes_left, prog_bar=shown, logger=False, rank_zero_only=True)
        self._images, self._first_step, self._since = 0, step, now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self._since = None


class TrainingProgress(ProgressBar):
    """Shows how far a training or a test is: a bar on a terminal, elsewhere a line every half minute.

    Lightning's own shows nothing in a log file before the end of the training, and is wider than a usual terminal.
    """

    reads_on_logged_steps = True

    def __init__(self) -> None:
        super().__init__()
        self._training: Progress | None = None
        self._scoring: Progress | None = None
        self._shown = True
        self._step = 0

    def disable(self) -> None:
        """Shows nothing, as in all processes but the first."""
        self._shown = False

    def enable(self) -> None:
        """Shows progress, as by default."""
        self._shown = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins with the steps that were taken before the run was resumed."""
        steps, done = trainer.estimated_stepping_batches, trainer.global_step
        self._training = Progress(self._epoch(trainer), steps, self._shown, "step", done)
        self._step = done

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: FeatureBatch, batch_idx: int
    ) -> None:
        """Counts a step, and shows what was logged at it."""
        if self._training is None:
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            figures = trainer.callback_metrics
            shown = (("train/loss", "loss {:.4g}"), ("train/images_per_s", "{:.3g} img/s"))
            note = ", ".join(text.format(float(figures[name])) for name, text in shown if name in figures)
            self._training.describe(self._epoch(trainer), note)
        self._training.advance(trainer.global_step - self._step)
        self._step = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to count the batches of a validation."""
        if not trainer.sanity_checking:
            self._scoring = Progress("validation", sum(trainer.num_val_batches), self._shown, "batch")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to count the batches of a test."""
        self._scoring = Progress("test", sum(trainer.num_test_batches), self._shown, "batch")

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch."""
        if self._scoring is not None:
            self._scoring.advance(1)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch."""
        self.on_validation_batch_end()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the loss over the held-out images."""
        if self._scoring is not None and "val/loss" in trainer.callback_metrics:
            self._scoring.describe("validation", f"loss {float(trainer.callback_metrics['val/loss']):.4g}")
        self._end_scoring()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the count."""
        self._end_scoring()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the count, with a last line."""
        if self._training is not None:
            self._training.close()
        self._training = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Takes the bars away, so that the message of the error stands on a line of its own."""
        for progress in (self._scoring, self._training):
            if progress is not None:
                progress.close(finished=False)
        self._scoring = self._training = None

    def _end_scoring(self) -> None:
        if self._scoring is not None:
            self._scoring.close()
        self._scoring = None

    @staticmethod
    def _epoch(trainer: L.Trainer) -> str:
        of = f"/{trainer.max_epochs}" if trainer.max_epochs not in (None, -1) else ""
        return f"epoch {trainer.current_epoch + 1}{of}"


class FeaturePictures(L.Callback):
    """Shows teachers' features and the student's translations side by side, for a few held-out images.

    Each validation sends a board of pictures to TensorBoard; a test writes the board to a file. For each image it shows
    the image, each teacher's features beside the student's translation, and the norms of the student's patch tokens.
    Features are shown as PCA colours. The PCA basis comes from the teacher's features of these images, so it stays the
    same over the run.

    Args:
        path: PNG file that a test writes; ``None`` to write no file.
        images: Number of held-out images to show, from the first on.
    """

    def __init__(self, path: Path | None = None, images: int = 4) -> None:
        self.path = path
        self.images = images
        self._shown: Tensor | None = None
        self._targets: dict[str, Tensor] = {}
        self._bases: dict[str, ColourBasis] = {}

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: FeatureBatch, *args: Any
    ) -> None:
        """Keeps a copy of the first images and their features: the batch itself is soon overwritten."""
        if self._shown is None and trainer.is_global_zero and isinstance(pl_module, Distillation):
            self._keep(pl_module, batch)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Keeps a copy of the first images of a test and their features."""
        self.on_validation_batch_end(*args, **kwargs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sends the board to TensorBoard."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self._shown is not None and not trainer.sanity_checking:
                board = self._board(trainer, pl_module, self._shown)
                # The number of the step just taken, as in the rows of metrics for this validation.
                logger.experiment.add_figure("val/features", board, trainer.global_step - 1)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the board to the file."""
        if self.path is not None and self._shown is not None:
            with replacing(self.path) as temporary:
                self._board(trainer, pl_module, self._shown).savefig(temporary, format="png")

    def _keep(self, module: Distillation, batch: FeatureBatch) -> None:
        count = min(self.images, len(batch.images))
        for name in module.distiller.teachers:
            scale = batch.scales.get(name)
            patches = batch.patches[name][:count]
            target = module.distiller.normalize(name, patches, None if scale is None else scale[:count])
            self._targets[name] = target.cpu()
            self._bases[name] = colour_basis(target.flatten(0, 1).cpu().numpy())
        self._shown = batch.images[:count].clone()

    def _board(self, trainer: L.Trainer, module: L.LightningModule, images: Tensor) -> Any:
        # Pictures are kept of this module only.
        distiller = cast(Distillation, module).distiller
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            tokens, targets, _ = distiller(images)
            predictions = distiller.per_channel(targets)
        columns = [("image", list(images.permute(0, 2, 3, 1).cpu().numpy()))]
        for name, target in self._targets.items():
            rows, width = module.hparams["teachers"][name]["grid_hw"]
            for heading, features in ((name, target), (f"{name}, student", predictions[name].float().cpu())):
                pictures = [pca_colours(patches, (rows, width), self._bases[name]) for patches in features.numpy()]
                columns.append((heading, pictures))
        patches = tokens.patches.float().cpu().numpy()
        constant = all(is_constant(np.linalg.norm(one, axis=1)) for one in patches)
        norms = [norm_map(one, tokens.grid) for one in patches]
        return board([*columns, ("student's norms" + " (constant)" * constant, norms)])
