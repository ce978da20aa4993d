"""Pictures with what is true at their pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.probing.camera import Camera

Task = Literal["depth", "normals", "segmentation", "correspondence"]
TASKS: tuple[Task, ...] = ("depth", "normals", "segmentation", "correspondence")

IMAGE_SIZE = 224  # pixels along each side of every picture and map
MAX_DEPTH = 10.0  # metres: heads are not fitted to what is farther, nor judged by it


@dataclass(frozen=True)
class DenseSplit:
    """A split; what is not known is ``None``. ``S`` is :data:`IMAGE_SIZE`.

    Attributes:
        images: RGB, uint8, shape ``(n, 3, S, S)``.
        depth: Metres along the optical axis, float32, shape ``(n, S, S)``; 0 where it is not known.
        normals: Unit length, float32, shape ``(n, 3, S, S)``; zero where it is not known.
        labels: Class indices, uint8, shape ``(n, S, S)``; 255 where they do not count.
        cameras: One per picture.
        pairs: Places of two pictures of one scene each.
    """

    images: NDArray[np.uint8]
    depth: NDArray[np.float32] | None = None
    normals: NDArray[np.float32] | None = None
    labels: NDArray[np.uint8] | None = None
    cameras: Sequence[Camera] | None = None
    pairs: Sequence[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class DenseData:
    """What dense probes are trained and tested on.

    Attributes:
        train: Heads are fitted here.
        val: Figures are of these.
        classes: Names of the classes of ``labels``, or as many numbers.
        description: Of the data, for the record.
    """

    train: DenseSplit
    val: DenseSplit
    classes: Sequence[str]
    description: str
