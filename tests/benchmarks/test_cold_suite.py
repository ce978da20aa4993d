import os
import time
from pathlib import Path

import pytest

from benchmarks.throughput import cold
from benchmarks.throughput.measure import ParityError, Result, Settings
from theia.store.reader import Split


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return cold.run(Settings(tmp_path_factory.mktemp("cold"), pairs=2, small=True))


def test_every_aim_is_measured_as_often_as_asked(result: Result) -> None:
    assert [measure.aim for measure in result.measures if measure.aim is not None] == [0.8, 8]
    assert {len(measure.values) for measure in result.measures} == {2}


def test_it_says_that_the_page_cache_was_dropped(result: Result) -> None:
    assert "page cache of the files was dropped" in result.notes[0]
    assert "1 ms added to each read" in result.notes[1]


def test_a_dropped_file_is_no_longer_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        try:
            assert os.preadv(file.fileno(), (bytearray(1),), 0, os.RWF_NOWAIT) == 1
        except OSError:
            pytest.skip("this file system does not tell what is in the page cache")
        cold.drop(tmp_path)
        with pytest.raises(BlockingIOError):
            os.preadv(file.fileno(), (bytearray(1),), 0, os.RWF_NOWAIT)


def test_a_late_read_takes_as_long_as_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    real, target = os.preadv, bytearray(2)
    with (tmp_path / "file").open("rb") as file, cold.late(0.05):
        began = time.perf_counter()
        assert os.preadv(file.fileno(), (target,), 1) == 2
        assert time.perf_counter() - began >= 0.05
    assert target == b"bc"
    assert os.preadv is real


def test_a_loader_that_gives_other_bytes_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Split.read_into

    def damaged(self, rows, buffers, at_once=1) -> None:
        real(self, rows, buffers, at_once)
        if self.direct:
            buffers["image"][0] ^= 1

    monkeypatch.setattr(Split, "read_into", damaged)
    with pytest.raises(ParityError, match="past the page cache gives other bytes for 'image'"):
        cold.run(Settings(tmp_path, pairs=1, small=True))
