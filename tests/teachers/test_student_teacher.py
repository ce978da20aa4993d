import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from encoder import published
from encoder.small import small
from PIL import Image
from torch import Tensor

import theia
from theia.cli.main import main
from theia.encoder.encoder import Encoder
from theia.errors import ConfigError, WeightsError
from theia.export.export import export
from theia.registry import create
from theia.store.reader import FeatureStore
from theia.teacher import check_features
from theia_teachers.student import Theia

Checkpoint = Callable[..., Path]
RECORD = {"teachers": {"clip": {"licence": "MIT"}, "odd": {"licence": "CC-BY-NC-4.0"}}}


def sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def of(**options: object) -> dict[str, object]:
    """Content of a checkpoint of another architecture than the fixture's."""
    built = Encoder(small(**options))
    state = {f"distiller.{name}": value for name, value in built.distiller.state_dict().items()}
    return {"hyper_parameters": built.architecture.as_dict(), "state_dict": state}


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    export(checkpoint(), tmp_path / "exported", ["safetensors"], RECORD)
    return tmp_path / "exported"


@torch.no_grad()
def test_features_are_those_of_the_loaded_encoder(folder: Path, images: Tensor) -> None:
    expected = theia.load(folder).forward_features(images)

    teacher = create("theia", {"weights": str(folder)})
    features = teacher(images)

    assert torch.equal(features.patches, expected.patches)
    assert torch.equal(features.cls, expected.cls)
    check_features(teacher.spec, features, len(images))
    assert (teacher.spec.channels, teacher.spec.grid_hw, teacher.spec.has_cls) == (32, (14, 14), True)
    assert not {name for name, _ in teacher.named_parameters() if "translators" in name}


@torch.no_grad()
def test_a_checkpoint_without_cls_of_another_size_sees_resized_images(
    checkpoint: Checkpoint, photographs: list[np.ndarray], images: Tensor
) -> None:
    path = checkpoint(**of(image_size=160, registers=0))
    resized = [np.asarray(Image.fromarray(one).resize((160, 160), Image.Resampling.BICUBIC)) for one in photographs]
    expected = theia.load(path).forward_features(np.stack(resized))

    teacher = create("theia", {"weights": str(path)})
    features = teacher(images)

    assert teacher.spec.grid_hw == (10, 10)
    assert features.cls is None
    assert not teacher.spec.has_cls
    # Pillow rounds a few pixels to the neighbouring grey level.
    torch.testing.assert_close(features.patches, expected.patches, rtol=0.02, atol=0.02)


def test_what_it_is_stands_in_its_spec(folder: Path, checkpoint: Checkpoint) -> None:
    spec = Theia(weights=str(folder)).spec
    assert spec.weights == str(folder)
    assert spec.revision == sha256(folder / "model.safetensors")
    assert spec.licence == "CC-BY-NC-4.0 and MIT"
    assert spec.preprocessing["size"] == 224
    assert Theia(weights=str(folder / "config.json")).spec.revision == spec.revision

    of_checkpoint = Theia(weights=str(checkpoint())).spec
    assert of_checkpoint.revision == sha256(checkpoint())
    assert of_checkpoint.licence == "not recorded in a checkpoint"


def test_a_teacher_without_a_recorded_licence_is_not_passed_over(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export(checkpoint(), tmp_path / "exported", ["safetensors"], {"teachers": {"clip": {"licence": "MIT"}}})
    assert Theia(weights=str(tmp_path / "exported")).spec.licence == "MIT and not recorded"


@torch.no_grad()
def test_a_model_on_the_hub_is_recorded_by_its_commit(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = published.write(tmp_path / "c0ffee")
    asked = []

    def snapshot(repository: str, revision: str | None, **_: object) -> str:
        asked.append((repository, revision))
        return str(model.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    teacher = create("theia", {"weights": "somebody/tiny", "revision": "v2"})

    assert asked == [("somebody/tiny", "v2")]
    assert (teacher.spec.weights, teacher.spec.revision, teacher.spec.channels) == ("somebody/tiny", "c0ffee", 192)
    assert teacher.spec.licence == Theia.spec.licence
    torch.testing.assert_close(teacher(images).patches, model.tokens(images)[:, 1:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_random_weights_repeat_and_are_warned_about(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (create("theia", {"weights": "random"}) for _ in range(2))
    assert "random weights" in caplog.text
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert (first.spec.channels, first.spec.grid_hw, first.spec.revision) == (768, (14, 14), "seed 0")
    check_features(first.spec, first(images[:1]), 1)


def test_other_models_and_revisions_of_local_ones_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'revision' is a commit on the model hub"):
        Theia(weights=str(folder), revision="main")
    with pytest.raises(WeightsError, match=r"neither an existing folder, nor a hub id .* --theia\.weights"):
        Theia(weights=str(tmp_path / "gone"))
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "dinov2"}))
    with pytest.raises(WeightsError, match="of another family"):
        Theia(weights=str(folder))


def test_a_small_student_learns_from_a_stored_one(folder: Path, tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    extraction = [
        "--images={train: 'sample:8', val: 'sample:4'}", "--teachers=theia", f"--theia.weights={folder}",
        f"--store={store}", "--workers=0", "--accelerator=cpu",
    ]  # fmt: skip
    assert main(["extract", *extraction]) == 0
    split = FeatureStore(store).open_split("val", ["theia"])
    assert split.teachers["theia"].revision == sha256(folder / "model.safetensors")

    options = [
        f"--data.store={store}", f"--run_folder={run}", "--data.batch_size=4", "--data.workers=0",
        "--model.width=16", "--model.depth=2", "--model.heads=2", "--trainer.max_steps=3", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--model.learning_rate=1e-2",
    ]  # fmt: skip
    assert main(["fit", *options]) == 0
    assert theia.load(run / "checkpoints" / "last.ckpt").architecture.teachers == {
        "theia": {"channels": 32, "grid_hw": [14, 14], "has_cls": True}
    }
