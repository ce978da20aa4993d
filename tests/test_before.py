"""What an earlier version wrote is read as that version read it; see before/README.md."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

import theia
from theia.cli.main import main
from theia.store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("one_parser")

CHECKPOINTS = {
    "run": "run/checkpoints/last.ckpt",
    "best": "run/checkpoints/best.ckpt",
    "linear": "linear.ckpt",
    "bare": "bare.ckpt",
    "deit": "deit.ckpt",
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files. A test that changes some copies them."""
    root = tmp_path_factory.mktemp("before")
    with tarfile.open(Path(__file__).parent / "before" / "files.tar.xz") as files:
        files.extractall(root, filter="data")
    return root


@pytest.fixture
def in_copy(before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the run and its store, to which config.yaml has a relative path."""
    for name in ("store", "run"):
        shutil.copytree(before / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)


def check_figures(expected: Path) -> None:
    report = json.loads(Path("run/test_last.json").read_text())
    wanted = json.loads(expected.read_text())
    assert report["samples"] == wanted["samples"]
    # What an untrained student is like depends on the release of torch and timm.
    assert report["after"] == pytest.approx(wanted["after"], rel=1e-3, abs=1e-4)


@torch.no_grad()
def check_encoder(source: Path, expected: Path) -> None:
    encoder = theia.load(source)
    with np.load(expected) as wanted:
        tokens = encoder.forward_features(wanted["images"])
        given = {"patches": tokens.patches[:, ::5], "registers": tokens.registers}
        if tokens.cls is not None:
            given["cls"] = tokens.cls
        for teacher, values in encoder.translate(wanted["images"], denormalize=True).items():
            given[f"translated_{teacher}"] = values[:, ::17, :16]
        given["wide_patches"] = encoder(wanted["wide_images"])[:, ::5]
        assert given.keys() == set(wanted) - {"images", "wide_images"}
        for name, values in given.items():
            np.testing.assert_allclose(values, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["store", "store_int8"])
def test_a_store_has_the_rows_that_it_had(before: Path, name: str) -> None:
    assert main(["store", "verify", str(before / name)]) == 0
    store = FeatureStore(before / name)
    split = store.open_split("train")
    given = split.allocate(2)
    split.read_into(np.array([3, 0], np.int64), given)
    given = {field.replace("/", "_"): values for field, values in given.items()}
    given["keys"] = np.array([split.key(row) for row in range(len(split))])
    for teacher in split.teachers:
        statistics = store.statistics(teacher)
        given[f"{teacher}_mean"], given[f"{teacher}_std"] = statistics.mean, statistics.std
    with np.load(before / f"{name}.npz") as wanted:
        assert given.keys() == set(wanted)
        for field, values in given.items():
            np.testing.assert_array_equal(values, wanted[field], err_msg=field)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_gives_the_tokens_that_it_gave(before: Path, name: str) -> None:
    check_encoder(before / CHECKPOINTS[name], before / f"{name}.npz")


def test_an_exported_folder_gives_the_tokens_of_its_checkpoint(before: Path) -> None:
    check_encoder(before / "exported", before / "linear.npz")


@torch.no_grad()
def test_automodel_reads_the_exported_folder(before: Path) -> None:
    model = AutoModel.from_pretrained(before / "exported")
    with np.load(before / "linear.npz") as wanted:
        tokens = model(pixel_values=torch.from_numpy(wanted["images"])).last_hidden_state
        prefix = np.concatenate([wanted["cls"][:, None], wanted["registers"]], axis=1)
        np.testing.assert_allclose(tokens[:, : prefix.shape[1]], prefix, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(tokens[:, prefix.shape[1] :][:, ::5], wanted["patches"], rtol=1e-5, atol=1e-5)


def test_a_run_has_the_held_out_figures_that_it_had(in_copy: None, before: Path) -> None:
    assert main(["test", "--config=run/config.yaml", "--ckpt_path=last"]) == 0
    check_figures(before / "test_last.json")


def test_a_run_goes_on_as_it_went_on(in_copy: None, before: Path) -> None:
    longer = ["--trainer.max_steps=-1", "--trainer.max_epochs=4"]
    assert main(["fit", "--config=run/config.yaml", "--ckpt_path=last", *longer]) == 0
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 12
    assert main(["test", "--config=run/config.yaml", "--ckpt_path=last"]) == 0
    check_figures(before / "test_longer.json")
