"""The tutorial of docs/teachers.md, installed and used as a stranger would: one class in a distribution of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest

pytestmark = pytest.mark.slow

TUTORIAL = Path(__file__).parents[1] / "docs" / "teachers.md"
STUDENT = ["--model.width=16", "--model.depth=1", "--model.heads=2", "--data.batch_size=4", "--data.workers=0"]


def tutorial() -> dict[str, str]:
    """Python module and packaging file: the first two blocks of code, by language."""
    blocks = re.findall(r"^```(python|toml)\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)[:2]
    assert [language for language, _ in blocks] == ["python", "toml"]
    return dict(blocks)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed the tutorial's distribution into; outside the environment of the tests."""
    project, site = tmp_path_factory.mktemp("edges"), tmp_path_factory.mktemp("site")
    blocks = tutorial()
    (project / "theia_edges.py").write_text(blocks["python"])
    (project / "pyproject.toml").write_text(blocks["toml"])
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [*pip, "--quiet", "--disable-pip-version-check", f"--target={site}", str(project)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


def theia(site: Path, *arguments: str) -> str:
    """What a command says that finds what is installed in ``site``."""
    return forked.run(*arguments, path=site).out


def extract(site: Path, store: Path, *more: str) -> None:
    theia(
        site, "extract", "--teachers=edges", "--images.train=sample:12", "--images.val=sample:4", f"--store={store}",
        "--size=64", "--workers=0", "--accelerator=cpu", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the plugin gives for a few photographs."""
    store = tmp_path_factory.mktemp("stores") / "edges"
    extract(site, store, "--edges.wavelength=6")
    return store


def test_it_is_listed_with_what_it_gives(site: Path) -> None:
    rows = [line.split() for line in theia(site, "teachers").splitlines()]

    assert [row[1:3] for row in rows if row and row[0] == "edges"] == [["48", "10x10"]]
    assert "clip" in [row[0] for row in rows if row]


def test_its_options_are_in_the_help(site: Path) -> None:
    shown = " ".join(theia(site, "extract", "--help").split())

    assert "--edges.wavelength WAVELENGTH Wavelength of the finer filters, in pixels" in shown


def test_its_features_are_stored_with_its_spec(site: Path, store: Path) -> None:
    theia(site, "store", "verify", str(store))

    sets = json.loads((store / "manifest.json").read_text())["splits"]["train"]["sets"]
    assert sets.keys() == {"image", "edges"}
    assert sets["edges"]["complete"]
    spec = sets["edges"]["spec"]
    assert (spec["channels"], spec["grid_hw"], spec["preprocessing"]) == (48, [10, 10], {"wavelength": 6})


def test_its_options_cannot_be_mixed_in_a_store(site: Path, store: Path) -> None:
    with pytest.raises(AssertionError, match=r"theia extract: .*wavelength"):
        extract(site, store, "--edges.wavelength=5")


def test_a_student_learns_from_it(site: Path, store: Path, tmp_path: Path) -> None:
    options = [f"--data.store={store}", f"--run_folder={tmp_path}", "--trainer.accelerator=cpu", *STUDENT]

    theia(site, "fit", *options, "--trainer.max_epochs=5", "--model.learning_rate=5e-3")
    shown = theia(site, "test", f"--config={tmp_path / 'config.yaml'}", "--ckpt_path=last")

    report = json.loads((tmp_path / "test_last.json").read_text())
    assert report["after"]["test/cosine/edges"] > report["before"]["test/cosine/edges"]
    assert "edges" in shown
