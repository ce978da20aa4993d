"""Images of known pixels, a plugin of somebody else, and live data of both."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from theia import registry
from theia.live import LiveData

SIZE = 32  # pixels
SOURCE = '''
from dataclasses import replace

import torch
from torch.nn import functional as F

from theia.teacher import Teacher
from theia.types import TeacherFeatures, TeacherSpec


class Brightest(Teacher):
    """The largest value of each colour in each of 4x4 cells: integers, which float16 holds exactly. CLS: of all."""

    spec = TeacherSpec(name="brightest", channels=3, grid_hw=(4, 4), licence="MIT", weights="none", has_cls=True)

    def __init__(self, log: str | None = None, negative: bool = False) -> None:
        """Builds it.

        Args:
            log: File that gets a line with the number of images for every batch.
            negative: Whether to change all signs.
        """
        super().__init__()
        self.log, self.sign = log, -1 if negative else 1
        self.spec = replace(self.spec, preprocessing={"negative": negative})

    def forward(self, images):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{len(images)}\\n")
        patches = self.sign * F.adaptive_max_pool2d(images.float(), 4).flatten(2).transpose(1, 2)
        return TeacherFeatures(patches, patches.amax(1))


class Mean(Teacher):
    """Mean colour of the image: 3 channels on 1x1, no CLS."""

    spec = TeacherSpec(name="mean", channels=3, grid_hw=(1, 1), licence="MIT", weights="none")

    def forward(self, images):
        return TeacherFeatures(images.float().mean((2, 3))[:, None])
'''


def install(site: Path) -> None:
    """Lays the distribution out in a folder that is, or will be, on ``sys.path``."""
    site.mkdir()
    (site / "live_teachers.py").write_text(SOURCE)
    info = site / "live_teachers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: live-teachers\nVersion: 1.0\n")
    points = "[theia.teachers]\nbrightest = live_teachers:Brightest\nmean = live_teachers:Mean\n"
    (info / "entry_points.txt").write_text(points)


def write_images(folder: Path, count: int) -> np.ndarray:
    """Lossless images of few colours and two classes: uint8, ``(count, 3, SIZE, SIZE)``, in the order of their ids."""
    coarse = np.random.default_rng(count).integers(0, 256, (count, 3, 2, 2), np.uint8)
    pixels = coarse.repeat(SIZE // 2, 2).repeat(SIZE // 2, 3)
    pixels[:, :, ::3, ::5] //= 2
    for index, image in enumerate(pixels):
        path = folder / f"{'ab'[index * 2 // count]}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    return pixels


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the plugin is installed."""
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry.find.cache_clear()
    yield tmp_path / "site"
    registry.find.cache_clear()


@pytest.fixture
def pixels(tmp_path: Path) -> np.ndarray:
    """Pixels of the 40 images in ``tmp_path / "images"``."""
    return write_images(tmp_path / "images", 40)


@pytest.fixture
def live(tmp_path: Path, site: Path, pixels: np.ndarray) -> Callable[..., LiveData]:
    """``live(**changes)`` makes live data, with everything that is computed before a training."""

    def make(prepare: bool = True, **changes: Any) -> LiveData:
        options: dict[str, Any] = {
            "images": str(tmp_path / "images"), "teachers": "brightest,mean", "size": SIZE, "batch_size": 8,
            "val_batch_size": 4, "workers": 0, "holdout": 0.2, "cache": str(tmp_path / "cache"),
        }  # fmt: skip
        data = LiveData(**(options | changes))
        if prepare:
            data.prepare_data()
        return data

    return make


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged, from the level that users see."""
    caplog.set_level(logging.INFO, "theia")
    return caplog
