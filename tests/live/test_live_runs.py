"""``theia fit --data LiveData``: the same students as from a store, whatever happens on the way."""

import csv
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from events import wait_for
from live.conftest import SIZE, install, write_images
from trainings import hold, standing

from theia import registry
from theia.cli.main import main

pytestmark = pytest.mark.usefixtures("one_parser")

CONFIG = Path("configs/cdiv_tiny.yaml").absolute()
SMALL = [
    "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--model.width=16", "--model.depth=1",
    "--model.heads=2", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
    "--checkpoint_every=1", "--data.batch_size=8",
]  # fmt: skip
TEACHERS = "--data.teachers=brightest"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Images, a plugin, and what the tests make of them."""
    folder = tmp_path_factory.mktemp("live")
    for name, count in (("train", 40), ("val", 8)):
        write_images(folder / name, count)
    install(folder / "site")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "site")
        registry.find.cache_clear()
        yield folder
    registry.find.cache_clear()


def live(folder: Path, run: Path, *more: str) -> list[str]:
    """A command line as the documentation shows it, with the config that names a store."""
    return [
        "fit", f"--config={CONFIG}", "--data=LiveData", f"--data.images={folder / 'train'}",
        f"--data.val_images={folder / 'val'}", TEACHERS, f"--data.size={SIZE}", f"--data.cache={folder / 'cache'}",
        f"--run_folder={run}", *SMALL, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Run folder of a live training that nobody interrupted."""
    assert main(live(folder, folder / "run", "--data.workers=0")) == 0
    return folder / "run"


def weights(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt")
    return found


def assert_same(ours: Path, theirs: Path) -> None:
    one, other = (weights(path)["state_dict"] for path in (ours, theirs))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def stored(folder: Path) -> Path:
    """Run folder of a training from a store of the same images."""
    arguments = [
        f"--images.train={folder / 'train'}", f"--images.val={folder / 'val'}", "--teachers=brightest",
        f"--store={folder / 'store'}", f"--size={SIZE}", "--workers=0", "--accelerator=cpu",
    ]  # fmt: skip
    assert main(["extract", *arguments]) == 0
    data = [f"--data.store={folder / 'store'}", TEACHERS, "--data.workers=0"]
    assert main(["fit", f"--config={CONFIG}", *data, f"--run_folder={folder / 'stored'}", *SMALL]) == 0
    return folder / "stored"


def test_a_student_is_the_one_that_a_store_would_have_given(run: Path, stored: Path) -> None:
    """Bit by bit: the teacher gives integers, which float16 holds exactly."""
    assert_same(run, stored)
    figures = [list(csv.DictReader((path / "metrics.csv").open())) for path in (run, stored)]
    for row in [*figures[0], *figures[1]]:
        del row["train/images_per_s"], row["train/cpu_s"]
    assert figures[0] == figures[1]


def test_covariances_of_a_live_run_are_those_of_a_store(folder: Path, stored: Path, tmp_path: Path) -> None:
    turned, store = "--model.normalizer=phi_s", folder / "store"
    assert main(["store", "statistics", str(store), "--device=cpu"]) == 0
    data = [f"--data.store={store}", TEACHERS, "--data.workers=0", turned]
    assert main(["fit", f"--config={CONFIG}", *data, f"--run_folder={tmp_path / 'stored'}", *SMALL]) == 0
    assert main(live(folder, tmp_path / "run", "--data.workers=0", turned)) == 0
    assert_same(tmp_path / "run", tmp_path / "stored")


def test_it_is_tested_exported_and_used_like_any_other(run: Path, tmp_path: Path) -> None:
    config = f"--config={run / 'config.yaml'}"
    assert main(["test", config, "--ckpt_path=best", "--scorers=readout", "--data.workers=0"]) == 0
    assert main(["validate", config, "--ckpt_path=best", "--data.workers=0"]) == 0
    assert main(["export", "--ckpt", str(run / "checkpoints" / "best.ckpt"), "--out", str(tmp_path / "student")]) == 0

    report = json.loads((run / "test_best.json").read_text())
    assert report["samples"] == 8
    assert report["scores"]["readout/cosine/brightest"] > 0
    assert report["store"]["teachers"]["brightest"]["licence"] == "MIT"
    assert report["store"]["images"]["kind"] == "folder"
    import theia

    encoder = theia.load(tmp_path / "student")
    assert encoder.forward_features(torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)).patches.shape == (1, 4, 16)


def test_the_class_stands_in_the_config_of_the_run(run: Path) -> None:
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]

    assert data["class_path"] == "theia.live.LiveData"
    assert "store" not in data["init_args"]


