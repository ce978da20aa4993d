import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from encoder.small import TEACHERS
from safetensors.torch import load_file, save_file

import theia
from theia.encoder.encoder import Encoder
from theia.errors import CheckpointError, ConfigError, TheiaError, WeightsError
from theia.export.export import export

Checkpoint = Callable[..., Path]


def images() -> torch.Tensor:
    return torch.randint(256, (1, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    export(checkpoint(), tmp_path / "exported", ["safetensors"])
    return tmp_path / "exported"


@torch.no_grad()
def test_checkpoint_and_folder_hold_the_same_encoder(encoder: Encoder, checkpoint: Checkpoint, folder: Path) -> None:
    for source in (checkpoint(), str(folder)):
        loaded = theia.load(source)
        assert not loaded.training
        assert torch.equal(loaded(images()), encoder(images()))
        for denormalize in (False, True):
            expected = encoder.translate(images(), denormalize=denormalize)
            given = loaded.translate(images(), denormalize=denormalize)
            assert all(torch.equal(given[name], value) for name, value in expected.items())


def test_device_and_type(folder: Path) -> None:
    loaded = theia.load(folder, device="cpu", dtype=torch.float16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}


def test_a_students_start_is_kept_without_the_path_of_it(encoder: Encoder, checkpoint: Checkpoint) -> None:
    options = {**encoder.architecture.as_dict(), "weights": "/somewhere/deit.pth"}
    state = {f"distiller.{name}": value for name, value in encoder.distiller.state_dict().items()}
    loaded = theia.load(checkpoint(hyper_parameters=options, state_dict=state))
    assert loaded.architecture.weights == "pretrained"
    assert loaded.distiller.student.backbone.model.norm.eps == 1e-6


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def _change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (_truncate, "cut short"),
        (_change_config(model_type="vit"), "another family .model_type 'vit'"),
        (_change_config(architecture={}), "architecture of .* incomplete or wrong: .*teachers"),
        (_change_config(architecture=None), "has no architecture"),
        (_change_config(architecture={"teachers": TEACHERS, "neck": 1}), "does not know: neck"),
        (_change_config(architecture={"teachers": TEACHERS, "positions": "nearest"}), "positions.*'scale_factor'"),
        (_change_config(architecture={"teachers": TEACHERS, "image_size": [224]}), "image_size.*int"),
        (_change_config(architecture={"teachers": TEACHERS, "image_size": None}), "incomplete or wrong"),
        (_change_config(architecture={"teachers": {"clip": 3}}), "teachers.*dict"),
        (_change_config(pool="median"), "no pooling 'median'"),
        (_change_config(architecture={"teachers": {}}), "No teachers"),
        (_change_config(architecture={"teachers": {"clip": {}}}), "clip"),
        (
            _change_tensors(lambda tensors: tensors.pop("distiller.student.backbone.model.norm.bias")),
            "model.norm.bias is missing",
        ),
        (_change_tensors(lambda tensors: tensors.update(more=torch.ones(1))), "more is left over"),
        (
            _change_tensors(
                lambda tensors: tensors.update({"distiller.student.backbone.model.norm.bias": torch.ones(7)})
            ),
            r"model.norm.bias has shape \(7,\), not \(32,\)",
        ),
        (
            _change_tensors(lambda tensors: tensors["distiller.student.backbone.model.norm.bias"].fill_(torch.nan)),
            "model.norm.bias is not finite",
        ),
        (
            _change_tensors(lambda tensors: tensors.update({"distiller.scalers.odd.std": torch.zeros(5)})),
            "scalers.odd.std is not positive",
        ),
        (
            _change_tensors(
                lambda tensors: tensors.update({"distiller.scalers.odd.mean": torch.zeros(5, dtype=torch.int64)})
            ),
            "scalers.odd.mean is torch.int64",
        ),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(TheiaError, match=message):
        theia.load(folder)


def test_a_damaged_checkpoint_is_refused(checkpoint: Checkpoint) -> None:
    path = checkpoint()
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="truncated"):
        theia.load(path)
    with pytest.raises(WeightsError, match="is missing"):
        theia.load(checkpoint(state_dict={}))
    with pytest.raises(WeightsError, match="no revision 'v1'"):
        theia.load(checkpoint(), revision="v1")


def test_a_run_folder_points_to_what_it_holds(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoint().rename(tmp_path / "checkpoints/last.ckpt")
    (tmp_path / "config.yaml").write_text("model: {}")
    named = rf"nearby: {tmp_path}/checkpoints/last\.ckpt\.$"
    for source in ("", "checkpoints", "checkpoints/best.ckpt", "config.yaml", "exporte"):
        with pytest.raises((WeightsError, CheckpointError), match=named):
            theia.load(tmp_path / source)
    (tmp_path / "checkpoints/damaged.ckpt").write_text("")
    with pytest.raises(CheckpointError, match=named):
        theia.load(tmp_path / "checkpoints/damaged.ckpt")
    (tmp_path / "checkpoints/damaged.ckpt").unlink()
    export(tmp_path / "checkpoints/last.ckpt", tmp_path / "exported", ["safetensors"])
    with pytest.raises(WeightsError, match=rf"nearby: {tmp_path}/exported or {tmp_path}/checkpoints/last.ckpt\.$"):
        theia.load(tmp_path)


def test_a_path_that_looks_like_an_id_points_to_what_its_folder_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "run").mkdir()
    folder.rename(folder.parent / "run/exported")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(WeightsError, match=r"'run/export'.*nearby: run/exported\.$"):
        theia.load("run/export")


def test_a_file_of_a_model_stands_for_its_folder_and_others_point_to_it(folder: Path, encoder: Encoder) -> None:
    for name in ("config.json", "model.safetensors"):
        assert torch.equal(theia.load(folder / name)(images()), encoder(images()))
    (folder / "onnx").mkdir()
    (folder / "onnx/encoder.onnx").write_bytes(b"graph")
    for name in ("README.md", "onnx", "onnx/encoder.onnx"):
        with pytest.raises((WeightsError, CheckpointError), match=rf"nearby: {folder}\.$"):
            theia.load(folder / name)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"no config\.json"):
        theia.load(folder / "model.safetensors")


