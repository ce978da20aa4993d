import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from theia.errors import StoreError
from theia.store import reads
from theia.store.reader import FeatureStore, shared_array
from theia.store.reads import Files, Read, memory_bytes

ROW = 1024  # bytes


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(64 * ROW)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "rows"
    path.write_bytes(content)
    drop(str(path))
    return str(path)


def drop(path: str) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def cached(path: str, offset: int = 0) -> bool:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(file, (bytearray(ROW),), offset, os.RWF_NOWAIT) == ROW
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip("this file system does not tell what is in the page cache")
        raise
    finally:
        os.close(file)


def plan(path: str, rows: list[int]) -> tuple[np.ndarray, list[Read]]:
    buffer = shared_array((len(rows), ROW), np.dtype(np.uint8))
    return buffer, [Read(path, memoryview(buffer[place]), row * ROW) for place, row in enumerate(rows)]


def expected(content: bytes, rows: list[int]) -> np.ndarray:
    return np.frombuffer(content, np.uint8).reshape(-1, ROW)[rows]


@pytest.fixture
def no_haste(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Refuses to tell what is in the page cache, as network file systems do, and calls a function in other reads."""

    def set_up(before: Callable[[], object]) -> None:
        real = os.preadv

        def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
            if flags:
                raise OSError(errno.EOPNOTSUPP, "not supported")
            before()
            return real(file, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)

    return set_up


@pytest.mark.parametrize("lacks", [(), ("_NOWAIT",), ("_DIRECT",), ("_DIRECT", "_NOWAIT")])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_rows_are_those_of_the_file_on_any_system(
    path: str, content: bytes, at_once: int, direct: bool, lacks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in lacks:
        monkeypatch.setattr(reads, name, 0)
    rows = np.random.default_rng(1).integers(0, 64, 50).tolist()
    files = Files()
    for _ in range(2):  # from the disk, and then perhaps from the page cache
        buffer, wanted = plan(path, rows)
        files.read_all(wanted, direct, at_once)
        np.testing.assert_array_equal(buffer, expected(content, rows))


def test_direct_reads_leave_the_page_cache_as_it_was(path: str, content: bytes) -> None:
    if not reads_directly(path):
        pytest.skip("this file system has no direct reads")
    buffer, wanted = plan(path, [5, 60])
    Files().read_all(wanted, True, 4)
    np.testing.assert_array_equal(buffer, expected(content, [5, 60]))
    assert not cached(path, 5 * ROW)

    drop(path)
    Files().read_all(wanted, False, 4)
    assert cached(path, 5 * ROW)


def reads_directly(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(("offset", "length"), [(ROW + 1, ROW), (ROW, ROW - 1)], ids=["offset", "length"])
def test_what_cannot_be_read_directly_is_read_all_the_same(path: str, content: bytes, offset: int, length: int) -> None:
    target = bytearray(length)
    Files().read(Read(path, memoryview(target), offset), direct=True)
    assert target == content[offset : offset + length]


@pytest.mark.parametrize("refused", ["open", "preadv"])
def test_a_disk_that_refuses_direct_reads_is_read_all_the_same(
    path: str, content: bytes, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, real_preadv, refusals = os.open, os.preadv, []
    direct: set[int] = set()

    def opened(name: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT and refused == "open":
            refusals.append(name)
            raise OSError(errno.EINVAL, "Invalid argument")
        file = real_open(name, flags & ~os.O_DIRECT, *more)
        direct.discard(file)
        if flags & os.O_DIRECT:
            direct.add(file)
        return file

    def preadv(file: int, *more: Any) -> int:
        if file in direct:
            refusals.append(file)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(file, *more)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", preadv)
    buffer, wanted = plan(path, [3, 1])
    Files().read_all(wanted, True, 1)
    np.testing.assert_array_equal(buffer, expected(content, [3, 1]))
    assert refusals


@pytest.mark.parametrize("direct", [False, True])
def test_as_many_reads_wait_at_a_time_as_allowed(
    path: str, content: bytes, direct: bool, no_haste: Callable[..., None]
) -> None:
    together = threading.Barrier(4, timeout=30)  # a fourth read has to come before the first may end
    no_haste(together.wait)
    buffer, wanted = plan(path, list(range(16)))
    Files().read_all(wanted, direct, 4)
    np.testing.assert_array_equal(buffer, expected(content, list(range(16))))


def test_rows_in_the_page_cache_take_no_threads(path: str, content: bytes) -> None:
    Path(path).read_bytes()
    if not cached(path):
        pytest.skip("this file system keeps nothing in the page cache")
    before = threading.active_count()
    buffer, wanted = plan(path, [7, 7, 0])
    Files().read_all(wanted, False, 4)
    np.testing.assert_array_equal(buffer, expected(content, [7, 7, 0]))
    assert threading.active_count() == before


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_that_is_too_short_is_an_error_after_the_last_read(
    path: str, direct: bool, no_haste: Callable[..., None]
) -> None:
    os.truncate(path, 5 * ROW + 3)
    under_way = threading.BoundedSemaphore(16)

    def slow() -> None:
        with under_way:
            threading.Event().wait(0.01)

    no_haste(slow)
    _, wanted = plan(path, list(range(20)))
    with pytest.raises(StoreError, match=r"rows is damaged .*ends too early"):
        Files().read_all(wanted, direct, 16)
    assert under_way._value == 16  # no thread may still write into a slot that is about to be used again


def test_threads_and_few_open_files_get_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "_open_files_at_most", lambda: 2)
    monkeypatch.setattr(reads, "_NOWAIT", 0)
    for number in range(8):
        (tmp_path / str(number)).write_bytes(bytes([number]) * ROW)
    files, numbers = Files(), np.random.default_rng(0).integers(0, 8, 400)
    buffer = shared_array((len(numbers), ROW), np.dtype(np.uint8))
    wanted = [
        Read(str(tmp_path / str(number)), memoryview(row), 0) for number, row in zip(numbers, buffer, strict=True)
    ]
    files.read_all(wanted, False, 16)
    assert (buffer == numbers[:, None]).all()


def test_only_a_split_larger_than_memory_is_read_directly(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Images 3 x 32 x 32 bytes; features of 4 x 4 x 8 and 3 x 6 x 5, and a CLS token of 5, two bytes each.
    size = 80 * (3072 + 256 + 180 + 10)
    found = []
    for memory in (size - 1, size):
        monkeypatch.setattr("theia.store.reader.memory_bytes", lambda memory=memory: memory)
        split = FeatureStore(store).open_split("train")
        found.append((split.direct, split.with_cls_of([]).direct, split.images_only().direct))
    assert found == [(True, False, False), (False, False, False)]


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/job/step", {"job/memory.max": "4096", "job/step/memory.max": "max"}, 4096),
        ("0::/", {"memory.max": "8192"}, 8192),
        ("3:cpu,memory:/job", {"memory/job/memory.limit_in_bytes": "1024"}, 1024),
        ("0::/job", {}, None),
        ("5:cpu:/job", {"memory.max": "1"}, None),
    ],
)
def test_the_limit_of_a_job_counts_as_its_memory(
    groups: str, limits: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(groups + "\n")
    for name, text in limits.items():
        (tmp_path / "limits" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "limits" / name).write_text(text + "\n")
    kilobytes = int(Path("/proc/meminfo").read_text().split()[1])
    found = memory_bytes(tmp_path / "cgroup", tmp_path / "limits")
    assert found == expected or (expected is None and found == pytest.approx(1024 * kilobytes, rel=0.05))
    assert memory_bytes(tmp_path / "none", tmp_path) == pytest.approx(1024 * kilobytes, rel=0.05)
