import os
from pathlib import Path

import numpy as np
import pytest
import torch

from theia.data.loader import FeatureLoader
from theia.data.ring import HELD
from theia.data.sampler import EvaluationSampler, TrainingSampler
from theia.errors import ConfigError, StoreError
from theia.store.reader import FeatureStore, Split
from theia.types import FeatureBatch


@pytest.fixture
def split(store: Path) -> Split:
    return FeatureStore(store).open_split("train")


def loader(split: Split, workers: int, batch: int = 8) -> FeatureLoader:
    return FeatureLoader(split, TrainingSampler(np.arange(len(split)), batch, seed=1), workers)


def copies(batches: FeatureLoader) -> list[dict[str, np.ndarray]]:
    return [_copy(batch) for batch in batches]


def _copy(batch: FeatureBatch) -> dict[str, np.ndarray]:
    return {
        "rows": batch.rows.numpy().copy(),
        "image": batch.images.numpy().copy(),
        "labels": batch.labels.numpy().copy(),
        **{name: tensor.numpy().copy() for name, tensor in batch.patches.items()},
        **{f"{name}/cls": tensor.numpy().copy() for name, tensor in batch.cls.items()},
    }


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_hold_the_rows_that_the_store_has(split: Split, workers: int) -> None:
    for batch in copies(loader(split, workers)):
        buffers = split.allocate(8)
        split.read_into(batch["rows"], buffers)
        for field in ("image", "alpha", "beta", "beta/cls"):
            np.testing.assert_array_equal(batch[field], buffers[field])
        np.testing.assert_array_equal(batch["labels"], split.labels[batch["rows"]])


def test_workers_do_not_change_what_a_step_sees(split: Split) -> None:
    alone, helped = (copies(loader(split, workers)) for workers in (0, 2))

    for one, other in zip(alone, helped, strict=True):
        for field, values in one.items():
            np.testing.assert_array_equal(values, other[field])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_stays_valid_until_held_more_are_taken(split: Split, workers: int) -> None:
    kept: list[tuple[FeatureBatch, dict[str, np.ndarray]]] = []
    for batch in loader(split, workers, batch=4):
        kept = [*kept[-HELD + 1 :], (batch, _copy(batch))]
        if workers:
            # Give the workers the time to run as far ahead as they may.
            torch.rand(200, 200).matmul(torch.rand(200, 200))
        for view, copy in kept:
            for field, values in _copy(view).items():
                np.testing.assert_array_equal(values, copy[field])


def test_epochs_follow_each_other_with_the_same_workers(split: Split) -> None:
    one = loader(split, workers=1)
    first = np.concatenate([batch["rows"] for batch in copies(one)])
    one.sampler.set_epoch(1)
    second = np.concatenate([batch["rows"] for batch in copies(one)])

    assert sorted(first) == sorted(second) == list(range(80))
    assert not np.array_equal(first, second)


def test_an_epoch_cut_short_leaves_nothing_behind(split: Split) -> None:
    one = loader(split, workers=2)
    iterator = iter(one)
    next(iterator)
    del iterator
    one.sampler.set_epoch(1)

    rows = np.concatenate([batch["rows"] for batch in copies(one)])

    assert sorted(rows) == list(range(80))


def test_a_state_taken_after_a_batch_goes_on_at_the_next(split: Split) -> None:
    whole = loader(split, workers=2)
    iterator = iter(whole)
    for _ in range(3):
        next(iterator)
    state = whole.state_dict()
    rest = [batch.rows.numpy().copy() for batch in iterator]
    resumed = loader(split, workers=1)
    resumed.load_state_dict(state)

    np.testing.assert_array_equal(np.stack([batch["rows"] for batch in copies(resumed)]), np.stack(rest))
    assert len(resumed) == len(whole) == 10


def test_evaluation_covers_every_row_in_order(split: Split) -> None:
    batches = FeatureLoader(split, EvaluationSampler(np.arange(len(split)), 32), workers=1)

    assert list(np.concatenate([batch["rows"] for batch in copies(batches)])) == list(range(80))


def test_a_shard_that_shrinks_while_it_is_read_is_an_error_with_its_name(tmp_path: Path, make_split: object) -> None:
    make_split(tmp_path, "train", 32)
    split = FeatureStore(tmp_path).open_split("train")
    shard = next((tmp_path / "train" / "alpha").glob("*.h5"))
    os.truncate(shard, 4096)

    with pytest.raises(StoreError, match=shard.name):
        copies(loader(split, workers=1))


def test_closing_ends_an_iteration_with_an_error_and_loses_nothing_silently(split: Split) -> None:
    one = loader(split, workers=1)
    batches = iter(one)
    next(batches)
    one.close()

    with pytest.raises(ConfigError, match="close"):
        next(batches)


@pytest.mark.parametrize("taken", [1, 9])  # in the middle, and where all is asked for
def test_a_second_iteration_ends_the_first_with_an_error(split: Split, taken: int) -> None:
    one = loader(split, workers=1)
    first, second = iter(one), iter(one)
    for _ in range(taken):
        next(first)
    one.sampler.set_epoch(1)
    next(second)

    with pytest.raises(ConfigError, match="by a second one"):
        next(first)
