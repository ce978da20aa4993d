"""Where cameras of a folder stand, and which of their pictures to match."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.probing.camera import Camera
from benchmarks.probing.maps import header, path_of, size_text
from theia.errors import ImageError


def read_cameras(split: Path, names: Sequence[str]) -> tuple[list[Camera], list[tuple[int, int]]]:
    """Reads poses, intrinsics and pairs.

    Args:
        split: Folder that holds ``rgb``, ``pose``, ``intrinsics.txt`` and ``pairs.txt``.
        names: File names of the pictures.

    Returns:
        A camera per picture, and places of two pictures each.

    Raises:
        ImageError: If a file is missing or does not hold what it must; names it.
    """
    intrinsics = _matrix(split / "intrinsics.txt")[:3, :3]
    if min(intrinsics[0, 0], intrinsics[1, 1], intrinsics[2, 2]) <= 0:
        raise ImageError(f"{split / 'intrinsics.txt'} has no focal lengths above zero. Write fx 0 cx, 0 fy cy, 0 0 1.")
    cameras = []
    for name in names:
        (width, height), _ = header(split / "rgb" / name)
        cameras.append(Camera(intrinsics, _matrix(path_of(split, "pose", name, ".txt"), 4), width, height))
    places = {known: place for place, name in enumerate(names) for known in (name, Path(name).stem)}
    pairs = []
    for number, line in enumerate((split / "pairs.txt").read_text().splitlines(), 1):
        pair = line.split()
        if not pair:
            continue
        if len(pair) != 2 or not all(name in places for name in pair):
            raise ImageError(f"{split / 'pairs.txt'}, line {number}: {line!r} is not two names of pictures in rgb.")
        pairs.append((places[pair[0]], places[pair[1]]))
    if not pairs:
        raise ImageError(f"{split / 'pairs.txt'} has no pair. Write two names of pictures a line.")
    return cameras, pairs


def _matrix(path: Path, least: int = 3) -> NDArray[np.float64]:
    try:
        found: NDArray[np.float64] = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be read: {error}") from error
    if min(found.shape) < least or not np.isfinite(found).all():
        raise ImageError(f"{path} holds no finite matrix of {least}x{least}, but {size_text(found.shape)}.")
    return found
