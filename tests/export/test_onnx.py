import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder.small import small

from theia.encoder.encoder import Encoder
from theia.errors import ConfigError, ExportError
from theia.export import onnx
from theia.export.export import export


def images(batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)


@pytest.fixture(scope="module", params=["size", "scale_factor"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Any]:
    """An encoder, and a session of ONNX Runtime with its graph."""
    path = tmp_path_factory.mktemp("onnx") / "graph.onnx"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(small(registers=4, positions=request.param, depth=1))  # blocks are alike
        torch.nn.init.normal_(encoder.distiller.student.backbone.model.pos_embed)
    onnx.write_graph(encoder, path)
    return encoder, onnx.start_session(path)


@torch.no_grad()
def test_one_graph_gives_the_encoders_features_for_any_batch_and_size(exported: tuple[Encoder, Any]) -> None:
    encoder, session = exported
    assert [given.type for given in session.get_inputs()] == ["tensor(uint8)"]
    for shape in ((1, 224, 224), (3, 96, 160), (2, 272, 224), (1, 16, 16)):
        expected = encoder.forward_features(images(*shape))
        patches, cls, registers = session.run(["patches", "cls", "registers"], {"images": images(*shape)})
        for given, wanted in ((patches, expected.patches), (cls, expected.cls), (registers, expected.registers)):
            np.testing.assert_allclose(given, wanted.numpy(), atol=1e-4)


def test_a_graph_refuses_what_is_no_multiple_of_its_patches(exported: tuple[Encoder, Any]) -> None:
    with pytest.raises(Exception, match=r"cannot be reshaped.*\{1,225,224,3\}"):
        exported[1].run(None, {"images": images(1, 225, 224)})


@pytest.fixture(scope="module")
def patches_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of a student without a CLS token. Not to be changed by a test."""
    path = tmp_path_factory.mktemp("onnx") / "graph.onnx"
    onnx.write_graph(Encoder(small(registers=0, depth=1)), path)
    return path


def test_parity_looks_at_every_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "SIZES", ((96, 96),))
    encoder = Encoder(small(registers=4, depth=1))
    vit = encoder.distiller.student.backbone.model
    # A layer later than this token's would not change the others.
    monkeypatch.setattr(vit.blocks[0].attn, "forward", lambda tokens, **_: torch.zeros_like(tokens))
    onnx.write_graph(encoder, tmp_path / "graph.onnx")
    for token in (vit.cls_token, vit.reg_token):
        exported = token.detach().clone()
        torch.nn.init.normal_(token)
        assert onnx.parity(encoder, tmp_path / "graph.onnx")["96x96"]["least_cosine"] < 0.5
        token.data = exported
    assert onnx.parity(encoder, tmp_path / "graph.onnx")["96x96"]["least_cosine"] > 0.999


def test_a_student_without_cls_has_one_output(patches_only: Path) -> None:
    assert [output.name for output in onnx.start_session(patches_only).get_outputs()] == ["patches"]


@pytest.mark.slow
def test_an_export_reports_how_well_it_agrees(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    lines = export(checkpoint(), tmp_path / "out", ["onnx"], int8=True)

    report = json.loads((tmp_path / "out/onnx/parity.json").read_text())
    assert set(report["encoder.onnx"]) == {"224x224", "160x240", "320x256"}
    assert all(found["least_cosine"] > 0.99999 for found in report["encoder.onnx"].values())
    assert all(0.999 <= found["least_cosine"] < 0.9999999 for found in report["encoder.int8.onnx"].values())
    assert len(lines) == 6
    sizes = [(tmp_path / "out/onnx" / name).stat().st_size for name in ("encoder.int8.onnx", "encoder.onnx")]
    assert sizes[0] < sizes[1]


def test_int8_that_is_too_far_off_is_refused_with_the_figure(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "LEAST_INT8_COSINE", 0.99999999)
    monkeypatch.setattr(onnx, "SIZES", ((96, 96),))
    with pytest.raises(ExportError, match=r"int8.*96x96.* 0\.99\d+.*--int8"):
        export(checkpoint(), tmp_path / "out", ["onnx"], int8=True)
    assert not (tmp_path / "out").exists()


def test_an_int8_graph_that_cannot_be_written_is_told(patches_only: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ExportError, match=r"int8 graph of graph\.onnx.*two more copies"):
            onnx.quantise(patches_only, tmp_path / "int8.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "_PACKAGES", ("onnx", "a_package_of_nobody"))
    with pytest.raises(ConfigError, match=r"a_package_of_nobody.*pip install 'theia\[onnx\]'"):
        onnx.check_installed()


def test_photographs_are_held_out_ones_of_the_wanted_size() -> None:
    photos = onnx.photographs(160, 240)
    assert photos.shape == (4, 160, 240, 3)
    assert photos.dtype == np.uint8
    assert photos.std() > 20
