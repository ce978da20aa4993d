"""Resizes position embeddings to another size than the training size."""

from typing import Literal

import torch
from torch import Tensor

# "size", our rule and timm's: bicubic, antialiased, from corner to corner. "scale_factor", the rule of the published
# models: bicubic with scale factor (n + 0.1) / trained, not antialiased.
PositionRule = Literal["size", "scale_factor"]


def resize_positions(grid: Tensor, rows: int, columns: int, rule: PositionRule) -> Tensor:
    """Resizes the position embedding of the patches.

    Bicubic interpolation is linear in each axis, so two products with small matrices give the same result as
    ``torch.nn.functional.interpolate``. Only the products give it in ONNX too: for ``interpolate``, the exporter uses
    another cubic kernel where it antialiases, and fixes the scale factor.

    Args:
        grid: Position embedding in the training size, shape ``(H, W, C)``.
        rows: Number of rows to resize to.
        columns: Number of columns to resize to.
        rule: Rule that decides the coordinates and the cubic kernel.

    Returns:
        Resized position embedding, shape ``(rows, columns, C)``.
    """
    matrix = _antialiased if rule == "size" else _by_scale_factor
    axes = [(rows, grid.shape[0]), (columns, grid.shape[1])]
    vertical, horizontal = (matrix(wanted, trained, grid) for wanted, trained in axes)
    if rule == "scale_factor":
        # This rule would move every position even where the size stays the same. There is no Python branch here because
        # an exported graph must decide by itself.
        same = torch.stack([_arange(wanted, grid).add(1).max() == trained for wanted, trained in axes]).all()
        vertical, horizontal = (torch.where(same, _eye(one), one) for one in (vertical, horizontal))
    return torch.einsum("rh,hwc,kw->rkc", vertical, grid.float(), horizontal).to(grid.dtype)


def _antialiased(wanted: int, trained: int, like: Tensor) -> Tensor:
    """Weights ``(wanted, trained)`` of Keys' cubic (a = -0.5), as wide as the step between two wanted points."""
    step = trained / wanted
    centre = (_arange(wanted, like) + 0.5) * step
    width = torch.clamp(torch.ones_like(centre[:1]) * step, min=1)
    distance = (_arange(trained, like)[None] + 0.5 - centre[:, None]) / width
    weights = _cubic(distance, -0.5)
    return weights / weights.sum(1, keepdim=True)


def _by_scale_factor(wanted: int, trained: int, like: Tensor) -> Tensor:
    """Weights ``(wanted, trained)`` of a cubic with a = -0.75 and four taps; taps beyond the edge count at the edge."""
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
