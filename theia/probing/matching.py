"""Multiview correspondence: pixels of two views matched by their features, judged by geometry.

As probe3D on ScanNet: features are enlarged to a quarter of the picture's size and every cell with known depth of the
first view is matched with the cell of greatest cosine in the second. The 1000 matches (all, if there are fewer) whose
match is most distinct from the second best (Lowe's ratio of cosine distances) are judged: right is a match whose true
place in the second view is nearer to the matched one than a threshold. Cells that the second view does not see are not
left out. Recall is the share of right matches, averaged over pairs; in bins of viewpoints, of the pairs whose cameras
are turned from each other by that angle.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from theia.errors import ConfigError
from theia.probing.cameras import Camera, Floats, viewpoint_angle
from theia.probing.datasets import IMAGE_SIZE
from theia.probing.embedding import Features
from theia.utils.progress import Progress

# Pixels of a picture 640 wide; of others in proportion.
PIXELS = (5, 10, 20)
BINNED_PIXELS = 10
PIXELS_OF_WIDTH = 640
METRES = 0.05
BINS = (0, 15, 30, 60, 180)  # degrees

_MATCHES = 1000
_CELL = 4  # pixels of the square picture
_LEAST_DISTANCE = 1e-9


def correspondence(
    features: Features,
    depth: NDArray[np.float32],
    cameras: Sequence[Camera],
    pairs: Sequence[tuple[int, int]],
    device: torch.device,
) -> dict[str, float]:
    """Matches all pairs of pictures.

    Args:
        features: Features of the pictures.
        depth: Depth in metres, shape ``(n, S, S)``; 0 where it is not known.
        cameras: One camera per picture.
        pairs: Indices of the two pictures of each pair.
        device: Device to compare features on.

    Returns:
        ``recall_5px`` and so on, ``recall_5cm``, and ``recall_10px_0-15deg`` and so on; shares from 0 to 1. Bins
        without a pair are left out.

    Raises:
        ConfigError: If no pair has two cells with known depth in each picture.
    """
    angles, pixels, metres = [], [], []
    with Progress("matching", len(pairs), unit="pair") as progress:
        for pair in pairs:
            progress.advance(1)
            first, second = (_cells(features, depth[place], place, cameras[place]) for place in pair)
            if min(len(first[1]), len(second[1])) < 2:
                continue
            ours, theirs = match(first[0].to(device), second[0].to(device), _MATCHES)
            points, matched = first[1][ours.cpu().numpy()], second[1][theirs.cpu().numpy()]
            angles.append(viewpoint_angle(cameras[pair[0]], cameras[pair[1]]))
            pixels.append(reprojection_error(points, matched, cameras[pair[1]]))
            metres.append(np.linalg.norm(points - matched, axis=-1))
    if not angles:
        raise ConfigError("No pair of pictures has known depth in both. Is depth/ empty, or all zero?")
    near = [float((error < BINNED_PIXELS).mean()) for error in pixels]
    return {
        **{f"recall_{limit}px": mean(float((error < limit).mean()) for error in pixels) for limit in PIXELS},
        f"recall_{100 * METRES:g}cm": mean(float((error < METRES).mean()) for error in metres),
        **{f"recall_{BINNED_PIXELS}px_{name}deg": value for name, value in binned(angles, near).items()},
    }


def match(first: Tensor, second: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most distinct matches from one set of features to another.

    Args:
        first: Features of the first view, shape ``(n, C)``.
        second: Features of the second view, shape ``(m, C)``, ``m`` at least 2.
        count: Largest number of matches.

    Returns:
        Places in both, shape ``(min(n, count),)`` each, the most distinct first.
    """
    cosine = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    greatest, places = cosine.topk(2, dim=1)
    distance = (1 - greatest).clamp(min=_LEAST_DISTANCE)
    distinct = (distance[:, 0] / distance[:, 1]).argsort(stable=True)[:count]
    return distinct, places[distinct, 0]


def reprojection_error(points: Floats, matched: Floats, camera: Camera) -> Floats:
    """How far apart two sets of points are in a picture, in pixels of one that is 640 wide.

    Args:
        points: Points in space, shape ``(n, 3)``.
        matched: Points that they were matched with, same shape.
        camera: Camera that takes the picture.

    Returns:
        Shape ``(n,)``; infinite where a point is behind the camera.
    """
    ours, theirs = camera.project(points), camera.project(matched)
    # Points behind the camera are infinitely far away, and have no difference.
    behind = ~np.isfinite(np.concatenate([ours, theirs], -1).sum(-1))
    apart = np.linalg.norm(np.where(behind[:, None], 0, ours) - np.where(behind[:, None], 0, theirs), axis=-1)
    return np.where(behind, np.inf, apart * PIXELS_OF_WIDTH / camera.width)


def binned(angles: Iterable[float], recalls: Iterable[float]) -> dict[str, float]:
    """Means of recall by viewpoint; the lower end of a bin belongs to it.

    Args:
        angles: Angle between the cameras of each pair, in degrees.
        recalls: Recall of each pair.

    Returns:
        Mean of each bin, by ``0-15`` and so on; a bin without a pair is left out.
    """
    pairs = list(zip(angles, recalls, strict=True))
    found: dict[str, float] = {}
    for low, high in pairwise(BINS):
        inside = [recall for angle, recall in pairs if low <= angle < high or angle == high == BINS[-1]]
        if inside:
            found[f"{low}-{high}"] = mean(inside)
    return found


def _cells(features: Features, depth: NDArray[np.float32], place: int, camera: Camera) -> tuple[Tensor, Floats]:
    """Features ``(n, C)`` and world points ``(n, 3)`` of a view's cells with known depth."""
    side = IMAGE_SIZE // _CELL
    tokens = torch.from_numpy(features.tokens[place])
    maps = F.interpolate(tokens.T.reshape(1, -1, *features.grid), (side, side), mode="bicubic")[0]
    # A cell's depth is that of the pixel right below its centre; its point lies on the ray through that pixel.
    middle = slice(_CELL // 2, None, _CELL)
    known = np.asarray(depth[middle, middle] > 0)
    return maps.permute(1, 2, 0)[torch.from_numpy(known)], camera.points(depth)[middle, middle][known]
