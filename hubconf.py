"""Entry point of ``torch.hub``: ``torch.hub.load(REPOSITORY, "encoder", WEIGHTS)``."""

import os
from typing import Any

from theia.encoder.encoder import Encoder
from theia.encoder.load import load

dependencies = ["torch", "timm", "safetensors", "huggingface_hub"]


def encoder(weights: str | os.PathLike[str], **options: Any) -> Encoder:
    """A trained encoder.

    Args:
        weights: What :func:`theia.load` takes: a folder that ``theia export`` wrote, a checkpoint, a folder of a
            published model, or its id on the Hugging Face hub.
        options: Of :func:`theia.load`: ``device``, ``dtype``, ``compile``, ``revision``.
    """
    return load(weights, **options)
