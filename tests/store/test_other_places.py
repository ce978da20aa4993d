"""Stores in other places: pushed, pulled, interrupted, damaged."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from small_store import CLS, ODD, begin, extract

from theia.cli.main import main
from theia.errors import ConfigError, StoreError
from theia.store.reader import FeatureStore
from theia.store.transfer import pull, push
from theia.store.verify import Problem, verify


def content(root: Path) -> dict[str, str]:
    """Digest of every file of a store, but its lock."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if (path.is_file() and path.name != ".lock" and path.suffix != ".json") or path.name == "manifest.json"
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    extract(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        yield f"{request.getfixturevalue('bucket')}/stores/small"
        return
    if request.param == "file":
        yield f"file://{tmp_path / 'far/stores/small'}"
        return
    yield f"memory://{request.node.name}/small"
    fsspec.filesystem("memory").store.clear()


def test_a_store_comes_back_as_it_was(root: Path, url: str, tmp_path: Path) -> None:
    pushed = push(root, url)
    assert pushed.copied == pushed.files == len(content(root)) - 1
    pulled = pull(url, tmp_path / "back")
    assert pulled == pushed
    assert content(tmp_path / "back") == content(root)
    assert not [event for event in verify(tmp_path / "back") if isinstance(event, Problem)]
    # Again, nothing but what has no checksum is copied.
    small = {name for name in content(root) if not name.endswith(".h5")} - {"manifest.json"}
    assert push(root, url).copied == pull(url, tmp_path / "back").copied == len(small)
    assert content(tmp_path / "back") == content(root)


def test_some_teachers_first_and_the_others_later(root: Path, url: str, tmp_path: Path) -> None:
    push(root, url)
    pull(url, tmp_path / "back", [ODD.name])
    assert list(FeatureStore(tmp_path / "back").teachers("train")) == [ODD.name]
    assert not (tmp_path / "back/train" / CLS.name).exists()
    pull(url, tmp_path / "back", [CLS.name])
    assert content(tmp_path / "back") == content(root)
    with pytest.raises(StoreError, match=r"no teacher 'clip' in split 'train'. It has: odd, with_cls"):
        pull(url, tmp_path / "back", ["clip"])
    with pytest.raises(StoreError, match=r"no split 'test'. It has: train"):
        pull(url, tmp_path / "back", splits=["test"])


def test_an_interrupted_push_goes_on_and_is_no_store_before_its_end(
    root: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, place = fsspec.core.url_to_fs(url)
    copied: list[str] = []
    put = fs.put_file

    def stop(path: str, *args: object, **options: object) -> None:
        if len(copied) == 3:
            raise ConnectionResetError("the network is gone")
        copied.append(path)
        put(path, *args, **options)

    with monkeypatch.context() as broken:
        broken.setattr(fs, "put_file", stop)
        with pytest.raises(StoreError, match=r"ConnectionResetError: the network is gone.*run the same command again"):
            push(root, url, workers=1)
    with pytest.raises(StoreError, match="still being pushed"):
        pull(url, tmp_path / "back")
    # A file that was cut short there is copied again.
    cut = next(path for path in copied if path.endswith(".h5"))
    fs.pipe_file(f"{place}/{Path(cut).relative_to(root)}", b"half")
    done = push(root, url)
    assert done.files - done.copied == sum(path.endswith(".h5") for path in copied) - 1
    assert not fs.exists(f"{place}/pushing.json")
    pull(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(root)


def test_an_interrupted_pull_goes_on_and_is_no_store_before_its_end(
    root: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(root, url)
    fs, _ = fsspec.core.url_to_fs(url)
    get = fs.get_file
    count = 0

    def stop(there: str, here: str, **options: object) -> None:
        nonlocal count
        count += 1
        if count == 4:
            Path(here).write_bytes(b"half")
            raise TimeoutError("too slow")
        get(there, here, **options)

    with monkeypatch.context() as broken:
        broken.setattr(fs, "get_file", stop)
        with pytest.raises(StoreError, match="TimeoutError: too slow"):
            pull(url, tmp_path / "back", workers=1)
    with pytest.raises(StoreError, match="not a feature store"):
        FeatureStore(tmp_path / "back")
    pull(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(root)


def test_what_is_damaged_there_or_here_is_found(root: Path, url: str, tmp_path: Path) -> None:
    push(root, url)
    fs, place = fsspec.core.url_to_fs(url)
    shard = "train/odd/shard-000001.h5"
    whole = fs.cat_file(f"{place}/{shard}")
    fs.pipe_file(f"{place}/{shard}", whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match=rf"{shard} is not what its manifest says"):
        pull(url, tmp_path / "back")
    assert not (tmp_path / "back" / shard).exists()
    fs.pipe_file(f"{place}/{shard}", whole)
    pull(url, tmp_path / "back")
    (tmp_path / "back" / shard).write_bytes(whole[:100] + b"?" + whole[101:])
    with pytest.raises(StoreError, match=r"is not what the manifest says.*theia store verify"):
        push(tmp_path / "back", f"{url}-again")
    pull(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(root)


def test_an_unfinished_store_is_not_pushed(tmp_path: Path, url: str) -> None:
    writer = begin(tmp_path / "store")
    fs, place = fsspec.core.url_to_fs(url)
    with pytest.raises(StoreError, match=r"unfinished. Run its theia extract"):
        push(tmp_path / "store", url)
    del writer
    assert not fs.exists(place)


def test_another_store_is_neither_overwritten_nor_mixed(root: Path, url: str, tmp_path: Path) -> None:
    extract(tmp_path / "other", listed=7)
    push(root, url)
    with pytest.raises(StoreError, match="other images"):
        push(tmp_path / "other", url)
    with pytest.raises(StoreError, match="other images"):
        pull(url, tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="something other than a store"):
        pull(url, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    pull(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(root)


def test_a_push_leaves_what_was_pushed_from_elsewhere(url: str, tmp_path: Path) -> None:
    extract(tmp_path / "one", teachers=[ODD])
    for split in ("train", "val"):
        extract(tmp_path / "more", split)
    for name in ("one", "more", "one"):
        push(tmp_path / name, url)
    pull(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "more")
    assert not [event for event in verify(tmp_path / "back") if isinstance(event, Problem)]


def test_what_an_interrupted_push_has_announced_is_not_taken_for_there(url: str, tmp_path: Path) -> None:
    extract(tmp_path / "one", teachers=[ODD])
    extract(tmp_path / "more")
    fs, place = fsspec.core.url_to_fs(url)
    fs.makedirs(place, exist_ok=True)
    fs.pipe_file(f"{place}/pushing.json", (tmp_path / "more/manifest.json").read_bytes())
    push(tmp_path / "one", url)
    pull(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "one")


def test_a_place_without_a_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"memory://nothing is not a feature store"):
        pull("memory://nothing", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(ConfigError, match="no place that fsspec opens"):
        pull("nonsense://x", tmp_path / "back")


def test_a_place_that_may_not_be_written_is_said(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(type(fs), "pipe_file", refuse)
    with pytest.raises(StoreError, match=r"pushing\.json: PermissionError: AccessDenied.*permissions"):
        push(root, "memory://locked")


def test_the_commands_push_and_pull(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = f"file://{tmp_path / 'far'}"
    assert main(["store", "push", str(root), there]) == 0
    assert "All checksums agree" in capsys.readouterr().out
    assert main(["store", "pull", there, str(tmp_path / "back"), "--teachers", "odd"]) == 0
    assert json.loads((tmp_path / "back/manifest.json").read_bytes())["splits"]["train"]["sets"].keys() == {
        "image",
        "odd",
    }
