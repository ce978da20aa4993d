"""How the four teachers that come through transformers get their weights."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from events import PATIENCE_S
from safetensors.torch import load_file, save_file

from theia.errors import ConfigError, ShapeError, WeightsError
from theia.teacher import check_features
from theia_teachers._huggingface import Preprocessing
from theia_teachers.clip import CLIP
from theia_teachers.depth_anything import DepthAnything
from theia_teachers.dinov2 import DINOv2
from theia_teachers.vit import ViT

TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {
    CLIP: {**TRANSFORMER, "intermediate_size": 48},
    DINOv2: TRANSFORMER,
    ViT: {**TRANSFORMER, "intermediate_size": 48},
    DepthAnything: {**TRANSFORMER, "num_hidden_layers": 4, "fusion_hidden_size": 16, "head_hidden_size": 8},
}
each_teacher = pytest.mark.parametrize("teacher_class", SMALL, ids=lambda teacher: teacher.spec.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder of a small ViT, in the upstream format."""
    return save(ViT, tmp_path / "vit")


def save(teacher_class, folder: Path) -> Path:
    teacher_class(weights="random", architecture=SMALL[teacher_class]).model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Random weights


@each_teacher
@torch.no_grad()
def test_random_weights_repeat_and_give_what_the_spec_says(teacher_class, images, caplog):
    first, second = (teacher_class(weights="random", architecture=SMALL[teacher_class]).eval() for _ in range(2))

    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    features = first(images)
    check_features(first.spec, features, 2)
    assert torch.equal(features.patches, second(images).patches)
    sizes = {f"{name} {size}" for name, size in SMALL[teacher_class].items()}
    assert first.spec.weights == "random"
    assert set(first.spec.revision.split(", ")) == {"seed 0", *sizes}
    assert "random weights" in caplog.text


@each_teacher
def test_random_weights_leave_the_callers_random_state_alone(teacher_class):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)

    teacher_class(weights="random", architecture=SMALL[teacher_class])

    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": {"depth": 2}}, r"no 'depth'\. It takes hidden_size"),
        ({"architecture": {"hidden_size": 30}}, "multiple of num_attention_heads"),
        ({"architecture": {"num_hidden_layers": 0}}, "above 0"),
        ({"revision": "main"}, "'revision' is a commit"),
        ({"weights": "owner/name", "architecture": TRANSFORMER}, "'architecture' is for random weights"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ViT(**{"weights": "random", **options})


@each_teacher
def test_images_that_are_not_uint8_are_refused(teacher_class):
    teacher = teacher_class(weights="random", architecture=SMALL[teacher_class])

    with pytest.raises(ShapeError, match="uint8"):
        teacher(torch.rand(1, 3, 224, 224))


# Local folders


@each_teacher
@torch.no_grad()
def test_a_saved_folder_gives_the_same_features(teacher_class, tmp_path, images):
    built = teacher_class(weights="random", architecture=SMALL[teacher_class]).eval()
    built.model.save_pretrained(tmp_path)

    loaded = teacher_class(weights=str(tmp_path)).eval()

    assert torch.equal(loaded(images).patches, built(images).patches)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert (loaded.spec.weights, loaded.spec.revision) == (str(tmp_path), f"sha256:{digest}")
    assert loaded.spec.channels == built.spec.channels


@torch.no_grad()
def test_weights_in_parts_and_in_pickles_load_too(folder, tmp_path, images):
    whole = ViT(weights=str(folder)).eval()
    whole.model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    for path in (tmp_path / "parts", folder):
        assert torch.equal(ViT(weights=str(path)).eval()(images).patches, whole(images).patches)


def test_half_precision_weights_become_float32(folder):
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, dtype="float16", torch_dtype="float16")

    assert {parameter.dtype for parameter in ViT(weights=str(folder)).parameters()} == {torch.float32}


