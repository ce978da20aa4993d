"""Shifts the student's images against the teachers' features, so that no pattern of fixed places is learned.

A teacher adds to its features something that depends on the place in the picture and not on what is there. A student
that sees the picture elsewhere cannot predict it. Stored features cannot be moved, but the image can: by whole cells of
the teachers' grids, so that both still lie on the same cells and nothing is interpolated.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from theia.errors import ConfigError

GridHW = tuple[int, int]

_LEAST_CELLS = 4  # of which a shift is one: farther, too little of an image would be left to compare
_DRAW = 3  # tells this draw from others with the same numbers


class Shift(NamedTuple):
    """A shift of images in common cells of the teachers' grids.

    Attributes:
        cells: Rows and columns of the largest grid whose lines are in all teachers' grids.
        down: Rows of that grid by which what is in an image moves down: -1, 0 or 1.
        right: Columns by which it moves to the right, likewise.
    """

    cells: GridHW
    down: int
    right: int

    def images(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` shifted; what is behind their edge repeats the pixels at the edge."""
        height, width = images.shape[-2:]
        for axis, size, moved in (
            (2, height, self.down * height // self.cells[0]),
            (3, width, self.right * width // self.cells[1]),
        ):
            if moved:
                places = torch.arange(size, device=images.device) - moved
                images = images.index_select(axis, places.clamp_(0, size - 1))
        return images

    def overlap(self, grid_hw: GridHW, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens on a teacher's grid that are of the same places.

        Args:
            grid_hw: Rows and columns of the grid, multiples of those of :attr:`cells`.
            device: Device of the result.

        Returns:
            Numbers of the predicted tokens of shifted images, and of the teacher's tokens of the images as they are,
            both int64, shape ``(n,)``: the cells that lie inside of both.
        """
        (rows, columns), (cell_rows, cell_columns) = grid_hw, self.cells
        numbers = torch.arange(rows * columns).reshape(grid_hw)
        down, right = self.down * rows // cell_rows, self.right * columns // cell_columns

        def inside(down: int, right: int) -> Tensor:
            """The cells into which others have moved."""
            part = numbers[max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)]
            return part.flatten().to(device, non_blocking=True)

        return inside(down, right), inside(-down, -right)


def common_cells(grids: Iterable[GridHW], image_sizes: Iterable[int]) -> GridHW:
    """The cells by which images may be shifted.

    Args:
        grids: Rows and columns of the teachers' grids, each of which covers the whole image.
        image_sizes: Heights and widths of the student's images, in pixels.

    Returns:
        Rows and columns: the greatest common divisors of those of the grids.

    Raises:
        ConfigError: If there are fewer than 4, or they are no whole number of pixels.
    """
    grids = list(grids)
    cells = math.gcd(*(rows for rows, _ in grids)), math.gcd(*(columns for _, columns in grids))
    if min(cells) < _LEAST_CELLS:
        names = ", ".join(sorted({f"{rows}x{columns}" for rows, columns in grids}))
        raise ConfigError(
            f"--model.shift moves images by whole cells of all teachers. Their grids of {names} have "
            f"{cells[0]}x{cells[1]} cells in common; at least {_LEAST_CELLS}x{_LEAST_CELLS} are needed. Leave it out, "
            "or choose other teachers."
        )
    for size in image_sizes:
        if size % cells[0] or size % cells[1]:
            raise ConfigError(
                f"--model.shift moves images by whole cells of all teachers, {cells[0]}x{cells[1]} in an image. In one "
                f"of {size} pixels, a cell has no whole number of them. Leave it out, or choose a multiple of "
                f"{math.lcm(*cells)}."
            )
    return cells


def draw_shift(cells: GridHW, probability: float, seed: int, epoch: int, batch: int) -> Shift | None:
    """Draws the shift of a batch, the same in all processes. It depends on nothing but the arguments.

    Args:
        cells: Rows and columns, from :func:`common_cells`.
        probability: Probability, along each axis, of a shift by one cell; either direction is as likely.
        seed: Seed of the draws.
        epoch: Number of the epoch.
        batch: Number of the batch in the epoch.

    Returns:
        The shift; ``None`` if the images stay where they are.

    Source: the shift-equivariant loss of C-RADIOv4, whose shifts are rounded normal numbers with deviation 0.5: at most
    one patch in all but 0.3 % of cases, with the probability 0.32.
    """
    random = np.random.default_rng([seed, epoch, batch, _DRAW])
    down, right = np.where(random.random(2) < probability, random.choice([-1, 1], 2), 0).tolist()
    return Shift(cells, down, right) if down or right else None
