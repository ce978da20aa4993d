from pathlib import Path

import h5py
import numpy as np
import pytest
from small_store import CLS, ODD, begin, cls_token, extract, image_set, patches, readable, write_images

from theia.errors import StoreError
from theia.store.reader import FeatureStore
from theia.store.statistics import STD_FLOOR, ChannelStatistics, Moments


def test_equal_numpy_over_the_whole_array(tmp_path: Path) -> None:
    extract(tmp_path)
    for spec in (ODD, CLS):
        numbers = readable(image_set())
        tokens = np.concatenate([patches(spec, number) for number in numbers]).astype(np.float16).astype(np.float64)
        statistics = FeatureStore(tmp_path).statistics(spec.name)
        np.testing.assert_allclose(statistics.mean, tokens.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.std, tokens.std(0), rtol=1e-12)
        assert statistics.count == len(tokens)
        assert statistics.floored == 0
        assert statistics.mean.dtype == statistics.std.dtype == np.float64
    cls = np.stack([cls_token(CLS, number) for number in numbers]).astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(statistics.cls_mean, cls.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.cls_std, cls.std(0), rtol=1e-12)


def test_int8_counts_what_is_stored(tmp_path: Path) -> None:
    extract(tmp_path, dtype="int8")
    tokens = []
    for path in sorted((tmp_path / "train/odd").glob("*.h5")):
        with h5py.File(path) as file:
            scale = file["scale"][()].astype(np.float64)
            tokens.append(file["data"][()] * scale[:, :1] + scale[:, 1:])
    values = np.concatenate(tokens).reshape(-1, 48)
    statistics = FeatureStore(tmp_path).statistics("odd")
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-11)
    np.testing.assert_allclose(statistics.std, values.std(0), rtol=1e-11)


def test_extreme_channels(tmp_path: Path) -> None:
    """The mean far from zero, as in SAM and ViT-H, hardly any deviation, and none at all."""
    writer = begin(tmp_path, teachers=[ODD], listed=40, shard_size=10)
    generator = np.random.default_rng(0)
    mean, std = np.zeros(48), np.ones(48)
    mean[:4], std[:4] = [137.0, 0.01, -4000.0, 0.1], [1.0, 3e-4, 0.0, 0.0]
    values = (generator.standard_normal((40, 100, 48)) * std + mean).astype(np.float32)
    number = 0
    for index in range(4):
        write_images(writer, image_set(40, 10), index)
        with writer.open_shard("odd", index) as shard:
            rows = len(shard.ids)
            shard.append(values[number : number + rows], None)
            number += rows
    writer.finish()
    stored = values[:number].astype(np.float16).astype(np.float64).reshape(-1, 48)
    statistics = FeatureStore(tmp_path).statistics("odd")
    np.testing.assert_allclose(statistics.mean, stored.mean(0), rtol=1e-12, atol=1e-15)
    # 0.1 does not exist in float16, and numpy's own mean of the constant is off by a rounding.
    np.testing.assert_allclose(statistics.std, np.maximum(stored.std(0), STD_FLOOR), rtol=1e-9)
    assert stored.std(0)[1] < 1e-3
    assert statistics.std[2] == statistics.std[3] == STD_FLOOR
    assert statistics.floored == 2


def test_moments_merge_in_any_grouping() -> None:
    values = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float16)
    merged = Moments.of(values[:7]) + Moments.zero(3) + Moments.of(values[7:60]) + Moments.of(values[60:])
    np.testing.assert_allclose(merged.mean(), values.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.std(), values.astype(np.float64).std(0), rtol=1e-12)


def test_file_has_named_arrays(tmp_path: Path) -> None:
    statistics = ChannelStatistics.from_moments(
        Moments(np.array([2.0, 4.0]), np.array([2.0, 8.0]), 2), Moments(np.array([1.0, 3.0]), np.array([1.0, 5.0]), 2)
    )
    statistics.save(tmp_path / "odd.npz")
    with np.load(tmp_path / "odd.npz") as file:
        assert file["mean"].tolist() == [1.0, 2.0]
        assert file["std"].tolist() == [STD_FLOOR, STD_FLOOR]
        assert file["cls_std"].tolist() == [0.5, 0.5]
        assert (file["count"], file["std_floor"], file["floored"]) == (2, STD_FLOOR, 2)
    loaded = ChannelStatistics.load(tmp_path / "odd.npz")
    assert loaded.floored == 2
    assert np.array_equal(loaded.cls_mean, statistics.cls_mean)


def test_only_the_training_split_has_statistics(tmp_path: Path) -> None:
    extract(tmp_path, split="val")
    with pytest.raises(StoreError, match=r"no statistics of 'odd'.*theia extract .*--split train --teachers odd"):
        FeatureStore(tmp_path).statistics("odd")


def test_damaged_file_is_named(tmp_path: Path) -> None:
    extract(tmp_path)
    path = tmp_path / "statistics/odd.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"odd\.npz is damaged"):
        FeatureStore(tmp_path).statistics("odd")


def test_split_without_any_image_has_no_statistics(tmp_path: Path) -> None:
    writer = begin(tmp_path, teachers=[ODD], listed=1)
    writer.write_images(0, [], np.empty((0, 3, 8, 8), np.uint8), np.empty(0, np.int64), [("a", "bad")])
    with writer.open_shard("odd", 0):
        pass
    with pytest.raises(StoreError, match="has no image"):
        writer.finish()
