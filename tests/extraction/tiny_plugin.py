"""A plugin distribution with two teachers that numpy can follow, and images of known pixels."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 16  # pixels

SOURCE = '''
import os
import time

import torch
from torch.nn import functional as F

from theia.teacher import Teacher
from theia.types import TeacherFeatures, TeacherSpec


class Pooled(Teacher):
    """Means of the 4x4 cells of an image, and their square roots and halves; CLS is their mean."""

    spec = TeacherSpec(name="pooled", channels=8, grid_hw=(4, 4), licence="MIT", weights="none", has_cls=True)

    def __init__(self, delay: float = 0.0, log: str | None = None, fault: str | None = None) -> None:
        """Builds it.

        Args:
            delay: Seconds that a batch takes.
            log: File that gets a line for every batch.
            fault: "shape" or "nan".
        """
        super().__init__()
        self.delay, self.log, self.fault = delay, log, fault

    def forward(self, images):
        time.sleep(self.delay)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {len(images)} {torch.is_autocast_enabled(images.device.type)}\\n")
        cells = F.avg_pool2d(images.float(), images.shape[-1] // 4)
        patches = torch.cat([cells, cells.sqrt(), cells[:, :2] / 2], 1).flatten(2).transpose(1, 2)
        if self.fault == "shape":
            patches = patches[:, :, :5]
        if self.fault == "nan":
            patches[-1, 3, 7] = torch.nan
        return TeacherFeatures(patches, patches.mean(1))


class Mean(Teacher):
    """Mean colour of the image: 3 channels on 1x1, no CLS."""

    spec = TeacherSpec(name="mean", channels=3, grid_hw=(1, 1), licence="MIT", weights="none")

    def forward(self, images):
        return TeacherFeatures(images.float().mean((2, 3))[:, None])
'''


def install(folder: Path) -> None:
    """Lays the distribution out in a folder that is, or will be, on ``sys.path``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny_teachers.py").write_text(SOURCE)
    info = folder / "tiny_teachers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-teachers\nVersion: 1.0\n")
    points = "[theia.teachers]\npooled = tiny_teachers:Pooled\nmean = tiny_teachers:Mean\n"
    (info / "entry_points.txt").write_text(points)


def write_images(folder: Path, count: int) -> dict[str, np.ndarray]:
    """Lossless images of the store's own size: id -> uint8 ``(3, SIZE, SIZE)``."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    pixels = {f"{index:03d}.png": random.integers(0, 256, (3, SIZE, SIZE), np.uint8) for index in range(count)}
    for name, image in pixels.items():
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / name)
    return pixels


def pooled(image: np.ndarray) -> np.ndarray:
    """What ``Pooled`` gives for one image: float64 ``(16, 8)``."""
    side = image.shape[-1] // 4
    cells = image.astype(np.float64).reshape(3, 4, side, 4, side).mean((2, 4))
    return np.concatenate([cells, np.sqrt(cells), cells[:2] / 2]).reshape(8, 16).T
