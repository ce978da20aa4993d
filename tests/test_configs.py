"""The shipped configurations as a user runs them: from a folder of their own, by the command line."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from theia.ablation.grid import flat
from theia.cli.main import main
from theia.store.schema import ImageSet, hash_ids
from theia.store.writer import SplitWriter
from theia.types import TeacherSpec

pytestmark = pytest.mark.usefixtures("one_parser")

CONFIGS = Path(__file__).parents[1] / "configs"
FIT = sorted(CONFIGS.glob("*.yaml"))
SWEEPS = sorted(CONFIGS.glob("ablations/*.yaml"))
RECIPES = sorted(CONFIGS.glob("cdiv_*.yaml"))

IMAGE_SIZE = 32
TEACHERS = {
    name: TeacherSpec(name=name, channels=6, grid_hw=grid_hw, licence="MIT", weights="none", has_cls=has_cls)
    for name, grid_hw, has_cls in (
        ("clip", (4, 4), True), ("dinov2", (4, 4), True), ("vit", (4, 4), True), ("sam", (8, 8), False),
        ("depth_anything", (8, 8), False), ("efficientnet", (2, 2), False), ("hog", (2, 2), False),
        ("color", (2, 2), False),
    )
}  # fmt: skip

# Nothing but the size of the experiment and the machine.
SMALL = [
    "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1",
    "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--model.width=16", "--model.depth=1", "--model.heads=2", "--data.batch_size=4", "--data.workers=0",
]  # fmt: skip


def write_split(root: Path, split: str, rows: int) -> None:
    ids = [f"{split}/{row}" for row in range(rows)]
    images = ImageSet(
        source={"kind": "test"}, size=IMAGE_SIZE, resize="squash", listed=rows, ids_sha256=hash_ids(ids),
        shard_size=rows,
    )  # fmt: skip
    random = np.random.default_rng(rows)
    writer = SplitWriter(root, split)
    writer.begin(images, list(TEACHERS.values()), "float16", {"device": "cpu"})
    writer.write_images(0, ids, random.integers(0, 256, (rows, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8), None, [])
    for spec in TEACHERS.values():
        patches = random.standard_normal((rows, spec.grid_hw[0] * spec.grid_hw[1], spec.channels), np.float32)
        with writer.open_shard(spec.name, 0) as shard:
            shard.append(patches, patches.mean(1) if spec.has_cls else None)
    writer.finish()


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the name of every shipped teacher."""
    root = tmp_path_factory.mktemp("stores") / "store"
    write_split(root, "train", 8)
    write_split(root, "val", 4)
    return root


