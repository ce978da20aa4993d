"""HOG: dense histograms of oriented gradients, a teacher without weights."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from theia.teacher import Teacher
from theia.types import Pictures, TeacherFeatures, TeacherSpec

IMAGE_SIZE = 224  # pixels
CELL_SIZE = 8  # pixels
CELLS_PER_PATCH = 2  # along each side: patches of 16x16 pixels
ORIENTATIONS = 9  # bins of 20 degrees over half a turn
STROKE_SIZE = 16  # pixels of a cell in pictures
CELLS = IMAGE_SIZE // CELL_SIZE
PATCHES = CELLS // CELLS_PER_PATCH


class HOG(Teacher):
    """Histograms of oriented gradients of every patch, the regression target of MaskFeat.

    Each colour has a histogram of 9 unsigned gradient orientations in every cell of 8x8 pixels, with an L2
    norm of one, or all zeros where the cell is flat. A patch holds the 2x2 cells of its 16x16 pixels: 108
    channels, ``((colour * 9 + orientation) * 2 + cell_row) * 2 + cell_column``, on a grid of 14x14.

    Orientation 0 is a gradient from left to right (a vertical edge), 4 one from top to bottom. Gradients are
    the central differences of scikit-image; MaskFeat takes Sobel filters.

    Source: Dalal and Triggs, 2005; Wei et al., "Masked Feature Prediction", 2022, section 3.
    """

    spec = TeacherSpec(
        name="hog",
        channels=3 * ORIENTATIONS * CELLS_PER_PATCH**2,
        grid_hw=(PATCHES, PATCHES),
        licence="Apache-2.0",
        weights="none",
        preprocessing={
            "size": [IMAGE_SIZE, IMAGE_SIZE],
            "resize": "squash",
            "interpolation": "bilinear",
            "antialias": True,
        },
    )

    def forward(self, images: Tensor) -> TeacherFeatures:
        """Features of a batch; computed on the CPU. See :meth:`theia.teacher.Teacher.forward`."""
        pixels = images.cpu().float()
        if pixels.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            pixels = F.interpolate(pixels, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        # One image at a time, so that its features do not depend on the batch it comes in.
        patches = [_patches(image) for image in pixels.numpy()]
        return TeacherFeatures(torch.from_numpy(np.stack(patches)).to(images.device))

    def decode(self, patches: Tensor, images: Tensor) -> Pictures:
        """Each orientation of a cell as a stroke along its edges, in the colours that have it, 448x448.

        See :meth:`theia.teacher.Teacher.decode`.
        """
        per_cell = patches.cpu().reshape(-1, PATCHES, PATCHES, 3, ORIENTATIONS, CELLS_PER_PATCH, CELLS_PER_PATCH)
        # To rows (patch, cell, pixel), columns (patch, cell, pixel), colour.
        strokes = torch.einsum("brckoyx,ohw->bryhcxwk", per_cell.clamp(min=0), _strokes())
        pixels = strokes.reshape(len(patches), CELLS * STROKE_SIZE, CELLS * STROKE_SIZE, 3)
        return Pictures((255 * pixels.clamp(0, 1)).round().to(torch.uint8))


def _strokes() -> Tensor:
    """A line through the middle of a cell for each orientation, across its gradient: ``(9, 16, 16)``, 0 to 1."""
    angles = torch.pi * (torch.arange(ORIENTATIONS) + 0.5) / ORIENTATIONS
    places = torch.arange(STROKE_SIZE) + 0.5 - STROKE_SIZE / 2
    rows, columns = places[None, :, None], places[None, None, :]
    cosine, sine = angles.cos()[:, None, None], angles.sin()[:, None, None]
    from_line = (columns * cosine + rows * sine).abs()
    from_middle = (rows * cosine - columns * sine).abs()
    half = STROKE_SIZE / 2
    return (1.3 - from_line).clamp(0, 1) * (half - from_middle).clamp(0, 1)


def _patches(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """HOG of one image ``(3, 224, 224)``, any grey scale: float32 ``(196, 108)``."""
    from skimage.feature import hog

    # The whole image is one block: scikit-image normalises blocks in a Python loop, which would take as long
    # as the histograms if every cell were a block. Each cell gets its own norm below, whatever the block's.
    cells = np.stack(
        [
            hog(
                colour,
                orientations=ORIENTATIONS,
                pixels_per_cell=(CELL_SIZE, CELL_SIZE),
                cells_per_block=(CELLS, CELLS),
                block_norm="L2",
                feature_vector=False,
            ).reshape(CELLS, CELLS, ORIENTATIONS)
            for colour in image
        ]
    )
    norm = np.linalg.norm(cells, axis=-1, keepdims=True)
    cells = np.divide(cells, norm, out=np.zeros_like(cells), where=norm > 0)
    # Axes: colour, row, cell row, column, cell column, orientation.
    cells = cells.reshape(3, PATCHES, CELLS_PER_PATCH, PATCHES, CELLS_PER_PATCH, ORIENTATIONS)
    patches = cells.transpose(1, 3, 0, 5, 2, 4).reshape(PATCHES * PATCHES, -1)
    return np.asarray(patches, dtype=np.float32)
