from pathlib import Path

import pytest

from benchmarks.throughput import live
from benchmarks.throughput.measure import Cost, ParityError, Settings
from theia.store.reader import Split


@pytest.mark.slow
def test_suite(tmp_path: Path) -> None:
    result = live.run(Settings(folder=tmp_path, pairs=2, small=True))

    assert [len(measure.values) for measure in result.measures] == [2] * 6
    assert set(result.details["costs"]["HOG and color"]) == set(live._STAGES)


def test_a_training_costs_what_comes_before_it_and_its_epochs() -> None:
    seconds = {"extraction": 12.0, "epoch from the store": 1.0, "live passes": 2.0, "live epoch": 3.0}
    costs = {stage: [Cost(wall, 2 * wall)] for stage, wall in seconds.items()}

    assert live._ratios(costs, 1, "wall_s") == live._ratios(costs, 1, "cpu_s") == [13 / 5]
    assert live._ratios(costs, 10, "wall_s") == [22 / 32]


@pytest.mark.slow
def test_live_features_that_are_not_the_stores_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Split.read_into

    def damaged(self, rows, buffers, at_once=1) -> None:
        real(self, rows, buffers, at_once)
        if "hog" in buffers:
            buffers["hog"][0, 7, 5] += 0.01

    monkeypatch.setattr(Split, "read_into", damaged)
    with pytest.raises(ParityError, match="'hog'"):
        live.run(Settings(folder=tmp_path, pairs=1, small=True))