def resolved(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What ``theia fit --print_config`` prints."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments, "--print_config"])
    assert stopped.value.code == 0
    printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return printed


def texts(value: Any) -> Iterator[str]:
    """Every string at any depth of a YAML document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


@pytest.mark.parametrize("path", FIT, ids=lambda path: path.stem)
def test_every_shipped_config_trains_and_is_tested(
    path: Path, small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = yaml.safe_load(path.read_text())
    monkeypatch.chdir(tmp_path)  # its store and its run are relative paths
    store = Path(shipped["data"]["store"])
    store.parent.mkdir(parents=True)
    store.symlink_to(small_store)

    assert main(["fit", "--config", str(path), *SMALL]) == 0
    run = Path(shipped["run_folder"])
    assert main(["test", "--config", str(run / "config.yaml"), "--ckpt_path=best"]) == 0

    scores = json.loads((run / "test_best.json").read_text())["after"]
    scored = {name.removeprefix("test/cosine/") for name in scores if name.startswith("test/cosine/")}
    assert scored == set(shipped["data"]["teachers"])


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_started(
    path: Path, small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)  # its base is a relative path
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(path), f"--data.store={small_store}", "--data.batch_size=4", "--dry_run"]
    if path.stem == "ingredients":
        assert main(["ablate", *arguments]) == 1
        assert f"Run: theia store statistics {small_store}" in capsys.readouterr().err
        assert main(["store", "statistics", str(small_store)]) == 0

    assert main(["ablate", *arguments]) == 0

    rows = yaml.safe_load(path.read_text())
    out = capsys.readouterr().out
    assert rows["reference"] in out
    assert f"runs/ablations/{path.stem}/" in out


def test_the_papers_sets_of_teachers() -> None:
    rows = yaml.safe_load((CONFIGS / "ablations/teachers.yaml").read_text())["rows"]
    letters = {"clip": "C", "depth_anything": "De", "dinov2": "Di", "sam": "S", "vit": "V"}
    named = {name: "".join(letters[teacher] for teacher in row["data.teachers"]) for name, row in rows.items()}
    everything = "CDeDiSV"
    expected = {"C", "De", "Di", "S", "V", "CDiV", "CDiS", everything}
    expected |= {everything.replace(letter, "") for letter in letters.values()}
    assert len(rows) == 13
    assert set(named.values()) == expected
    for name, members in named.items():
        meant = everything.replace(name[4:], "") if name.startswith("All") else name
        assert members == meant


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_are_the_papers(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(["--config", str(path)], capsys)

    assert config["trainer"]["max_epochs"] == 50
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["trainer"]["gradient_clip_val"] is None
    assert config["data"]["batch_size"] == 128
    assert config["data"]["fraction"] == 1
    assert set(config["data"]["teachers"]) == {"clip", "dinov2", "vit"}
    paper = {
        "backbone": path.stem.replace("cdiv_", "theia_"),
        "backbone_stage": None,
        "registers": 1,
        "weights": "scratch",
        "width": None,
        "depth": None,
        "heads": None,
        "translator": "cnn",
        "loss": {"cosine": 0.9, "smooth_l1": 0.1},
        "teacher_weights": None,
        "distill_cls": False,
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
        "warmup": 0.1,
    }
    assert {name: config["model"][name] for name in paper} == paper


def test_the_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} == {"cdiv_tiny", "cdiv_small", "cdiv_base"}


def test_what_is_beyond_the_paper_is_the_same_for_all_sizes() -> None:
    added = []
    for path in RECIPES:
        ours = flat(yaml.safe_load(path.with_stem(path.stem.replace("cdiv", "beyond")).read_text()))
        paper = flat(yaml.safe_load(path.read_text()))
        assert ours.pop("run_folder") == paper.pop("run_folder").replace("cdiv", "beyond")
        assert paper.items() <= ours.items()
        added.append({name: value for name, value in ours.items() if name not in paper})
    assert added[0]
    assert added == 3 * added[:1]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_no_config_knows_a_machine(path: Path) -> None:
    for text in texts(yaml.safe_load(path.read_text())):
        place = text.partition(":")[2] if text.startswith("file:") else text
        assert not place.startswith(("/", "~", "\\")), text
        assert "$" not in text, text
        assert ".." not in Path(text).parts, text


def test_what_is_printed_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = resolved(["--config", str(CONFIGS / "cdiv_tiny.yaml"), "--model.warmup=0.2"], capsys)
    printed = tmp_path / "printed.yaml"
    printed.write_text(yaml.safe_dump(first))

    assert resolved(["--config", str(printed)], capsys) == first
    assert first["model"]["warmup"] == 0.2


def test_of_several_configs_the_later_wins_and_the_command_line_over_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("model: {learning_rate: 2.0e-3, warmup: 0.3}\ndata: {teachers: [sam]}\n")
    arguments = ["--config", str(CONFIGS / "cdiv_small.yaml"), "--config", str(later), "--model.warmup=0.4"]

    config = resolved(arguments, capsys)

    assert config["model"]["learning_rate"] == 2e-3
    assert config["model"]["warmup"] == 0.4
    assert config["model"]["backbone"] == "theia_small"
    assert config["data"]["teachers"] == ["sam"]  # a list replaces a list
    assert config["data"]["batch_size"] == 128


def test_training_without_a_store_says_how_to_extract_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(["fit", "--config", str(CONFIGS / "cdiv_tiny.yaml"), "--trainer.accelerator=cpu"]) == 1

    message = capsys.readouterr().err
    assert "stores/imagenet" in message
    assert "theia extract --" in message
    assert not list(tmp_path.iterdir())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])

    assert stopped.value.code == 0
    shown = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {"extract", "store", "teachers", "fit", "validate", "test"} <= shown


def test_help_of_fit_explains_the_options_of_model_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--help"])

    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--model.backbone BACKBONE Backbone of the student: theia_tiny" in shown
    assert "--data.store STORE Folder of the feature store" in shown
    assert "--trainer.max_epochs" in shown
    # The store gives these.
    assert "--model.teachers" not in shown
    assert "--model.image_size" not in shown


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_what_needs_no_model_imports_no_torch(flag: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "theia", flag]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "theia.cli.main" in imported
    assert not {"torch", "numpy", "h5py", "lightning", "transformers", "jsonargparse"} & imported


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "theia", "teachers"]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert {"clip", "dinov2", "vit", "sam", "depth_anything"} <= set(done.stdout.split())
