"""The main job on a CUDA device; needs one: pytest -m gpu."""

import json
from pathlib import Path

import pytest

from theia.cli.main import main

pytestmark = pytest.mark.gpu


def test_extract_fit_and_test_on_a_gpu(tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    small_vit = "{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2}"
    extraction = [
        "--images={train: 'sample:64', val: 'sample:8'}", f"--store={store}", "--teachers=vit,color",
        "--accelerator=cuda", "--precision=bf16-mixed", "--vit.weights=random", f"--vit.architecture={small_vit}",
    ]  # fmt: skip
    options = [
        f"--data.store={store}", f"--run_folder={run}", "--data.batch_size=16", "--trainer.accelerator=gpu",
        "--trainer.devices=1", "--trainer.precision=bf16-mixed", "--model.width=64", "--model.depth=2",
        "--model.heads=2", "--model.learning_rate=2e-3",
    ]  # fmt: skip

    assert main(["extract", *extraction]) == 0
    assert main(["store", "verify", str(store)]) == 0
    assert main(["fit", *options, "--trainer.max_epochs=10"]) == 0
    assert main(["test", f"--config={run / 'config.yaml'}", "--ckpt_path=best"]) == 0

    report = json.loads((run / "test_best.json").read_text())
    assert report["device"] == "cuda:0"
    for teacher in ("vit", "color"):
        assert report["after"][f"test/cosine/{teacher}"] > report["before"][f"test/cosine/{teacher}"] + 0.05
