import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from events import aged, changed
from small_store import CLS, ODD, begin, contents, extract, image_set, in_child, kill_at, write_features, write_images

from theia.errors import StoreError
from theia.store.reader import FeatureStore
from theia.store.writer import SplitWriter


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # Processes are killed here, not machines: the kernel keeps what was written.
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def uninterrupted(tmp_path: Path) -> dict[str, bytes]:
    extract(tmp_path / "uninterrupted")
    return contents(tmp_path / "uninterrupted")


def test_same_extraction_gives_same_bytes(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    extract(tmp_path / "again")
    assert contents(tmp_path / "again") == uninterrupted


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def small(root: Path) -> None:
        extract(root, teachers=[CLS], listed=7)

    small(tmp_path / "uninterrupted")
    expected = contents(tmp_path / "uninterrupted")
    call, status = 0, -9
    while status == -9:
        call += 1
        root = tmp_path / str(call)

        def killed(root: Path = root, call: int = call) -> None:
            kill_at(call)
            small(root)

        status = in_child(killed)
        small(root)
        assert contents(root) == expected, f"killed before call {call}"
    assert status == 0
    assert call > 60  # else the calls are not counted where they are made


def test_killed_again_and_again_makes_progress(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    def killed() -> None:
        kill_at(50)
        extract(tmp_path / "store")

    runs = 1
    while in_child(killed) == -9:
        runs += 1
        assert runs < 20
    assert contents(tmp_path / "store") == uninterrupted


def test_truncated_and_foreign_shards_are_made_again(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    root = tmp_path / "store"
    extract(root)
    cut, other = root / "train/odd/shard-000000.h5", root / "train/odd/shard-000001.h5"
    os.truncate(cut, cut.stat().st_size // 2)
    other.write_bytes((root / "train/odd/shard-000002.h5").read_bytes())
    extract(root)
    assert contents(root) == uninterrupted


def test_shard_without_a_record_gets_one_from_the_file(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    root = tmp_path / "store"
    writer = begin(root)
    for index in range(3):
        write_images(writer, image_set(), index)
        for spec in (ODD, CLS):
            write_features(writer, spec, index)
    for sidecar in root.glob("train/*/shard-*.json"):
        sidecar.unlink()
    writer.finish()
    assert contents(root) == uninterrupted


def test_error_in_the_middle_of_a_shard_leaves_nothing(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    write_images(writer, image_set(), 0)
    before = contents(tmp_path)

    def fail() -> None:
        with writer.open_shard("odd", 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert contents(tmp_path) == before


def test_begin_removes_what_dead_writers_left_and_keeps_what_living_ones_write(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    write_images(writer, image_set(), 0)

    def die() -> None:
        kill_at(3)
        write_features(writer, ODD, 0)

    assert in_child(die) == -9
    folder = tmp_path / "train/odd"
    (dead,) = folder.iterdir()
    living = folder / dead.name.replace(dead.name.rsplit("~", 1)[1], f"{os.getppid()}.tmp")
    living.touch()
    begin(tmp_path)
    assert list(folder.iterdir()) == [living]


def test_processes_write_different_shards_at_once(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    root = tmp_path / "store"
    first = begin(root)

    def share(rank: int) -> None:
        writer = SplitWriter(root, "train")
        for index in range(rank, 3, 2):
            write_images(writer, image_set(), index)
            for spec in (ODD, CLS):
                write_features(writer, spec, index)

    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                share(rank)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    first.finish()
    assert contents(root) == uninterrupted


def test_finish_names_missing_shards(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    for index in range(3):
        write_images(writer, image_set(), index)
    write_features(writer, ODD, 1)
    with pytest.raises(StoreError, match=r"odd 0, odd 2, with_cls 0, .*Run the same command again"):
        writer.finish()


def test_adding_a_teacher_touches_no_other_file(tmp_path: Path) -> None:
    extract(tmp_path, teachers=[ODD])
    before, times = contents(tmp_path), aged(tmp_path)
    extract(tmp_path, teachers=[CLS])
    assert {path.name for path in times} >= {"shard-000000.h5", "odd.npz", "skipped.csv"}
    after = contents(tmp_path)
    for path, time in times.items():
        if path.name not in ("manifest.json", ".lock"):
            assert after[(name := str(path.relative_to(tmp_path)))] == before[name]
            assert path.stat().st_mtime_ns == time
    assert list(FeatureStore(tmp_path).open_split("train").teachers) == ["odd", "with_cls"]


def test_running_a_finished_extraction_again_changes_nothing(tmp_path: Path) -> None:
    extract(tmp_path)
    before = aged(tmp_path)
    del before[tmp_path / ".lock"]
    extract(tmp_path)
    assert changed(before) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("function", ["pwrite", "fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2, 7])
def test_full_disk_is_told_and_damages_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, function: str, call: int
) -> None:
    root = tmp_path / "store"
    extract(root, teachers=[CLS])
    whole = contents(root)
    real, calls = getattr(os, function), iter(range(1, 1 << 30))

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= call:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(StoreError, match=r"Disk full while writing .*free space and run the same command again"):
            extract(root)
    after = contents(root)
    assert {name: after[name] for name in whole if name != "manifest.json"} == {
        name: content for name, content in whole.items() if name != "manifest.json"
    }
    assert not [name for name in after if name.endswith(".tmp")]
    extract(root)
    extract(tmp_path / "other", teachers=[CLS])
    extract(tmp_path / "other")
    assert contents(root) == contents(tmp_path / "other")


def test_file_size_limit_is_told(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        with pytest.raises(StoreError, match=r"Cannot write .*odd"):
            extract(tmp_path, shard_size=100, listed=100)

    assert in_child(limited) == 0
    assert not list(tmp_path.rglob("*.tmp"))
