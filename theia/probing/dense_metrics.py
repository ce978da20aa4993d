"""Metrics of depth, normals and classes of pixels. Depth and normals are judged image by image, over valid pixels."""

import torch
from torch import Tensor

LEAST_DEPTH = 1e-3  # metres, as of probe3D: logarithms and ratios need it


def depth_metrics(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """All figures of depth.

    Args:
        prediction: Predicted depth in metres, shape ``(B, H, W)``.
        target: True depth in metres, same shape; 0 where it is not known.

    Returns:
        One value per image, shape ``(B,)``, by name; NaN for an image without a valid pixel.

    Source: El Banani et al., "Probing the 3D Awareness of Visual Foundation Models", 2024: per image, then averaged;
        scale invariant is after the best scale and shift.
    """
    valid = target > 0
    aligned = align(prediction, target, valid)
    return {
        "rmse": rmse(prediction, target, valid),
        **{f"delta{power}": delta(prediction, target, valid, power) for power in (1, 2, 3)},
        "silog": silog(prediction, target, valid),
        "aligned_rmse": rmse(aligned, target, valid),
        "aligned_delta1": delta(aligned, target, valid, 1),
    }


def rmse(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Root of the mean squared difference, in the unit of both: ``(B, H, W)`` each, to ``(B,)``."""
    return masked_mean((prediction - target).square(), valid).sqrt()


def delta(prediction: Tensor, target: Tensor, valid: Tensor, power: int) -> Tensor:
    """Share of pixels whose depth is off by a factor below ``1.25 ** power``: ``(B, H, W)`` each, to ``(B,)``.

    Source: Eigen et al., "Depth Map Prediction from a Single Image", 2014.
    """
    prediction, target = prediction.clamp(min=LEAST_DEPTH), target.clamp(min=LEAST_DEPTH)
    ratio = torch.maximum(prediction / target, target / prediction)
    return masked_mean((ratio < 1.25**power).to(prediction.dtype), valid)


def silog(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Standard deviation of the difference of logarithms, times 100; zero for a prediction of any other scale.

    Args:
        prediction: Predicted depth, shape ``(B, H, W)``.
        target: True depth, same shape.
        valid: Mask of the pixels that count, bool, same shape.

    Returns:
        Shape ``(B,)``.

    Source: Eigen et al., 2014, eq. (1), its root times 100 as KITTI's benchmark states it.
    """
    difference = prediction.clamp(min=LEAST_DEPTH).log() - target.clamp(min=LEAST_DEPTH).log()
    # Around its mean: the difference of two nearly equal means may come out negative.
    centred = difference - masked_mean(difference, valid)[:, None, None]
    return 100 * masked_mean(centred.square(), valid).sqrt()


def align(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Every image of the prediction times a scale plus a shift, which bring it nearest to the target in least squares.

    Args:
        prediction: Predicted depth, shape ``(B, H, W)``. One without variation gets a shift alone.
        target: True depth, same shape.
        valid: Mask of the pixels that count, bool, same shape.

    Returns:
        The prediction aligned, same shape.

    Source: Ranftl et al., "Towards Robust Monocular Depth Estimation" (MiDaS), 2020, eq. (4).
    """
    mean, target_mean = masked_mean(prediction, valid), masked_mean(target, valid)
    centred = prediction - mean[:, None, None]
    variance = masked_mean(centred.square(), valid)
    covariance = masked_mean(centred * (target - target_mean[:, None, None]), valid)
    # Rounding alone makes the variance of a constant greater than zero.
    varies = variance > 1e-10 * mean.square()
    scale = torch.where(varies, covariance / torch.where(varies, variance, 1.0), 0.0)
    return centred * scale[:, None, None] + target_mean[:, None, None]


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid pixels of each image, ``(B, H, W)`` to ``(B,)``; NaN where there are none."""
    # Not a product: what is not valid may be infinite.
    return torch.where(valid, values, 0.0).sum((1, 2)) / valid.sum((1, 2))


ANGLES = (11.25, 22.5, 30.0)  # degrees


def normal_metrics(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """All figures of surface normals.

    Args:
        prediction: Predicted normals of any length, shape ``(B, 3, H, W)``; one of length zero is off by 90 degrees.
        target: True normals of unit length, same shape; zero where it is not known.

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


IGNORED = 255  # label of pixels that do not count


def confusion(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """Counts pixels by true class (rows) and predicted class (columns).

    Args:
        prediction: Predicted class indices, any shape.
        target: True class indices, same shape; pixels of 255 are left out.
        classes: Number of classes.

    Returns:
        int64, shape ``(classes, classes)``.
    """
    valid = target != IGNORED
    pairs = target[valid].long() * classes + prediction[valid].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> float:
    """Mean over classes of intersection over union, of all pixels of all images together.

    A class that occurs neither in the truth nor in the prediction is left out of the mean.

    Args:
        counts: Confusion matrix, shape ``(classes, classes)``.

    Source: Everingham et al., "The PASCAL Visual Object Classes Challenge", 2015, section 3.
    """
    intersection = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - intersection
    return float((intersection[union > 0] / union[union > 0]).mean())


def pixel_accuracy(counts: Tensor) -> float:
    """Share of pixels that have their true class.

    Args:
        counts: Confusion matrix, shape ``(classes, classes)``.
    """
    return float(counts.diagonal().sum() / counts.sum())
