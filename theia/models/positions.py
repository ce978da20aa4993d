"""Position embeddings at another size than that of training."""

from typing import Literal

import torch
from torch import Tensor

# "size": bicubic, antialiased, from corner to corner; ours and timm's. "scale_factor": bicubic with scale factor
# (n + 0.1) / trained, not antialiased; that of the published models.
PositionRule = Literal["size", "scale_factor"]


def resize_positions(grid: Tensor, rows: int, columns: int, rule: PositionRule) -> Tensor:
    """Resizes the position embedding of the patches.

    Bicubic interpolation is linear in each axis, so it is two products with small matrices. That is what
    ``torch.nn.functional.interpolate`` computes; but only as plain products does it give the same in ONNX, whose
    exporter takes another cubic for the antialiased kind and fixes the scale factor.

    Args:
        grid: Shape ``(H, W, C)``, in the trained size.
        rows: Wanted rows.
        columns: Wanted columns.
        rule: Which coordinates and which cubic.

    Returns:
        Shape ``(rows, columns, C)``.
    """
    matrix = _antialiased if rule == "size" else _by_scale_factor
    axes = [(rows, grid.shape[0]), (columns, grid.shape[1])]
    vertical, horizontal = (matrix(wanted, trained, grid) for wanted, trained in axes)
    if rule == "scale_factor":
        # Where nothing is to be resized that rule would still move everything. Not a branch of Python's: an exported
        # graph must decide for itself.
        same = torch.stack([_arange(wanted, grid).add(1).max() == trained for wanted, trained in axes]).all()
        vertical, horizontal = (torch.where(same, _eye(one), one) for one in (vertical, horizontal))
    return torch.einsum("rh,hwc,kw->rkc", vertical, grid.float(), horizontal).to(grid.dtype)


def _antialiased(wanted: int, trained: int, like: Tensor) -> Tensor:
    """Weights ``(wanted, trained)``: a cubic as wide as the step between two wanted points, Keys' (a = -0.5)."""
    step = trained / wanted
    centre = (_arange(wanted, like) + 0.5) * step
    width = torch.clamp(torch.ones_like(centre[:1]) * step, min=1)
    distance = (_arange(trained, like)[None] + 0.5 - centre[:, None]) / width
    weights = _cubic(distance, -0.5)
    return weights / weights.sum(1, keepdim=True)


def _by_scale_factor(wanted: int, trained: int, like: Tensor) -> Tensor:
    """Weights ``(wanted, trained)``: four taps, those beyond the edge fall on the edge, a = -0.75."""
    place = (_arange(wanted, like) + 0.5) / ((wanted + 0.1) / trained) - 0.5
    below = place.floor()
    weights = torch.zeros((), device=like.device)
    for tap in (-1, 0, 1, 2):
        source = (below + tap).clamp(0, trained - 1)
        hit = (source[:, None] == _arange(trained, like)[None]).float()
        weights = weights + hit * _cubic(below + tap - place, -0.75)[:, None]
    return weights


def _eye(like: Tensor) -> Tensor:
    rows, columns = (_arange(count, like) for count in like.shape)
    return (rows[:, None] == columns[None]).float()


def _arange(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.float32)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel, zero from a distance of 2.

    Source: Keys, Cubic convolution interpolation for digital image processing (1981), eq. (15).
    """
    x = distance.abs()
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, inner, torch.where(x < 2, outer, 0.0))
