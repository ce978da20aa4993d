"""M-LSD: straight line segments, found by a MobileNetV2 with a feature pyramid."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theia.teacher import Teacher
from theia.types import TeacherFeatures, TeacherSpec

from .networks import build, squares, tokens
from .packages import PACKAGES

PACKAGE = PACKAGES["mlsd"]
SIZE = 320  # pixels, as the network was exported
WIDTH = 64  # channels of the pyramid
# Stages of MobileNetV2 up to the last that is used: channels, number of blocks, stride, expansion.
STAGES = ((16, 1, 1, 1), (24, 2, 2, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 3, 1, 6))
_UNUSED = 9  # position in the file of a convolution that only leads to finer maps

Grid = Literal[20, 40]


class MLSD(Teacher):
    """Maps of the feature pyramid from which the lines are read: 64 channels on a grid of 20x20, or 40x40.

    Source: Gu et al., "Towards Light-weight and Real-time Line Segment Detection", 2022; the large model.
    """

    spec = TeacherSpec(
        name="mlsd",
        channels=WIDTH,
        grid_hw=(20, 20),
        licence=PACKAGE.licence,
        weights=PACKAGE.id,
        revision=PACKAGE.revision,
        preprocessing={
            "size": SIZE,
            "interpolation": "bilinear",
            "antialias": True,
            "mean": [127.5] * 3,
            "std": [127.5] * 3,
        },
    )

    def __init__(self, weights: str = PACKAGE.id, grid: Grid = 20) -> None:
        """Loads the network up to the map.

        Args:
            weights: Version of the package with the weights, path of its mlsd_320x320_large.onnx, or "random".
            grid: Rows and columns of the map. 40 is one level finer, and takes four times the disk space.

        Raises:
            WeightsError: If the file is missing or is another.
        """
        super().__init__()
        self.network, spec = build(self.spec, PACKAGE, weights, partial(Network, finer=grid == 40), _read)
        self.spec = replace(spec, grid_hw=(grid, grid))

    def forward(self, images: Tensor) -> TeacherFeatures:
        """Features of a batch; see :meth:`theia.teacher.Teacher.forward`."""
        return tokens(self.network(squares(images, SIZE) / 127.5 - 1))


class Network(nn.Module):
    """Pictures ``(B, 3, 320, 320)`` from -1 to 1 to maps ``(B, 64, 20, 20)``, or of 40x40 with ``finer``."""

    def __init__(self, finer: bool) -> None:
        super().__init__()
        # In the order of the file.
        self.stem = _convolution(3, 32, stride=2)
        self.stages = nn.ModuleList()
        channels = 32
        for width, count, stride, expansion in STAGES:
            blocks = [
                _Block(channels if index == 0 else width, width, 1 if index else stride, expansion)
                for index in range(count)
            ]
            self.stages.append(nn.Sequential(*blocks))
            channels = width
        self.merge = _Merge(STAGES[4][0], STAGES[3][0])
        self.finer = _Merge(WIDTH, STAGES[2][0]) if finer else None

    def forward(self, pictures: Tensor) -> Tensor:
        """The pyramid's map."""
        maps = self.stem(pictures)
        levels = []
        for stage in self.stages:
            maps = stage(maps)
            levels.append(maps)
        merged: Tensor = self.merge(levels[4], levels[3])
        return merged if self.finer is None else self.finer(merged, levels[2])


class _Block(nn.Module):
    """Widens, mixes within each channel, narrows; added to what came in where the shapes allow it."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.body = nn.Sequential(
            *([] if expansion == 1 else [_convolution(channels, wide, kernel=1)]),
            _convolution(wide, wide, stride=stride, groups=wide),
            nn.Conv2d(wide, out, 1),
        )
        self.adds = stride == 1 and channels == out

    def forward(self, maps: Tensor) -> Tensor:
        mixed: Tensor = self.body(maps)
        return maps + mixed if self.adds else mixed


class _Merge(nn.Module):
    """Joins a deep map with a finer one: both to 64 channels, the deep one enlarged, then two convolutions."""

    def __init__(self, deep: int, fine: int) -> None:
        super().__init__()
        self.deep, self.fine = nn.Conv2d(deep, WIDTH, 1), nn.Conv2d(fine, WIDTH, 1)
        self.mix = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1)
        self.narrow = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)

    def forward(self, deep: Tensor, fine: Tensor) -> Tensor:
        if deep.shape[-2:] != fine.shape[-2:]:
            deep = F.interpolate(deep, fine.shape[-2:], mode="bilinear")
        both = torch.cat([self.fine(fine), self.deep(deep)], 1).relu()
        merged: Tensor = self.narrow(both + self.mix(both).relu()).relu()
        return merged


def _convolution(channels: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    # TensorFlow pads below and on the right only where it takes every second place.
    pad: nn.Module = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.Identity()
    padding = 0 if stride == 2 else kernel // 2
    return nn.Sequential(pad, nn.Conv2d(channels, out, kernel, stride, padding, groups=groups), nn.ReLU6())


def _read(path: Path) -> Iterator[Tensor]:
    import onnx

    graph = onnx.load(path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    del convolutions[_UNUSED]
    for node in convolutions:
        for name in node.input[1:]:
            tensor = torch.from_numpy(onnx.numpy_helper.to_array(stored[name]).copy())
            # The first has a fourth channel for transparency, with zeros.
            yield tensor[:, :3] if node is convolutions[0] and tensor.ndim == 4 else tensor