@each_teacher
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_weights_are_refused(teacher_class, damage, tmp_path):
    path = save(teacher_class, tmp_path) / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes({"truncated": good[: len(good) // 2], "garbage": b"\xff" * 999, "empty": b""}[damage])

    with pytest.raises(WeightsError, match=f"'{teacher_class.spec.name}' cannot load the weights in .*damaged"):
        teacher_class(weights=str(tmp_path))


def test_a_truncated_pickle_is_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("r+b") as file:
        file.truncate(5000)

    with pytest.raises(WeightsError, match="damaged"):
        ViT(weights=str(folder))


@each_teacher
def test_a_lost_tensor_is_named(teacher_class, tmp_path):
    path = save(teacher_class, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "patch_embedding" in name and name.endswith("weight"))
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(WeightsError, match=f"1 missing .*{lost.removeprefix('vision_model.')}"):
        teacher_class(weights=str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 3}, r"16 missing \("),
        ({"num_hidden_layers": 1}, r"16 too many \("),
        ({"hidden_size": 64}, r"of another shape \(.*embeddings"),
        ({"patch_size": 16}, r"2 of another shape \(.*position_embeddings"),
    ],
    ids=["deeper", "shallower", "wider", "patch"],
)
def test_weights_of_another_architecture_are_refused(config, message, folder):
    edit_config(folder, **config)

    with pytest.raises(WeightsError, match=message):
        ViT(weights=str(folder))


@each_teacher
def test_another_kind_of_model_is_refused(teacher_class, tmp_path):
    other = DINOv2 if teacher_class is not DINOv2 else ViT
    save(other, tmp_path)

    with pytest.raises(WeightsError, match=f"takes a model of type .*config.json says '{other.spec.name}'"):
        teacher_class(weights=str(tmp_path))


def test_a_folder_without_config_or_weights_is_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds neither model\.safetensors nor"):
        ViT(weights=str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"cannot read .*config\.json"):
        ViT(weights=str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"cannot read .*config\.json"):
        ViT(weights=str(folder))


@pytest.mark.parametrize("weights", ["/no/such/folder", "radnom", "./vit", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(weights):
    with pytest.raises(WeightsError, match=r"neither an existing folder.*--vit\.weights"):
        ViT(weights=weights)


# Model hub


@pytest.fixture
def hub_cache(folder, tmp_path, monkeypatch) -> str:
    """A repository in the hub client's cache, as a download leaves it; returns its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--owner--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return commit


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_from_the_hub_are_known_by_their_commit(hub_cache, tmp_path, suffix):
    if suffix == "bin":
        (safe,) = (tmp_path / "cache").rglob("model.safetensors")
        torch.save(load_file(safe), safe.with_name("pytorch_model.bin"))
        safe.unlink()

    teacher = ViT(weights="owner/vit")

    assert (teacher.spec.weights, teacher.spec.revision) == ("owner/vit", hub_cache)


def test_an_unfinished_download_is_refused(hub_cache, tmp_path):
    (safe,) = (tmp_path / "cache").rglob("model.safetensors")
    safe.unlink()

    with pytest.raises(WeightsError, match=r"holds neither model\.safetensors nor"):
        ViT(weights="owner/vit")


@each_teacher
def test_no_network_is_an_error_with_model_cause_and_alternative(teacher_class, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name, weights = teacher_class.spec.name, teacher_class.spec.weights

    with pytest.raises(WeightsError) as error:
        teacher_class()

    message = str(error.value)
    assert f"'{name}'" in message
    assert f"'{weights}'" in message
    assert "HF_HUB_OFFLINE" in message
    assert f"--{name}.weights /path/to/folder" in message


@pytest.mark.slow
def test_an_unreachable_hub_gives_up(tmp_path):
    code = "from theia_teachers.vit import ViT; ViT()"

    with socket.socket() as taken:  # a port that is taken, and that nothing listens on
        taken.bind(("127.0.0.1", 0))
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{taken.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        environment = {**os.environ, **hub, "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": str(int(PATIENCE_S))}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "WeightsError" in last
    assert "google/vit-huge-patch14-224-in21k" in last
    assert "refused" in last


# Cost


def test_importing_the_plugins_does_not_import_transformers():
    code = (
        "import sys, theia_teachers.clip, theia_teachers.dinov2, theia_teachers.vit, theia_teachers.depth_anything; "
        "sys.exit('transformers' in sys.modules or 'huggingface_hub' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.gpu
def test_preprocessing_on_a_gpu_waits_for_nothing():
    preprocess = Preprocessing(size=224, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    images = torch.zeros(2, 3, 240, 240, dtype=torch.uint8, device="cuda")
    expected = preprocess(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pixels = preprocess(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(pixels, expected)
