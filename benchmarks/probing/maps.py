"""Files beside pictures that hold a value for each of their pixels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.probing.data import IMAGE_SIZE
from theia.errors import ImageError

_MODES = {"depth": ("I;16", "I;16B", "I"), "normals": ("RGB",), "labels": ("L", "P")}


def check_maps(split: Path, names: Sequence[str], maps: Sequence[str]) -> None:
    """Looks at the headers of all maps, so that nothing is missed after hours of work.

    Args:
        split: Folder that holds ``rgb`` and the folders of maps.
        names: File names of the pictures.
        maps: Of ``depth``, ``normals`` and ``labels``.

    Raises:
        ImageError: If one is missing, cannot be read, or is of another size than its picture,
            or its pixels are not what its kind needs.
    """
    for kind in maps:
        missing = [name for name in names if not path_of(split, kind, name).is_file()]
        if missing:
            others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
            raise ImageError(f"{path_of(split, kind, missing[0])} is missing{others}: rgb has {missing[0]}.")
        for name in names:
            size, _ = header(split / "rgb" / name)
            map_size, mode = header(path_of(split, kind, name))
            if map_size != size:
                raise ImageError(
                    f"{path_of(split, kind, name)} is {size_text(map_size)}, but its picture is {size_text(size)}."
                )
            if mode not in _MODES[kind]:
                raise ImageError(
                    f"{path_of(split, kind, name)} has pixels of mode {mode!r}; depth must have 16 bits of "
                    "millimetres, normals RGB, labels 8 bits of class indices."
                )


def header(path: Path) -> tuple[tuple[int, int], str]:
    """Width and height of an image file, and Pillow's mode of its pixels.

    Raises:
        ImageError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except (OSError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be read: {error}. Remove or replace it.") from error


def nearest_values(path: Path) -> NDArray[np.float32]:
    """A map on the square grid of pictures; at each place the value of the pixel that is nearest.

    Returns:
        Shape ``(S, S)`` or ``(S, S, 3)``.

    Raises:
        ImageError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error}. Remove or replace it.") from error
    rows, columns = (((np.arange(IMAGE_SIZE) + 0.5) * edge / IMAGE_SIZE).astype(int) for edge in values.shape[:2])
    found: NDArray[np.float32] = values[rows][:, columns].astype(np.float32)
    return found


def unit_vectors(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normals of colours from 0 to 255, ``(S, S, 3)`` to ``(3, S, S)``; zero where far from unit length."""
    vectors = (colours / 127.5 - 1).transpose(2, 0, 1)
    length = np.linalg.norm(vectors, axis=0)
    # 8 bits put a unit vector off by a hundredth; black has a length of 1.7.
    known = (length > 0.5) & (length < 1.5)
    return np.where(known, vectors / np.where(known, length, 1), 0).astype(np.float32)


def path_of(split: Path, kind: str, name: str, ending: str = ".png") -> Path:
    """The file of a kind that belongs to a picture."""
    return split / kind / (Path(name).stem + ending)


def size_text(shape: Sequence[int]) -> str:
    """Such as ``640x480``."""
    return "x".join(map(str, shape))
