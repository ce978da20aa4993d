"""What the three teachers have in common: one size of picture, and weights from a file or at random."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theia.errors import ShapeError
from theia.teacher import RANDOM_SEED, random_weights
from theia.types import TeacherFeatures, TeacherSpec

from .packages import Package, find

Network = TypeVar("Network", bound=nn.Module)


def squares(images: Tensor, size: int) -> Tensor:
    """Resizes images to squares, whatever their shape was.

    Args:
        images: RGB, uint8, shape ``(B, 3, H, W)``.
        size: Side of the squares, in pixels.

    Returns:
        Grey levels from 0 to 255, float32, shape ``(B, 3, size, size)``.

    Raises:
        ShapeError: If the images have another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ShapeError(
            f"A teacher takes uint8 images of shape (B, 3, H, W), not {images.dtype} of shape {tuple(images.shape)}. "
            "Convert them first."
        )
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)


def tokens(maps: Tensor) -> TeacherFeatures:
    """Feature maps ``(B, C, H, W)`` as patch tokens."""
    return TeacherFeatures(maps.flatten(2).transpose(1, 2).contiguous())


def build(
    spec: TeacherSpec,
    package: Package,
    weights: str,
    make: Callable[[], Network],
    read: Callable[[Path], Iterable[Tensor]],
) -> tuple[Network, TeacherSpec]:
    """Makes a network and gives it its weights.

    Args:
        spec: Spec of the teacher with the package's weights.
        package: Package that carries the weights.
        weights: See :func:`theia_small_teachers.packages.find`, or ``"random"``.
        make: Function that makes the network without knowledge.
        read: Function that gives the tensors of the package's file, in the order of the network's own; more may follow.

    Returns:
        The network, and its spec. The spec does not depend on where the file is.

    Raises:
        WeightsError: If the weights are not there, or are not the package's.
    """
    if weights == "random":
        with random_weights(spec.name):
            network = make()
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d):
                    # With torch's own start, pictures fade away within a dozen layers.
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return network, replace(spec, weights="random", revision=f"seed {RANDOM_SEED}")
    path = find(package, weights)
    network = make()
    # The file may go on behind what the network takes; too few tensors or other shapes are refused here.
    network.load_state_dict(dict(zip(network.state_dict(), read(path), strict=False)))
    return network, spec
