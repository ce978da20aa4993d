"""``data.teachers_per_step``: each training step draws the teachers whose features are read."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from theia.data.datamodule import FeatureData
from theia.data.sampler import TrainingSampler, teachers_of_step
from theia.errors import ConfigError
from theia.store.reads import Files, Read
from theia.types import FeatureBatch

NAMES = ["c", "a", "e", "b", "d"]


@pytest.mark.parametrize(
    ("teachers", "count"), [(all_of, some) for all_of in range(1, 6) for some in range(1, all_of + 1)]
)
def test_all_teachers_are_drawn_equally_often(teachers: int, count: int) -> None:
    names = NAMES[:teachers]
    # After as many steps as there are teachers, each was drawn as often as a step takes teachers.
    for first in (0, 7 * teachers):
        steps = [teachers_of_step(names, count, 3, step) for step in range(first, first + teachers)]
        assert all(len(set(step)) == len(step) == count for step in steps)
        assert Counter(name for step in steps for name in step) == dict.fromkeys(names, count)


def test_every_teacher_is_as_likely_in_every_step() -> None:
    drawn = Counter(name for seed in range(3000) for name in teachers_of_step(NAMES, 2, seed, 2))

    # Two of five in each of 3,000 draws, by four deviations of a binomial.
    assert all(abs(drawn[name] - 1200) < 4 * (3000 * 0.4 * 0.6) ** 0.5 for name in NAMES)


def test_seed_and_step_alone_decide_the_teachers() -> None:
    def drawn(names: list[str] = NAMES, seed: int = 3) -> list[list[str]]:
        return [teachers_of_step(names, 2, seed, step) for step in range(40)]

    assert drawn() == drawn(sorted(NAMES))
    assert drawn() != drawn(seed=4)
    assert len({tuple(step) for step in drawn()}) == 10  # of every pair


def test_rounds_go_on_in_the_next_epoch_and_processes_agree() -> None:
    def sampler(rank: int = 0, world_size: int = 1) -> TrainingSampler:
        return TrainingSampler(np.arange(26), 6, 3, rank, world_size, (), NAMES, 1)

    of_epochs = []
    for one in (sampler(), sampler(1, 2)):
        left_out = []
        for epoch in range(5):
            one.set_epoch(epoch)
            left_out += [one.left_out(step) for step in range(len(one))]
        of_epochs.append(left_out)

    assert of_epochs[0] == of_epochs[1]
    assert Counter(name for left_out in of_epochs[0] for name in left_out) == dict.fromkeys(NAMES, 16)  # of 20 steps


def test_by_default_nothing_is_drawn_or_kept() -> None:
    sampler = TrainingSampler(np.arange(50), 8, 3, teachers=NAMES)

    assert sampler.left_out(0) == []
    assert sampler.state_dict() == {"epoch": 0, "consumed": 0, "seed": 3, "rows": 50, "batch_size": 8}


def test_a_state_of_another_number_is_refused() -> None:
    one, all_of_them = (TrainingSampler(np.arange(50), 8, 3, teachers=NAMES, teachers_per_step=n) for n in (1, None))

    for ours, theirs in ((one, all_of_them), (all_of_them, one)):
        with pytest.raises(ConfigError, match=r"Resume with the same data\.teachers_per_step"):
            ours.load_state_dict(theirs.state_dict())


def test_more_teachers_than_there_are_is_an_error(store: Path) -> None:
    with pytest.raises(ConfigError, match=r"teachers_per_step is 3, but there are 2 teachers: alpha, beta"):
        FeatureData(str(store), batch_size=8, teachers_per_step=3).check_training(1)


def copied(batch: FeatureBatch) -> dict[str, torch.Tensor]:
    fields = {"image": batch.images, **batch.patches, **{f"{name}/scale": x for name, x in batch.scales.items()}}
    fields |= {f"{name}/cls": x for name, x in batch.cls.items()}
    return {name: tensor.clone() for name, tensor in fields.items()}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_the_drawn_teachers_as_the_store_has_them(
    tmp_path: Path, make_split: Any, workers: int, dtype: str
) -> None:
    for split, rows in (("train", 80), ("val", 20)):
        make_split(tmp_path, split, rows, dtype)
    every, one = (FeatureData(str(tmp_path), batch_size=8, workers=workers, teachers_per_step=n) for n in (None, 1))
    whole, parts = every.train_dataloader(), one.train_dataloader()
    drawn = []

    for batch, part in zip(map(copied, whole), map(copied, parts), strict=True):
        names = {name for name in part if name in ("alpha", "beta")}
        drawn += names
        assert part.keys() == {field for field in batch if field.partition("/")[0] in {*names, "image"}}
        assert all(torch.equal(batch[field], values) for field, values in part.items())

    assert drawn == [name for step in range(10) for name in teachers_of_step(["alpha", "beta"], 1, 0, step)]
    for data in (every, one):
        assert all(batch.patches.keys() == {"alpha", "beta"} for batch in data.val_dataloader())
        data.teardown("fit")


def test_only_the_drawn_teachers_are_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()  # bytes, by the folder of the file
    read_all = Files.read_all

    def counted(files: Files, reads: list[Read], *options: Any) -> None:
        for one in reads:
            read[Path(one.path).parent.name] += len(one.target)
        read_all(files, reads, *options)

    monkeypatch.setattr(Files, "read_all", counted)
    totals = []
    for count in (None, 1):
        data = FeatureData(str(store), batch_size=8, workers=0, teachers_per_step=count)
        read.clear()
        assert len(list(data.train_dataloader())) == 10
        totals.append(dict(read))

    images, features = 80 * 3 * 32 * 32, {"alpha": 80 * 2 * 4 * 4 * 8, "beta": 80 * 2 * (3 * 6 + 1) * 5}
    assert totals[0] == {"image": images, **features}
    assert totals[1] == {"image": images, **{name: size // 2 for name, size in features.items()}}


def test_a_state_taken_after_a_step_goes_on_with_its_draws(store: Path) -> None:
    def loader() -> Any:
        return FeatureData(str(store), batch_size=8, workers=1, teachers_per_step=1).train_dataloader()

    whole = loader()
    batches = iter(whole)
    for _ in range(3):
        next(batches)
    resumed = loader()
    resumed.load_state_dict(whole.state_dict())

    rest = [copied(batch) for batch in batches]
    ours = [copied(batch) for batch in resumed]
    assert len(rest) == len(ours) == 7
    for one, other in zip(ours, rest, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(values, other[name]) for name, values in one.items())
