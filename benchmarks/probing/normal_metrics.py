"""How far surface normals are from the truth. Every figure is of one image; a mean over images follows."""

import torch
from torch import Tensor

from benchmarks.probing.depth_metrics import masked_mean

ANGLES = (11.25, 22.5, 30.0)  # degrees


def normal_metrics(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """All figures of surface normals.

    Args:
        prediction: Any length, shape ``(B, 3, H, W)``; one of length zero is off by 90 degrees.
        target: Unit length, same shape; zero where it is not known.

    Returns:
        ``angular_rmse`` in degrees, and shares of pixels off by less than 11.25, 22.5 and 30 degrees; by name, shape
        ``(B,)``; NaN for an image without a valid pixel.

    Source: Fouhey et al., "Data-Driven 3D Primitives", 2013; per image as in probe3D.
    """
    valid = known(target)
    error = angular_error(prediction, target)
    shares = {f"under_{angle:g}": masked_mean((error < angle).to(error.dtype), valid) for angle in ANGLES}
    return {"angular_rmse": masked_mean(error.square(), valid).sqrt(), **shares}


def angular_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Angle between vectors in degrees, ``(B, 3, H, W)`` each, to ``(B, H, W)``; 90 where one of them is zero."""
    # An arccosine in float32 is off by 0.02 degrees near zero.
    sine = torch.linalg.vector_norm(torch.linalg.cross(prediction, target, dim=1), dim=1)
    angle = torch.rad2deg(torch.atan2(sine, (prediction * target).sum(1)))
    # Of zeros the arctangent is 0: no direction would be a perfect one.
    return torch.where(known(prediction) & known(target), angle, 90.0)


def known(normals: Tensor) -> Tensor:
    """Where there is a normal, not zero: ``(B, 3, H, W)`` to bool ``(B, H, W)``."""
    return normals.square().sum(1) > 0
