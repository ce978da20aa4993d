"""XFeat: local descriptors with which a place is found again in another photograph."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theia.teacher import Teacher
from theia.types import TeacherFeatures, TeacherSpec

from .networks import build, squares, tokens
from .packages import PACKAGES

PACKAGE = PACKAGES["xfeat"]
SIZE = 224  # pixels; the grid has an eighth of it
# The file also holds the heads for key points and their reliability, and a matcher.
_HEADS = ("heatmap_head.", "keypoint_head.", "fine_matcher.")


class XFeat(Teacher):
    """Descriptors before they are scaled to length 1: 64 channels on a grid of 28x28.

    Source: Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching", 2024.
    """

    spec = TeacherSpec(
        name="xfeat",
        channels=64,
        grid_hw=(SIZE // 8, SIZE // 8),
        licence=PACKAGE.licence,
        weights=PACKAGE.id,
        revision=PACKAGE.revision,
        preprocessing={
            "size": SIZE,
            "interpolation": "bilinear",
            "antialias": True,
            "colours": "their mean",
            "mean": "of the image",
            "std": "of the image",
        },
    )

    def __init__(self, weights: str = PACKAGE.id) -> None:
        """Loads the network up to the descriptors.

        Args:
            weights: Version of the package with the weights, path of its xfeat.pt, or "random".

        Raises:
            WeightsError: If the file is missing or is another.
        """
        super().__init__()
        self.network, self.spec = build(self.spec, PACKAGE, weights, Network, _read)

    def forward(self, images: Tensor) -> TeacherFeatures:
        """Features of a batch; see :meth:`theia.teacher.Teacher.forward`."""
        return tokens(self.network(squares(images, SIZE) / 255))


class Network(nn.Module):
    """Pictures ``(B, 3, H, W)`` from 0 to 1, of sides that are multiples of 32, to maps ``(B, 64, H / 8, W / 8)``."""

    def __init__(self) -> None:
        super().__init__()
        # In the order of the file.
        self.skip = nn.Conv2d(1, 24, 1)
        self.quarter = nn.Sequential(
            _layer(1, 4), _layer(4, 8, stride=2), _layer(8, 8), _layer(8, 24, stride=2)
        )  # of the picture's side
        self.quarter_more = nn.Sequential(_layer(24, 24), _layer(24, 24))
        self.eighth = nn.Sequential(_layer(24, 64, stride=2), _layer(64, 64), _layer(64, 64, kernel=1))
        self.sixteenth = nn.Sequential(_layer(64, 64, stride=2), _layer(64, 64), _layer(64, 64))
        self.last = nn.Sequential(
            _layer(64, 128, stride=2), _layer(128, 128), _layer(128, 128), _layer(128, 64, kernel=1)
        )
        self.fusion = nn.Sequential(_layer(64, 64), _layer(64, 64), nn.Conv2d(64, 64, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Descriptors, one for 8x8 pixels."""
        grey = F.instance_norm(pictures.mean(1, keepdim=True))
        fine = self.quarter_more(self.quarter(grey) + self.skip(F.avg_pool2d(grey, 4)))
        eighth = self.eighth(fine)
        sixteenth = self.sixteenth(eighth)
        last = self.last(sixteenth)
        coarse = [F.interpolate(maps, eighth.shape[-2:], mode="bilinear") for maps in (sixteenth, last)]
        fused: Tensor = self.fusion(eighth + coarse[0] + coarse[1])
        return fused


def _layer(channels: int, out: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out, affine=False), nn.ReLU())


def _read(path: Path) -> Iterator[Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return (tensor for name, tensor in content.items() if not name.startswith(_HEADS))
