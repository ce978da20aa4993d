"""What an encoder takes for images, and what it says to everything else."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theia.errors import ImageError, ShapeError

_WANTED = "An encoder takes uint8 from 0 to 255 or floating point from 0 to 1"


def to_channels_first(images: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """Brings a batch of images into the layout of the student, without touching its values.

    Args:
        images: RGB, ``(B, H, W, 3)`` or ``(B, 3, H, W)``; uint8 from 0 to 255, or floating point from 0 to 1.
        device: Where the student is.

    Returns:
        The same values, shape ``(B, 3, H, W)``, on the device.

    Raises:
        ShapeError: If it is no batch of RGB images.
        ImageError: If type or range is another. Looking at the range of floating-point images on a GPU waits for the
            GPU; uint8 needs no look.
    """
    batch = _from_numpy(images) if isinstance(images, np.ndarray) else images
    if not isinstance(batch, Tensor):
        raise ShapeError(f"Images of type {type(images).__name__}; an encoder takes a torch tensor or a numpy array.")
    shape = tuple(batch.shape)
    if batch.ndim != 4 or (shape[1] == 3) == (shape[3] == 3):
        raise ShapeError(
            f"Images of shape {shape}; an encoder takes a batch of RGB images, (B, H, W, 3) or (B, 3, H, W)."
            + _hint(shape)
        )
    if batch.dtype != torch.uint8 and not batch.is_floating_point():
        raise ImageError(f"Images of type {batch.dtype}. {_WANTED}.")
    batch = batch.to(device)
    if batch.is_floating_point() and batch.numel() and not torch.compiler.is_compiling():
        _check_range(batch)
    return batch if shape[1] == 3 else batch.permute(0, 3, 1, 2)


def _from_numpy(images: NDArray[Any]) -> Tensor:
    if images.dtype.kind not in "uf" or images.dtype.itemsize > 8:
        raise ImageError(f"Images of type {images.dtype}. {_WANTED}.")
    native = images.astype(images.dtype.newbyteorder("="), copy=False)
    # torch takes no negative strides, as of BGR turned to RGB, and warns of memory that it may not write to.
    usable = native.flags.writeable and min(native.strides, default=0) >= 0
    return torch.from_numpy(native if usable else native.copy())


def _check_range(batch: Tensor) -> None:
    least, greatest = (float(value) for value in torch.aminmax(batch))
    # Resizing with a cubic overshoots by a few hundredths only where nobody clamps; that too is for the caller to see.
    if not (least >= 0 and greatest <= 1):
        if least < 0:
            guess = "they look normalised already; the encoder does that itself"
        elif greatest <= 255:
            guess = "they look like 0 to 255; divide by 255 or give uint8"
        else:
            guess = "they are no images"
        if least != least or greatest != greatest:
            guess = "some values are not numbers"
        raise ImageError(f"Floating-point images from {least:g} to {greatest:g}: {guess}. {_WANTED}.")


def _hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 and 3 in (shape[0], shape[2]):
        return " For one image, add a dimension: images[None]."
    if len(shape) == 4 and 4 in (shape[1], shape[3]):
        return " Drop the fourth channel."
    if len(shape) == 4 and 1 in (shape[1], shape[3]):
        return " Repeat the grey channel three times."
    return ""