def test_a_run_that_keeps_features_ends_with_the_same_student_and_a_store(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    kept = f"--data.keep={tmp_path / 'kept'}"
    assert main(live(folder, tmp_path / "run", kept, "--data.workers=0")) == 0

    assert_same(run, tmp_path / "run")
    assert main(["store", "verify", str(tmp_path / "kept")]) == 0
    data = [f"--data.store={tmp_path / 'kept'}", TEACHERS, "--data.workers=0"]
    assert main(["fit", f"--config={CONFIG}", *data, f"--run_folder={tmp_path / 'stored'}", *SMALL]) == 0
    assert_same(run, tmp_path / "stored")


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 7])
def test_a_killed_run_that_keeps_features_goes_on(folder: Path, run: Path, tmp_path: Path, step: int) -> None:
    """In the midst of the first epoch of five steps, and of the second one, which reads the store."""
    hold(tmp_path / "stand", step)
    stand = ["--trainer.callbacks=trainings.Standing", f"--trainer.callbacks.folder={tmp_path / 'stand'}"]
    keep = [f"--data.keep={tmp_path / 'kept'}", "--data.workers=2"]
    process = forked.theia(*live(folder, tmp_path / "run", *keep), *stand, path=folder / "site")
    wait_for(lambda: standing(tmp_path / "stand") or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    again = ["fit", f"--config={tmp_path / 'run' / 'config.yaml'}", "--ckpt_path=last", "--trainer.callbacks=null"]
    forked.run(*again, path=folder / "site")

    assert_same(run, tmp_path / "run")
    assert main(["store", "verify", str(tmp_path / "kept")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_at_the_next_sample(folder: Path, tmp_path: Path, workers: int) -> None:
    augmented = ["--data.augment_crop=0.3", "--data.augment_flip=0.5", "--data.augment_jitter=0.2"]
    augmented.append("--data.image_sizes=16,32,48")
    commands = {name: live(folder, tmp_path / name, f"--data.workers={workers}", *augmented) for name in ("a", "b")}
    forked.run(*commands["a"], path=folder / "site")
    hold(tmp_path / "stand", 7)  # in the midst of the second epoch of five steps
    stand = ["--trainer.callbacks=trainings.Standing", f"--trainer.callbacks.folder={tmp_path / 'stand'}"]
    process = forked.theia(*commands["b"], *stand, path=folder / "site")
    wait_for(lambda: standing(tmp_path / "stand") or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    again = ["fit", f"--config={tmp_path / 'b' / 'config.yaml'}", "--ckpt_path=last", "--trainer.callbacks=null"]
    forked.run(*again, path=folder / "site")

    assert_same(tmp_path / "a", tmp_path / "b")
    assert weights(tmp_path / "a")["LiveData"] == weights(tmp_path / "b")["LiveData"]


@pytest.mark.slow
def test_two_processes_train_as_one(folder: Path, run: Path, tmp_path: Path) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.workers=1", f"--data.cache={tmp_path / 'cache'}"]
    two.append(f"--data.keep={tmp_path / 'kept'}")
    forked.run(*live(folder, tmp_path / "run", *two), path=folder / "site")

    one, other = weights(run), weights(tmp_path / "run")
    assert one["LiveData"]["loader"] == other["LiveData"]["loader"]
    assert main(["store", "verify", str(tmp_path / "kept")]) == 0
    for name, value in one["state_dict"].items():
        # Sums over 4 + 4 samples round differently from sums over 8, and Adam divides by their size.
        torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.images=nowhere"], "nowhere"),
        (["--data.teachers=brihgtest"], "brightest"),
        (["--data.image_sizes=32,40"], "data.image_sizes has 40. Images of 40x40 pixels do not divide"),
        (["--data.batch_size=64"], "fewer than one global batch"),
        (["--data.teacher_options={brightest: {colour: 3}}"], "no option 'colour'"),
    ],
)
def test_what_cannot_be_trained_on_leaves_nothing(
    folder: Path, tmp_path: Path, more: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(live(folder, tmp_path / "run", f"--data.cache={tmp_path / 'cache'}", *more)) == 1

    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_several_places_are_typed_as_for_an_extraction(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = live(folder, tmp_path / "run", "--print_config")
    at = words.index(f"--data.images={folder / 'train'}")
    words[at : at + 1] = ["--data.images", "a", "b=c"]

    with pytest.raises(SystemExit):
        main(words)

    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["images"] == ["a", "b=c"]


def test_options_of_teachers_reach_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data.teacher_options.brightest={negative: true}", "--data.teacher_options.mean={}"]
    with pytest.raises(SystemExit):
        main(live(folder, tmp_path / "run", *options, "--print_config"))

    shown = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert shown["teacher_options"] == {"brightest": {"negative": True}, "mean": {}}
