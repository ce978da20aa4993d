"""An exponential moving average of the weights, which is validated and kept in place of the weights in training."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from theia.errors import CheckpointError

TRAINED = "trained_weights"  # entry of a checkpoint whose state_dict is the average


class WeightAverage(L.Callback):
    """Averages the weights of a module over the steps of its training.

    With the weights ``w_t`` after step ``t``, and ``w_0`` before the first one, the average is ``a_0 = w_0`` and
    ``a_t = decay * a_(t-1) + (1 - decay) * w_t``: about the mean over the last ``1 / (1 - decay)`` steps. Means and
    variances of batch norms are averaged in the same way; whole numbers, such as their counts, are not.

    Validations see the average, and a checkpoint holds it as its ``state_dict``; the weights to go on from are kept
    beside it. When the training has ended, the module holds the average. Lightning's ``WeightAveraging`` puts it there
    before the last checkpoint is written, from which a run could then not go on exactly.

    Args:
        decay: Share of the earlier average that is kept in each step, between 0 and 1.

    Source: Polyak & Juditsky, 1992; the exponential form as in AM-RADIO (Ranzinger et al., 2024).
    """

    def __init__(self, decay: float) -> None:
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._average: dict[str, Tensor] = {}
        self._weights: list[Tensor] = []  # of the module itself, in the same order; only while it is trained
        self._step = 0

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the average over, and loads the weights to go on from into the module.

        Raises:
            CheckpointError: If there are none, as in a checkpoint of a training without an average.
        """
        if TRAINED not in checkpoint:
            raise CheckpointError(
                "The checkpoint holds no average of weights to go on with. Leave out model.ema, or go on from one that "
                "was written during a training with it."
            )
        self._average = {name: checkpoint["state_dict"][name] for name in checkpoint[TRAINED]}
        pl_module.load_state_dict(checkpoint[TRAINED], strict=False)  # the other entries are loaded already

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins with the average of the checkpoint, or with the weights before the first step."""
        weights = {name: value for name, value in pl_module.state_dict().items() if value.is_floating_point()}
        self._average = {
            name: self._average[name].to(value.device) if self._average else value.clone()
            for name, value in weights.items()
        }
        self._weights = list(weights.values())
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Adds the weights to the average, once they have changed."""
        if trainer.global_step != self._step:  # else gradients are being accumulated
            self._step = trainer.global_step
            self._update(list(self._average.values()), self._weights, self._step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts the average into the module, except in the check before the training."""
        self._swap()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts the weights in training back."""
        self._swap()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes the average the weights of the checkpoint, and adds those in training."""
        if self._weights:
            checkpoint[TRAINED] = {name: checkpoint["state_dict"][name] for name in self._average}
            checkpoint["state_dict"].update(self._average)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the average in the module, after the last checkpoint was written."""
        self._swap()
        self._average, self._weights = {}, []

    def _swap(self) -> None:
        # In place, since optimiser, gradient buckets and captured graphs hold these very tensors.
        for weight, average in zip(self._weights, self._average.values() if self._weights else (), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
