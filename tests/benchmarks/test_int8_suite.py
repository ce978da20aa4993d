from pathlib import Path

import numpy as np
import pytest

from benchmarks.throughput import heavy_tails, int8
from benchmarks.throughput.measure import ParityError, Settings
from theia.store.reader import FeatureStore, Split


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[heavy_tails.Dtype, Path]:
    return heavy_tails.build(tmp_path_factory.mktemp("heavy"), train=24, held_out=4)


def columns(store: Path) -> heavy_tails.Columns:
    return heavy_tails.read(FeatureStore(store).open_split("train"))


def test_channels_are_as_extreme_as_announced(stores) -> None:
    features = columns(stores["float16"])[heavy_tails.TEACHER].astype(np.float64).reshape(-1, heavy_tails.CHANNELS)
    mean, std = features.mean(0), features.std(0)
    assert np.isclose(std, 100, rtol=0.01).sum() == heavy_tails.SCALED_BY_100
    assert np.isclose(mean / std, 100, rtol=0.01).sum() == heavy_tails.OFFSET_BY_100
    # A standard normal logarithm: neither all alike nor out of this world.
    assert 0.7 < np.log(std).std() < 1.8


def test_both_stores_hold_the_same_features(stores) -> None:
    wide, narrow = (columns(stores[dtype]) for dtype in ("float16", "int8"))
    assert np.array_equal(wide["image"], narrow["image"])
    step, middle = narrow["heavy/scale"][:, :1], narrow["heavy/scale"][:, 1:]
    error = np.abs(wide["heavy"].astype(np.float32) - (narrow["heavy"] * step + middle))
    rounding = np.spacing(np.abs(wide["heavy"])).astype(np.float32)
    assert (error <= 0.5001 * step + rounding).all()


def test_training_is_a_function_of_the_seed_and_lowers_the_held_out_loss(stores) -> None:
    store = stores["float16"]
    scores = [
        heavy_tails.score(heavy_tails.train(store, seed, steps), store) for seed, steps in ((0, 15), (0, 15), (1, 1))
    ]
    assert scores[0] == scores[1]
    assert scores[0]["loss"] < 0.9 * scores[2]["loss"]


def test_suite(tmp_path: Path) -> None:
    result = int8.run(Settings(folder=tmp_path, pairs=2, small=True))
    size, *times, learned = result.measures
    # One byte instead of two, and a step and a middle per channel; CLS tokens stay as they are.
    channels = 1024 + 1024 + 1280
    features, scales, cls = channels * 256, 8 * channels, 2 * channels
    assert size.median == pytest.approx(
        (features + scales + cls) / (2 * features + cls), rel=0.02
    )  # sums and keys weigh more in so small a shard
    assert [len(measure.values) for measure in times] == [2, 2]
    assert learned.aim == 1
    assert {dtype: len(scores) for dtype, scores in result.details["scores"].items()} == {"float16": 3, "int8": 3}


def test_int8_features_that_are_others_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Split.read_into

    def damaged(self, rows, buffers, at_once=1) -> None:
        real(self, rows, buffers, at_once)
        if "dinov2/scale" in buffers:
            buffers["dinov2/scale"][5, 0] *= 1.1

    monkeypatch.setattr(Split, "read_into", damaged)
    with pytest.raises(ParityError, match="'dinov2'"):
        int8.run(Settings(folder=tmp_path, pairs=1, small=True))
