"""Color: mean and spread of the colour of every cell, a teacher without weights."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from theia.teacher import Teacher
from theia.types import Pictures, TeacherFeatures, TeacherSpec

IMAGE_SIZE = 224  # pixels
CELLS = 16
CELL_SIZE = IMAGE_SIZE // CELLS  # 14 pixels


class Color(Teacher):
    """Colour statistics of every cell of 14x14 pixels in CIE Lab (D65), whose distances match what people see.

    Six channels on a grid of 16x16: the means of L (0 to 100), a and b (about -128 to 128), then their
    standard deviations over the cell.

    Source: CIE 1976 L*a*b*, through ``skimage.color.rgb2lab``.
    """

    spec = TeacherSpec(
        name="color",
        channels=6,
        grid_hw=(CELLS, CELLS),
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
        patches = [_statistics(image) for image in pixels.permute(0, 2, 3, 1).numpy()]
        return TeacherFeatures(torch.from_numpy(np.stack(patches)).to(images.device))

    def decode(self, patches: Tensor, images: Tensor) -> Pictures:
        """The mean colour of every cell, 16x16. See :meth:`theia.teacher.Teacher.decode`."""
        from skimage.color import lab2rgb

        lab = patches[..., :3].double().cpu().numpy().reshape(len(patches), CELLS, CELLS, 3)
        with warnings.catch_warnings():
            # What a student predicts need not be a colour that a screen can show.
            warnings.filterwarnings("ignore", message="Conversion from CIE-LAB")
            rgb = lab2rgb(lab).clip(0, 1)
        return Pictures(torch.from_numpy(np.round(255 * rgb).astype(np.uint8)))


def _statistics(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Colour statistics of one image ``(224, 224, 3)`` in grey levels 0 to 255: float32 ``(256, 6)``."""
    from skimage.color import rgb2lab

    # double: the deviation of a flat cell is then zero, not the rounding of its mean.
    lab = rgb2lab(image.astype(np.float64) / 255)
    cells = lab.reshape(CELLS, CELL_SIZE, CELLS, CELL_SIZE, 3)
    statistics = np.concatenate([cells.mean(axis=(1, 3)), cells.std(axis=(1, 3))], axis=-1)
    return statistics.reshape(CELLS * CELLS, 6).astype(np.float32)
