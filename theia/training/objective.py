"""From a batch to the loss of each teacher, compiled or not: the part of a training step that is pure torch."""

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
        distiller: Student, translators and the normalisation of the features.
        loss: ``(prediction, target) -> scalar`` of normalised features, both ``(B, N, C)``, or ``(B, C)`` for CLS.
    """

    def __init__(self, distiller: Distiller, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.distiller = distiller
        self.loss = loss
        self._translate: Callable[..., Any] = distiller
        self._compare: Callable[..., dict[str, Tensor]] = self._losses

    def compile(self, device: torch.device) -> None:
        """Compiles what is faster for it, at the first batch: on a GPU everything, on a CPU the loss.

        All batches should be of one size: each other size is compiled anew.

        Args:
            device: Where the batches will be.

        Raises:
            ConfigError: If torch.compile does not work here; says what is missing.
        """
        _check_compiler(device)
        # In one pass over each raw feature, which is never normalised in memory.
        self._compare = torch.compile(self._losses, dynamic=False)
        # On a CPU nearly all of the rest is matrix products, and those are no faster for it.
        if device.type == "cuda":
            self._translate = torch.compile(self.distiller.forward, dynamic=False)

    def __call__(self, batch: FeatureBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and translations of a batch.

        Returns:
            By teacher, its loss, a scalar (with a distilled CLS token: the mean of both losses); by teacher, predicted
            normalised patch tokens ``(B, N, C)``.
        """
        _, predictions, cls_predictions = self._translate(batch.images)
        return self.compare(predictions, cls_predictions, batch), predictions

    def compare(
        self, predictions: dict[str, Tensor], cls_predictions: dict[str, Tensor], batch: FeatureBatch
    ) -> dict[str, Tensor]:
        """The losses alone.

        Args:
            predictions: By teacher, predicted normalised patch tokens ``(B, N, C)``.
            cls_predictions: By teacher whose CLS token is distilled, ``(B, C)``.
            batch: Holds the features.
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
    # Which error depends on what is missing: a compiler, headers, Triton, room for the cache.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"torch.compile does not work here: {reason} Install a C++ compiler (on a GPU, Triton too), or train "
            "without it: --model.compile false."
        ) from error
