"""The whole way with backbones and translators of several kinds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModel

import theia
from theia.cli.main import main
from theia.errors import ExportError
from theia.export import onnx
from theia.export.formats import Exported, check
from theia.models.backbone import StudentOptions
from theia.models.student import Student
from theia.models.translators import TranslatorKind

pytestmark = pytest.mark.usefixtures("one_parser")

IMAGES = torch.arange(2 * 32 * 32 * 3).remainder(251).to(torch.uint8).reshape(2, 32, 32, 3)

# By kind: options, stride and width of a token.
BACKBONES = {
    "vit": (["--model.backbone=timm:test_vit"], 16, 64),
    "convnext": (["--model.backbone=timm:test_convnext"], 32, 64),
    "mobilenet": (["--model.backbone=timm:mobilenetv4_conv_small", "--model.backbone_stage=2"], 8, 64),
}


def fit(store: Path, run: Path, options: Sequence[str]) -> int:
    return main([
        "fit", f"--data.store={store}", f"--run_folder={run}", "--data.batch_size=16", "--data.workers=0",
        "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1", "--model.translator=linear", *options,
    ])  # fmt: skip


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_goes_the_whole_way(kind: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, stride, width = BACKBONES[kind]
    run, exported = tmp_path / "run", tmp_path / "run" / "exported"
    monkeypatch.setattr(onnx, "SIZES", ((32, 32), (96, 64)))

    assert fit(store, run, options) == 0
    last = run / "checkpoints" / "last.ckpt"
    assert main(["test", f"--config={run / 'config.yaml'}", "--ckpt_path=last", "--compare_untrained=false"]) == 0
    assert main(["export", f"--ckpt={last}", "--formats=safetensors,onnx"]) == 0

    trained, loaded = theia.load(last), theia.load(exported)
    expected = trained.forward_features(IMAGES)
    assert expected.patches.shape == (2, (32 // stride) ** 2, width)
    assert torch.equal(loaded.forward_features(IMAGES).patches, expected.patches)
    assert torch.equal(AutoModel.from_pretrained(exported).encoder.forward_features(IMAGES).patches, expected.patches)
    assert {name: tokens.shape[1] for name, tokens in loaded.translate(IMAGES).items()} == {"alpha": 16, "beta": 18}
    parity = json.loads((exported / "onnx" / "parity.json").read_text())[onnx.MODEL]
    assert len(parity) == 2
    assert all(size["least_cosine"] > 0.99999 for size in parity.values())
    for wanted in ("timm", "authors"):
        with pytest.raises(ExportError, match=wanted):
            check(Exported(loaded, loaded.architecture, {}), [wanted])


@pytest.mark.parametrize("kind", get_args(TranslatorKind))
def test_a_translator_goes_the_whole_way(kind: str, store: Path, tmp_path: Path) -> None:
    run, exported = tmp_path / "run", tmp_path / "run" / "exported"
    size = ["--model.width=16", "--model.depth=2", "--model.heads=2", "--trainer.max_steps=2"]

    assert fit(store, run, [*size, f"--model.translator={kind}"]) == 0
    last = run / "checkpoints" / "last.ckpt"
    assert main(["test", f"--config={run / 'config.yaml'}", "--ckpt_path=last", "--scorers=readout"]) == 0
    assert main(["export", f"--ckpt={last}", "--formats=safetensors"]) == 0
    shown = tmp_path / "decoded"
    assert main(["decode", f"--encoder={exported}", "--images=sample:1", f"--out={shown}", "--device=cpu"]) == 0

    trained, loaded = theia.load(last), theia.load(exported)
    assert loaded.architecture.translator == kind
    expected = trained.translate(IMAGES)
    assert {name: tokens.shape for name, tokens in expected.items()} == {"alpha": (2, 16, 8), "beta": (2, 18, 5)}
    compiled = theia.load(exported)
    compiled.compile(backend="eager")
    for model in (loaded, compiled, AutoModel.from_pretrained(exported).encoder):
        given = model.translate(IMAGES / 255)
        assert all(torch.allclose(given[name], value, atol=1e-5) for name, value in expected.items())
    # What a robot uses is the same student, whatever read it.
    state = torch.load(last, weights_only=True)["state_dict"]
    student = Student(StudentOptions(image_size=32, width=16, depth=2, heads=2))
    prefix = "distiller.student."
    student.load_state_dict({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
    tokens = student(torch.from_numpy(IMAGES.numpy().transpose(0, 3, 1, 2)))
    torch.testing.assert_close(loaded.forward_features(IMAGES).patches, tokens.patches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.backbone=timm:test_convnext", "--model.translator=ladder"], "no such blocks"),
        (["--model.backbone=convnext_atto"], "timm:convnext_atto"),
        (["--model.backbone=timm:convnext_nothing"], "no model 'convnext_nothing'"),
        (["--model.backbone=timm:test_convnext", "--model.width=32"], "model.width"),
        (["--model.backbone=timm:test_convnext", "--model.registers=4"], "model.registers"),
        (["--model.backbone=timm:test_convnext", "--model.backbone_stage=9"], "no block or stage 9"),
        (["--model.backbone=timm:test_convnext", "--model.distill_cls=true"], "CLS token"),
        (["--model.backbone_stage=1"], "no stages"),
        (["--model.backbone=timm:test_vit", "--model.weights=nothing.pth"], "No weights file"),
    ],
)
def test_what_does_not_go_with_a_backbone_is_said(
    options: list[str], message: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(store, tmp_path / "run", options) == 1
    assert message in capsys.readouterr().err


def test_options_of_the_version_before_mean_what_they_meant(store: Path, tmp_path: Path) -> None:
    older = ["--model.size=small", "--model.loss", "mse", "--model.width=16", "--model.depth=1", "--model.heads=2"]

    assert fit(store, tmp_path / "run", [*older, "--trainer.max_steps=1"]) == 0

    written = (tmp_path / "run" / "config.yaml").read_text()
    assert "backbone: theia_small" in written
    assert "mse: 1.0" in written
