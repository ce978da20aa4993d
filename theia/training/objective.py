"""The part of a training step that is pure torch: from a batch to the loss of each teacher, compiled or not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from theia.errors import ConfigError
from theia.models.distiller import Distiller
from theia.types import FeatureBatch


class Objective:
    """Translates a batch of images and compares the translations with the stored features.

    Args:
        distiller: Model with the student, the translators and the normalisation of the features.
        loss: Function ``(prediction, target) -> scalar`` of normalised features ``(B, N, C)``, or ``(B, C)`` for CLS.
    """

    def __init__(self, distiller: Distiller, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.distiller = distiller
        self.loss = loss
        self._translate: Callable[..., Any] = distiller
        self._compare: Callable[..., dict[str, Tensor]] = self._losses

    def compile(self, device: torch.device) -> None:
        """Has the first batch compile what gains speed from it: everything on a GPU, only the loss on a CPU.

        All batches should have one size, because each new size is compiled again.

        Args:
            device: Device of the batches.

        Raises:
            ConfigError: If torch.compile does not work here; the message says what is missing.
        """
        _check_compiler(device)
        # One pass over the raw features, which never stores them normalised.
        self._compare = torch.compile(self._losses, dynamic=False)
        # On a CPU nearly all of the rest is matrix products, which do not get faster when compiled.
        if device.type == "cuda":
            self._translate = torch.compile(self.distiller.forward, dynamic=False)

    def __call__(self, batch: FeatureBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Computes losses and translations of a batch.

        Returns:
            The loss of each teacher by name, a scalar (if its CLS token is distilled, the mean of the patch and the CLS
            loss); the predicted normalised patch tokens ``(B, N, C)`` by teacher name.
        """
        _, predictions, cls_predictions = self._translate(batch.images)
        return self.compare(predictions, cls_predictions, batch), predictions

    def compare(
        self, predictions: dict[str, Tensor], cls_predictions: dict[str, Tensor], batch: FeatureBatch
    ) -> dict[str, Tensor]:
        """Computes the losses from predictions that are there already.

        Args:
            predictions: Predicted normalised patch tokens ``(B, N, C)`` by teacher name.
            cls_predictions: Predicted normalised CLS tokens ``(B, C)`` by teacher name, if they are distilled.
            batch: Batch that holds the stored features.
        """
        return self._compare(predictions, cls_predictions, batch.patches, batch.scales, batch.cls)

    def _losses(
        self,
        predictions: dict[str, Tensor],
        cls_predictions: dict[str, Tensor],
        patches: dict[str, Tensor],
        scales: dict[str, Tensor],
        cls: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        losses = {}
        for name, prediction in predictions.items():
            losses[name] = self.loss(prediction, self.distiller.normalize(name, patches[name], scales.get(name)))
            if name in cls_predictions:
                cls_loss = self.loss(cls_predictions[name], self.distiller.normalize_cls(name, cls[name]))
                losses[name] = (losses[name] + cls_loss) / 2
        return losses


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(torch.cos)(torch.zeros(8, device=device))
    # The type of the error depends on what is missing: a compiler, headers, Triton or room for the cache.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"torch.compile does not work here: {reason} Install a C++ compiler (on a GPU, Triton too), or train "
            "without it: --model.compile false."
        ) from error
