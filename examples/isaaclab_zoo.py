"""Theia features as an observation of IsaacLab, without a copy of IsaacLab's own loading code.

In the observation group of a task::

    from isaaclab.envs import mdp
    from isaaclab.managers import ObservationTermCfg, SceneEntityCfg

    vision = ObservationTermCfg(
        func=mdp.image_features,
        params={
            "sensor_cfg": SceneEntityCfg("tiled_camera"),
            "data_type": "rgb",
            "model_name": "theia",
            "model_zoo_cfg": {"theia": model_zoo_entry(load_encoder)},
            "inference_kwargs": {"pool": "mean"},
        },
    )

where ``load_encoder`` is a function at the top of the task's module. A path will do in its place, unless the training
script sends the configuration through Hydra: that writes every callable as ``module:name`` and looks it up again.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import theia
from theia import Encoder
from theia.errors import ImageError, ShapeError


def model_zoo_entry(
    encoder: str | os.PathLike[str] | Callable[[], Encoder], device: str = "cuda:0"
) -> dict[str, Callable[..., Any]]:
    """One entry of ``model_zoo_cfg``.

    Args:
        encoder: What :func:`theia.load` takes, or a function without arguments that gives an encoder. Nothing is
            loaded before the environment starts.
        device: For a path; IsaacLab does not pass on its own.

    Returns:
        ``model``, ``reset`` and ``inference``, as IsaacLab's ``image_features`` calls them.
    """
    if callable(encoder):
        return {"model": encoder, "reset": reset, "inference": infer}
    source: str | os.PathLike[str] = encoder

    def load() -> Encoder:
        return theia.load(source, device=device)

    return {"model": load, "reset": reset, "inference": infer}


def reset(model: Encoder, env_ids: Tensor | None = None) -> None:
    """Does nothing: an encoder remembers no earlier image.

    Args:
        model: The encoder.
        env_ids: Environments that start again; all by default.
    """


@torch.no_grad()
def infer(
    model: Encoder,
    images: Tensor,
    pool: Literal["none", "mean", "max", "cls"] = "mean",
    image_size: Sequence[int] | None = None,
    batch_size: int = 1024,
) -> Tensor:
    """Features of what each environment's camera sees.

    All but the first two arguments come from the term's ``inference_kwargs``.

    Args:
        model: The encoder.
        images: RGB, uint8, shape ``(num_envs, height, width, 3)``, on any device.
        pool: ``"mean"``, ``"max"``, ``"cls"``; or ``"none"`` for the patch tokens.
        image_size: Height and width that images are resized to, multiples of the encoder's stride; by default the
            nearest to theirs. Fewer pixels are faster: the cost goes with the number of patches.
        batch_size: Images at once, which bounds the memory.

    Returns:
        Shape ``(num_envs, C)``, or ``(num_envs, N, C)`` without pooling; on the encoder's device, without gradients.

    Raises:
        ShapeError: If the images are of a wrong shape or size.
        ImageError: If they are of a wrong type.
        ConfigError: If there is no such pooling.
    """
    if images.ndim != 4:
        raise ShapeError(f"Images of shape {tuple(images.shape)}; needed is (num_envs, height, width, 3).")
    # A configuration that went through a file has a list where there was a tuple.
    size = tuple(image_size) if image_size else model.nearest_size(*images.shape[1:3])
    device = next(model.parameters()).device
    features = []
    for start in range(0, max(len(images), 1), batch_size):
        batch = images[start : start + batch_size].to(device)
        if tuple(batch.shape[1:3]) != size:
            if batch.dtype != torch.uint8:
                raise ImageError(f"Images of type {batch.dtype} to be resized; IsaacLab's RGB cameras give uint8.")
            channels_first = batch.permute(0, 3, 1, 2).float()
            resized = F.interpolate(channels_first, size, mode="bilinear", antialias=True)
            batch = resized.round().clamp(0, 255).to(batch.dtype)
        features.append(model(batch, pool=pool))
    return torch.cat(features)