def test_the_folder_that_an_interrupted_export_moved_away_is_named(folder: Path) -> None:
    folder.rename(folder.with_name(".exported.old"))
    with pytest.raises(WeightsError, match=r"nearby: .*/\.exported\.old\.$"):
        theia.load(folder)


def test_paths_of_any_kind(folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __fspath__(self) -> str:
            return str(folder)

    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder)
    for source in (Entry(), "~/exported", "."):
        assert torch.equal(theia.load(source)(images()), encoder(images()))
    for nothing in ("", " ", None, b"exported", 3, [str(folder)]):
        with pytest.raises(WeightsError, match="names no model"):
            theia.load(nothing)
    with pytest.raises(WeightsError, match="no file or folder '~nobody-of-that-name/x'"):
        theia.load("~nobody-of-that-name/x/")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "put on device 'gpu'"),
        ({"device": "cuda:4096"}, "put on device 'cuda:4096'"),
        ({"dtype": "bfloat16"}, "cannot be of type 'bfloat16'"),
        ({"dtype": torch.int8}, "cannot be of type torch.int8"),
    ],
)
def test_a_place_that_is_none_is_named(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        theia.load(folder, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32_in_narrower_models(folder: Path, encoder: Encoder, dtype: torch.dtype) -> None:
    raw = torch.full((1, 256, 12), 100.3)
    loaded = theia.load(folder, dtype=dtype)
    assert torch.equal(loaded.distiller.normalize("clip", raw), encoder.distiller.normalize("clip", raw))
    assert loaded.distiller.student.pixel_mean.dtype == torch.float32


def test_nothing_to_load_says_what_there_might_be(tmp_path: Path) -> None:
    for source in ("nowhere", str(tmp_path / "run/checkpoints/last.ckpt"), tmp_path / "a/b"):
        with pytest.raises(WeightsError, match="no file or folder"):
            theia.load(source)


def test_a_hub_that_is_not_asked_names_id_cause_and_the_other_way() -> None:
    with pytest.raises(WeightsError, match=r"'owner/model-of-nobody'.*HF_HUB_OFFLINE is set.*give their path"):
        theia.load("owner/model-of-nobody")


def test_a_hub_that_has_no_such_model_names_id_cause_and_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: str, **__: str | None) -> str:
        raise OSError("no such repository")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(WeightsError, match=r"'owner/model-of-nobody'.*hub either: OSError: no such .*local folder"):
        theia.load("owner/model-of-nobody")


def test_the_hub_is_asked_for_two_files_of_a_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    theia.load("owner/model", revision="v1")
    assert asked == [("owner/model", name, "v1") for name in ("config.json", "model.safetensors")]


def test_importing_theia_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, theia; assert not {'torch', 'transformers', 'timm'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)
