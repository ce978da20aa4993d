from pathlib import Path

import pytest

from benchmarks.throughput import growth
from benchmarks.throughput.measure import ParityError, Settings
from theia.store.reader import Split


def test_it_goes_over_samples_and_over_teachers(tmp_path: Path) -> None:
    result = growth.run(Settings(tmp_path, pairs=2, small=True))
    assert set(result.details["costs_per_image"]) == {"16", "32"}
    assert set(result.details["costs_per_byte"]) == {"1", "2", "3", "4", "5"}
    assert {(len(measure.values), measure.at_most) for measure in result.measures} == {(2, True)}


def test_a_loader_that_gives_other_bytes_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Split.read_into

    def damaged(self, rows, buffers, at_once=1) -> None:
        real(self, rows, buffers, at_once)
        buffers["image"][0] ^= 1

    monkeypatch.setattr(Split, "read_into", damaged)
    with pytest.raises(ParityError, match="'image'"):
        growth.run(Settings(tmp_path, pairs=1, small=True))
