import json
import shlex
from pathlib import Path

import pytest
import torch

import theia
from theia.cli.main import main

SMALL = ["--trainer.accelerator=cpu", "--model.width=16", "--model.depth=1", "--model.heads=2", "--data.batch_size=16"]


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished fit."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    options = [*SMALL, f"--data.store={store}", f"--run_folder={folder}"]
    assert main(["fit", *options, "--trainer.max_epochs=2", "--seed_everything=5"]) == 0
    assert main(["test", f"--config={folder / 'config.yaml'}", "--ckpt_path=best"]) == 0
    return folder


def test_a_runs_model_is_exported_into_the_run_with_its_figures(
    run: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"--encoder={run}/checkpoints/best.ckpt"]) == 0

    assert capsys.readouterr().out.strip() == f"{run}/exported"
    card = (run / "exported/README.md").read_text()
    report = json.loads((run / "test_best.json").read_text())
    for fact in (f"{report['after']['test/cosine/alpha']:.3f}", report["store"]["manifest_sha256"], "| seed", "MIT"):
        assert fact in card
    assert str(store) not in card + (run / "exported/config.json").read_text()
    encoder = theia.load(run / "exported")
    images = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8)
    translations = encoder.translate(images, denormalize=True)
    assert {name: value.shape for name, value in translations.items()} == {"alpha": (1, 16, 8), "beta": (1, 18, 5)}
    trained = theia.load(run / "checkpoints/best.ckpt")
    assert torch.equal(encoder(images), trained(images))


def test_figures_of_another_checkpoint_are_not_taken(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["export", f"--encoder={run}/checkpoints/last.ckpt", f"--out={tmp_path / 'out'}"]) == 0

    assert "no test_last.json" in capsys.readouterr().err
    assert "not recorded: `theia test`" in (tmp_path / "out/README.md").read_text()


def test_figures_of_an_earlier_file_of_that_name_are_not_taken(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a run/checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "environment.json", "test_best.json"):
        (tmp_path / "a run" / name).write_bytes((run / name).read_bytes())
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    torch.save({**best, "global_step": best["global_step"] + 1}, tmp_path / "a run/checkpoints/best.ckpt")

    assert main(["export", f"--encoder={tmp_path}/a run/checkpoints/best.ckpt"]) == 0

    said = capsys.readouterr().err
    assert "no test_best.json of it" in said
    command = shlex.split(said[said.index("theia test") :])
    assert command[:4] == ["theia", "test", "--config", f"{tmp_path}/a run/config.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder={run}/checkpoints/first.ckpt", "--out={tmp}/x"], "no file or folder"),
        (["--encoder=owner/model"], "--out FOLDER"),
        (["--encoder={run}/checkpoints/best.ckpt", "--out={tmp}/x", "--formats=safetensors,gguf"], "'gguf'"),
        (["--encoder={run}/checkpoints/best.ckpt", "--out={tmp}/x", "--formats=timm"], "no model for this student"),
        (["--encoder={run}/config.yaml", "--out={tmp}/x"], "truncated, damaged or of another kind"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *(argument.format(run=run, tmp=tmp_path) for argument in arguments)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "x").exists()
