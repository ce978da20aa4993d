"""The model-zoo entry, called as IsaacLab's ``image_features`` term calls it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from examples.isaaclab_zoo import infer, model_zoo_entry
from theia import Encoder
from theia.errors import ShapeError
from theia.models.architecture import Architecture


def load_encoder() -> Encoder:
    torch.manual_seed(0)
    teachers: dict[str, Any] = {"alpha": {"channels": 4, "grid_hw": [4, 4], "has_cls": False}}
    return Encoder(Architecture(teachers=teachers, width=32, depth=2, heads=2, image_size=64))


def cameras(environments: int, height: int = 64, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (environments, height, width, 3), generator=generator, dtype=torch.uint8)


def test_term_gets_features_of_each_environment_from_a_saved_encoder(tmp_path_factory: pytest.TempPathFactory) -> None:
    encoder = load_encoder()
    path = tmp_path_factory.mktemp("runs") / "last.ckpt"
    tensors = {f"distiller.{name}": tensor for name, tensor in encoder.distiller.state_dict().items()}
    torch.save({"hyper_parameters": encoder.architecture.as_dict(), "state_dict": tensors}, path)
    # As the term does: build once, reset some environments, infer at every step.
    entry = model_zoo_entry(path, device="cpu")
    model = entry["model"]()
    entry["reset"](model, torch.tensor([0, 2]))
    features = entry["inference"](model, cameras(3))
    torch.testing.assert_close(features, encoder(cameras(3), pool="mean"))
    assert not features.requires_grad


def test_batches_do_not_change_the_features() -> None:
    encoder = load_encoder()
    torch.testing.assert_close(infer(encoder, cameras(5), batch_size=2), infer(encoder, cameras(5)))


def test_odd_camera_sizes_are_resized_to_the_nearest() -> None:
    encoder = load_encoder()
    flat = torch.full((2, 50, 70, 3), 90, dtype=torch.uint8)
    expected = encoder(torch.full((2, 48, 64, 3), 90, dtype=torch.uint8), pool="none")
    torch.testing.assert_close(infer(encoder, flat, pool="none"), expected)


def test_a_size_from_a_file_is_a_size() -> None:
    encoder = load_encoder()
    floats = cameras(2) / 255
    assert torch.equal(infer(encoder, floats, image_size=[64, 64]), infer(encoder, floats))
    assert infer(encoder, cameras(2), pool="none", image_size=[32, 48]).shape == (2, 6, 32)


def test_no_environments_give_no_features() -> None:
    assert infer(load_encoder(), cameras(0)).shape == (0, 32)
    assert infer(load_encoder(), cameras(0, 50, 70)).shape == (0, 32)


def test_one_image_without_its_environment_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(64, 64, 3\).*num_envs"):
        infer(load_encoder(), cameras(1)[0])


def test_callables_survive_being_written_as_module_and_name() -> None:
    # IsaacLab's training scripts do this to the whole configuration.
    entry = model_zoo_entry(load_encoder)
    for function in entry.values():
        module = __import__(function.__module__, fromlist=[function.__name__])
        assert getattr(module, function.__name__) is function


def test_four_channels_are_refused() -> None:
    with pytest.raises(ShapeError, match="fourth channel"):
        infer(load_encoder(), torch.zeros(1, 64, 64, 4, dtype=torch.uint8))
