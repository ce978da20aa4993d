"""What happens beside training: checkpoints to resume from, throughput, and feature pictures."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from theia.pictures import ColourBasis, board, colour_basis, norm_map, pca_colours
from theia.training.distillation import Distillation
from theia.types import FeatureBatch


class LastCheckpoint(L.Callback):
    """Writes ``last.ckpt``, the point from which a run resumes, every so many steps and at the end.

    Args:
        folder: Folder of the run's checkpoints.
        every_n_steps: Optimisation steps between two writes: the most that a killed run loses.
    """

    def __init__(self, folder: str | Path, every_n_steps: int) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._saved_step = 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Saves between two optimisation steps."""
        step = trainer.global_step
        if step != self._saved_step and step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end of training."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes where a resumed run begins."""
        self._saved_step = trainer.global_step

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)  # a temporary file, then a rename
        self._saved_step = trainer.global_step


class Throughput(L.Callback):
    """Logs ``train/images_per_s`` over all processes and shows the minutes left, by the time between logged steps."""

    def __init__(self) -> None:
        self._images = 0
        self._first_step = 0
        self._since: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Starts the clock at the first step and after a validation."""
        if self._since is None:
            self._images, self._first_step, self._since = 0, trainer.global_step, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: FeatureBatch, batch_idx: int
    ) -> None:
        """Logs on the steps that log anyway."""
        self._images += len(batch.images) * trainer.world_size
        steps = trainer.global_step - self._first_step
        if self._since is None or not steps or (batch_idx + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        seconds = time.perf_counter() - self._since
        steps_left = trainer.estimated_stepping_batches - trainer.global_step
        pl_module.log("train/images_per_s", self._images / seconds, prog_bar=True, rank_zero_only=True)
        pl_module.log(
            "minutes_left", steps_left * seconds / steps / 60, prog_bar=True, logger=False, rank_zero_only=True
        )
        self._since = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self._since = None


class FeaturePictures(L.Callback):
    """Shows what the student has learned: for a few held-out images, teachers and translations side by side.

    At each validation a board goes to TensorBoard; after a test it is written to ``path``. Per image: the image; per
    teacher its features and the student's translation of them, as PCA colours in one basis, which is that of the
    teacher's features of these images and so stays the same over the run; the norms of the student's own tokens.

    Args:
        path: PNG file that a test writes.
        images: How many of the first held-out images to show.
    """

    def __init__(self, path: str | Path, images: int = 4) -> None:
        self.path = Path(path)
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
        """The same in a test."""
        self.on_validation_batch_end(*args, **kwargs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sends the board to TensorBoard."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self._shown is not None and not trainer.sanity_checking:
                board = self._board(trainer, pl_module, self._shown)
                logger.experiment.add_figure("val/features", board, trainer.global_step)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the board to the run folder."""
        if self._shown is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._board(trainer, pl_module, self._shown).savefig(self.path)

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
        if not isinstance(module, Distillation):
            raise TypeError(f"feature pictures of a {type(module).__name__}")
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            tokens, predictions, _ = module.distiller(images)
        columns = [("image", list(images.permute(0, 2, 3, 1).cpu().numpy()))]
        for name, target in self._targets.items():
            rows, width = module.hparams["teachers"][name]["grid_hw"]
            for heading, features in ((name, target), (f"{name}, student", predictions[name].float().cpu())):
                pictures = [pca_colours(patches, (rows, width), self._bases[name]) for patches in features.numpy()]
                columns.append((heading, pictures))
        norms = [norm_map(patches, tokens.grid_hw) for patches in tokens.patches.float().cpu().numpy()]
        return board([*columns, ("student's norms", norms)])
