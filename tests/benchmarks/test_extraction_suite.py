from pathlib import Path

import numpy as np
import pytest

from benchmarks.throughput import extraction
from benchmarks.throughput.measure import ParityError, Settings
from theia.store.reader import Split


def test_it_compares_as_often_as_asked(tmp_path: Path) -> None:
    result = extraction.run(Settings(folder=tmp_path, pairs=2, small=True))
    assert [len(measure.values) for measure in result.measures] == [2] * 6
    assert [measure.aim for measure in result.measures] == [0.97, None, 0.8, None, 0.8, None]
    assert set(result.details["costs"]) == {"plain loop", "theia extract"}
    assert set(result.details["bare_disk"]["free_sam"]["costs"]) == {"disk", "theia extract"}
    assert result.details["bare_disk"]["free_vit"]["bytes"] > 6 * 257 * 768 * 2


def test_stored_features_that_are_not_the_plain_loops_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Split.read_into

    def damaged(self, rows, buffers) -> None:
        real(self, rows, buffers)
        if "vit" in buffers:
            buffers["vit"][3, 7, 5] = np.nextafter(buffers["vit"][3, 7, 5], np.float16(np.inf))

    monkeypatch.setattr(Split, "read_into", damaged)
    with pytest.raises(ParityError, match="'vit'"):
        extraction.run(Settings(folder=tmp_path, pairs=1, small=True))
