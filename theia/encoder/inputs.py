"""What an encoder takes for images and for lists, and what it says to everything else."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theia.errors import ImageError, ShapeError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
        ImageError: If type or range is another. The range of uint8 needs no look; that of floating-point images is
            looked at in plain calls, which on a GPU waits for the GPU, and left out where :func:`_has_values` says no.
    """
    batch = _from_numpy(images) if isinstance(images, np.ndarray) else images
    if not isinstance(batch, Tensor):
        raise ShapeError(
            f"Images of type {type(images).__name__}; an encoder takes a batch in a torch tensor or a numpy array. "
            "A list of pictures makes one: numpy.stack([numpy.asarray(picture) for picture in pictures])."
        )
    shape = tuple(batch.shape)
    # Decided one by one: a compiled graph for any size cannot compare two comparisons.
    of_colours = [axis for axis in (1, 3) if batch.ndim == 4 and shape[axis] == 3]
    if len(of_colours) != 1:
        raise ShapeError(
            f"Images of shape {shape}; an encoder takes a batch of RGB images, (B, H, W, 3) or (B, 3, H, W)."
            + _hint(shape)
        )
    if batch.dtype not in (torch.uint8, *FLOATS):
        raise ImageError(f"Images of type {batch.dtype}. {_WANTED}, of 16, 32 or 64 bits.")
    batch = batch.to(device)
    if batch.dtype != torch.uint8 and _has_values(batch) and batch.numel():
        _check_range(batch)
    return batch if of_colours == [1] else batch.permute(0, 3, 1, 2)


def one_or_several(values: Any) -> list[Any]:
    """A list of what was given: a single name or number is one, anything else is gone through once."""
    # An array or tensor of no dimension says that it is iterable, too.
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        return [values]
    return list(values)


def _has_values(batch: Tensor) -> bool:
    """Whether this is a plain call with numbers to look at.

    Not so in what is compiled, exported, traced or recorded once for many images, under ``torch.func``, and for fake
    and meta tensors: Python cannot decide by a value there, or would decide once and for all.
    """
    return not (
        torch.compiler.is_compiling()
        or batch.is_meta
        or (batch.is_cuda and torch.cuda.is_current_stream_capturing())
        # torch has no public questions for these: torch.jit.trace, transforms such as vmap, modes such as make_fx.
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or type(batch).__torch_dispatch__ is not Tensor.__torch_dispatch__  # fake and wrapped ones
    )


def _from_numpy(images: NDArray[Any]) -> Tensor:
    if images.dtype.kind not in "uf" or images.dtype.itemsize > 8:
        raise ImageError(f"Images of type {images.dtype}. {_WANTED}, of 16, 32 or 64 bits.")
    native = images.astype(images.dtype.newbyteorder("="), copy=False)
    # torch takes no negative strides, as of BGR turned to RGB, and warns of memory that it may not write to.
    usable = native.flags.writeable and min(native.strides, default=0) >= 0
    return torch.from_numpy(native if usable else native.copy())


def _check_range(batch: Tensor) -> None:
    least, greatest = torch.stack(torch.aminmax(batch.detach())).tolist()  # in one go: a GPU is waited for once
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
