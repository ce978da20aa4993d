"""Checks a checkpoint against the model that is about to load it, before any work is lost."""

from pathlib import Path
from typing import Any

import torch

from theia.errors import CheckpointError
from theia.models import older
from theia.models.architecture import Architecture
from theia.models.scaler import POWER

# Options that decide what a training's checkpoint holds beside its model, with what runs did before they were there.
_BESIDE = {
    "normalizer": "std", "normalizer_exponent": POWER, "balance": "fixed", "patch_dropout": 0.0, "cls_loss": "same",
}  # fmt: skip


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Loads a training checkpoint onto the CPU without running any code from it.

    Args:
        path: A ``.ckpt`` file of ``theia fit``.
        mmap: Whether to read tensors only when they are used, which is faster where only other entries are needed.

    Raises:
        CheckpointError: If the file is missing, damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        there = ", ".join(str(other) for other in sorted(path.parent.glob("*.ckpt"))) or "no checkpoint"
        raise CheckpointError(f"No checkpoint at {path}. In that folder: {there}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        # A damaged pickle can raise any exception.
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}): it is truncated, damaged or of another "
            "kind. Use another checkpoint of that run."
        ) from error
    if not isinstance(checkpoint, dict) or "hyper_parameters" not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint that 'theia fit' wrote.")
    return older.checkpoint(checkpoint)


def check_architecture(path: str | Path, checkpoint: dict[str, Any], options: dict[str, Any]) -> None:
    """Checks that a checkpoint's model has the architecture and the targets that this run's options ask for.

    Args:
        path: Path of the checkpoint, for the message.
        checkpoint: Content of the checkpoint, from :func:`read_checkpoint`.
        options: Options of this run's model.

    Raises:
        CheckpointError: If an option differs; the message names each one.
    """
    theirs, ours = (
        Architecture.of(given).as_dict()
        | {name: given.get(name, before) for name, before in _BESIDE.items()}
        | ({} if given.get("normalizer") == "power" else {"normalizer_exponent": None})
        for given in (checkpoint["hyper_parameters"], options)
    )
    different = [name for name in ours if theirs[name] != ours[name]]
    if different:
        lines = "; ".join(f"{name} is {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in different)
        raise CheckpointError(
            f"The checkpoint {path} was trained with other options: {lines}. "
            "Use the config that it was trained with (config.yaml in its run folder) and a store with its teachers."
        )
