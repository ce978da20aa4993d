import numpy as np
import pytest

from theia.data.sampler import EvaluationSampler, TrainingSampler, fixed_fraction, hold_out, with_views
from theia.errors import ConfigError


def epoch(rows: int = 50, batch: int = 12, **kwargs: int) -> list[np.ndarray]:
    return list(TrainingSampler(np.arange(rows), batch, seed=3, **kwargs))


def test_an_epoch_sees_each_row_at_most_once_and_all_but_the_last_incomplete_batch() -> None:
    batches = epoch()

    assert [len(batch) for batch in batches] == [12, 12, 12, 12]
    assert len(np.unique(np.concatenate(batches))) == 48


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_partition_the_same_global_batches(world_size: int) -> None:
    pieces = [epoch(rank=rank, world_size=world_size) for rank in range(world_size)]

    for step, batch in enumerate(epoch()):
        np.testing.assert_array_equal(np.concatenate([piece[step] for piece in pieces]), batch)


def test_order_depends_on_seed_and_epoch_only() -> None:
    sampler, again = (TrainingSampler(np.arange(50), 12, seed=3) for _ in range(2))
    first = np.concatenate(list(sampler))
    sampler.set_epoch(1)
    again.set_epoch(1)

    assert not np.array_equal(first, np.concatenate(list(sampler)))
    np.testing.assert_array_equal(np.concatenate(list(sampler)), np.concatenate(list(again)))
    assert not np.array_equal(first, np.concatenate(list(TrainingSampler(np.arange(50), 12, seed=4))))


def test_a_state_goes_on_at_the_next_sample_even_with_other_processes() -> None:
    sampler = TrainingSampler(np.arange(50), 12, seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.advance()
    sampler.advance()
    resumed = [TrainingSampler(np.arange(50), 12, 3, rank, 2) for rank in range(2)]
    for one in resumed:
        one.load_state_dict(sampler.state_dict())
        one.set_epoch(2)

    rest = [np.concatenate(pieces) for pieces in zip(*resumed, strict=True)]

    np.testing.assert_array_equal(np.stack(rest), np.stack(whole[2:]))


@pytest.mark.parametrize(("rows", "batch", "seed"), [(49, 12, 3), (50, 10, 3), (50, 12, 4)])
def test_a_state_of_another_order_is_refused(rows: int, batch: int, seed: int) -> None:
    state = TrainingSampler(np.arange(50), 12, seed=3).state_dict()

    with pytest.raises(ConfigError, match="order"):
        TrainingSampler(np.arange(rows), batch, seed).load_state_dict(state)


def test_a_batch_that_cannot_be_shared_or_filled_is_refused() -> None:
    with pytest.raises(ConfigError, match="shared evenly by 5"):
        TrainingSampler(np.arange(50), 12, seed=0, world_size=5)
    with pytest.raises(ConfigError, match="fewer than one global batch"):
        TrainingSampler(np.arange(11), 12, seed=0)


@pytest.mark.parametrize(("rows", "batch", "world_size"), [(17, 8, 2), (9, 4, 4), (5, 8, 2), (64, 8, 2), (3, 1, 2)])
def test_evaluation_reads_every_row_once_in_equally_many_batches_per_process(
    rows: int, batch: int, world_size: int
) -> None:
    pieces = [list(EvaluationSampler(np.arange(rows), batch, rank, world_size)) for rank in range(world_size)]

    assert len({len(piece) for piece in pieces}) == 1
    assert all(0 < len(each) <= batch + 1 for piece in pieces for each in piece)
    assert sorted(np.concatenate([each for piece in pieces for each in piece])) == list(range(rows))


def test_evaluation_with_more_processes_than_samples_is_refused() -> None:
    with pytest.raises(ConfigError, match="fewer processes"):
        EvaluationSampler(np.arange(2), 1, 0, 3)


def test_fractions_are_nested_and_fixed() -> None:
    small, large = (set(fixed_fraction(np.arange(100), fraction)) for fraction in (0.1, 0.5))

    assert len(small) == 10
    assert small < large
    assert small == set(fixed_fraction(np.arange(100), 0.1))


def test_held_out_rows_are_no_training_rows() -> None:
    kept, held = hold_out(100, 0.1)

    assert len(held) == 10
    assert sorted([*kept, *held]) == list(range(100))


def test_an_image_is_chosen_with_all_its_views() -> None:
    ids = ["b.png#view1", "a.png", "b.png", "a.png#view1", "a.png#view2"]

    assert with_views(ids, np.array([1])).tolist() == [1, 3, 4]
    assert with_views(ids, np.array([1, 2])).tolist() == [0, 1, 2, 3, 4]
