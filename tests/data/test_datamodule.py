import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import lightning as L
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from theia.cli.main import main
from theia.data.datamodule import FeatureData
from theia.errors import ConfigError
from theia.training.distillation import Distillation


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("val_batch_size", 0), ("workers", -1), ("fraction", 0), ("fraction", 1.5), ("holdout", 1)],
)
def test_an_option_out_of_range_is_refused_by_name(store: Path, option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{option} is {value}"):
        FeatureData(str(store), **{option: value})


def test_a_misspelt_validation_split_is_refused(store: Path) -> None:
    with pytest.raises(ConfigError, match=r"no split 'vall'.*train, val"):
        FeatureData(str(store), val_split="vall")


def test_a_fraction_uses_as_many_samples_whatever_the_seed(store: Path) -> None:
    seen = []
    for seed in (0, 1):
        loader = FeatureData(str(store), batch_size=8, workers=0, fraction=0.2, seed=seed).train_dataloader()
        seen.append(np.concatenate([batch.rows.numpy().copy() for batch in loader]))

    assert len(seen[0]) == 16
    assert sorted(seen[0]) == sorted(seen[1])


def test_held_out_images_are_not_trained_on(tmp_path: Path, make_split: Any) -> None:
    make_split(tmp_path, "train", 80)
    data = FeatureData(str(tmp_path), batch_size=4, workers=0, holdout=0.1)

    trained, held = (
        {row for batch in loader for row in batch.rows.tolist()}
        for loader in (data.train_dataloader(), data.val_dataloader())
    )

    assert len(held) == data.held_out == 8
    assert trained | held == set(range(80))
    assert not trained & held


def test_a_capped_part_is_the_same_for_everyone_and_within_a_larger_one(store: Path) -> None:
    def rows(most: int | None, **options: Any) -> list[int]:
        data = FeatureData(str(store), workers=0, val_batch_size=7, **options).with_all_teachers()
        loader = data.ordered_dataloader("train", torch.device("cpu"), most)
        return [row for batch in loader for row in batch.rows.tolist()]

    few, more = rows(13), rows(31)

    assert (len(few), len(more)) == (13, 31)
    assert few == sorted(few) == rows(13, teachers="beta", seed=1, fraction=0.5)
    assert set(few) < set(more)
    assert rows(None) == rows(1000) == list(range(80))


def test_a_state_of_other_images_is_refused(store: Path, tmp_path: Path, make_split: Any) -> None:
    make_split(tmp_path, "train", 96)
    data, other = (FeatureData(str(root), batch_size=8, workers=0) for root in (store, tmp_path))
    data.train_dataloader()

    with pytest.raises(ConfigError, match="other training images"):
        other.load_state_dict(data.state_dict())


def test_a_state_reaches_a_loader_made_before_or_after(store: Path) -> None:
    data = FeatureData(str(store), batch_size=8, workers=0)
    batches = iter(data.train_dataloader())
    next(batches)
    state = data.state_dict()
    expected = next(batches).rows.tolist()
    early, late = (FeatureData(str(store), batch_size=8, workers=0) for _ in range(2))

    loader = early.train_dataloader()
    early.load_state_dict(state)
    late.load_state_dict(state)

    assert next(iter(loader)).rows.tolist() == expected
    assert next(iter(late.train_dataloader())).rows.tolist() == expected


@pytest.mark.parametrize("ending", ["teardown", "on_exception"])
def test_workers_end_with_the_run_however_it_ends(store: Path, ending: str) -> None:
    data = FeatureData(str(store), batch_size=8, workers=1)
    loaders = [data.train_dataloader(), data.val_dataloader()]
    for loader in loaders:
        next(iter(loader))
    workers = [pid for loader in loaders for pid in loader._workers.pids]
    assert len(workers) == 2

    {"teardown": lambda: data.teardown("fit"), "on_exception": lambda: data.on_exception(KeyboardInterrupt())}[ending]()

    assert not any(map(psutil.pid_exists, workers))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str, str]]:
    """Counts the reads of rows by split, teacher and dataset, which the HDF5 structure of the file tells."""
    found: Counter[tuple[str, str, str]] = Counter()
    real = os.preadv

    def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        path = Path(f"/proc/self/fd/{file}").readlink()
        with h5py.File(path, "r", locking=False) as shard:
            places = {name: (data.id.get_offset() or 0, data.nbytes) for name, data in shard.items()}
        (dataset,) = [name for name, (start, size) in places.items() if start <= offset < start + size]
        if dataset not in ("key", "label"):  # whole columns, once, when a split is opened
            found[path.parents[1].name, path.parent.name, dataset] += 1
        return real(file, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return found


def trainer() -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_train_batches=2, limit_val_batches=1,
        limit_test_batches=1, max_epochs=1,
    )  # fmt: skip


@pytest.mark.parametrize("distill_cls", [False, True])
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_cls_tokens_are_read_only_where_they_are_distilled(
    store: Path, command: str, distill_cls: bool, reads: Counter[tuple[str, str, str]]
) -> None:
    data = FeatureData(str(store), batch_size=8, val_batch_size=4, workers=0)
    size = {"image_size": 32, "width": 16, "depth": 1, "heads": 2}
    model = Distillation(data.teacher_shapes, distill_cls=distill_cls, compile=False, **size)

    getattr(trainer(), command)(model, data)

    columns = [("image", "data"), ("alpha", "data"), ("beta", "data"), *([("beta", "cls")] if distill_cls else [])]
    wanted = {("val", *column): 4 for column in columns}
    if command == "fit":
        wanted |= {("train", *column): 16 for column in columns}
    assert reads == wanted


def test_a_model_that_says_nothing_gets_every_cls_token(store: Path) -> None:
    data = FeatureData(str(store), batch_size=8, val_batch_size=4, workers=0)
    assert {tuple(next(iter(loader)).cls) for loader in (data.train_dataloader(), data.val_dataloader())} == {("beta",)}

    data.cls_teachers = []  # a scorer still gets them
    assert list(next(iter(data.ordered_dataloader("train", torch.device("cpu")))).cls) == ["beta"]
    assert list(next(iter(data.train_dataloader())).cls) == []


@pytest.mark.parametrize(
    ("own", "machine", "processes", "workers"),
    [(2, 2, 1, 1), (8, 8, 1, 2), (64, 64, 1, 4), (128, 128, 8, 4), (64, 64, 8, 2), (16, 128, 8, 4), (1, 1, 4, 1)],
)
def test_workers_follow_the_cores_of_each_training_process(
    store: Path, own: int, machine: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(own)))
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    data = FeatureData(str(store), batch_size=8)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        num_devices=processes, global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    loader = data.train_dataloader()
    next(iter(loader))
    assert len(loader._workers.pids) == workers
    data.teardown("fit")


@pytest.fixture(scope="module")
def of_two_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of eight images of a robot and eight others, by way of theia extract."""
    folder = tmp_path_factory.mktemp("sources")
    for name, colour in (("robot", 200), ("web", 50)):
        (folder / name).mkdir()
        for number in range(8):
            Image.new("RGB", (32, 32), (colour, number, 0)).save(folder / name / f"{number}.png")
    places = [str(folder / "robot"), f"photos={folder / 'web'}"]
    line = ["extract", "--images", *places, "--teachers=color", "--size=32", f"--store={folder / 'store'}"]
    assert main([*line, "--workers=0", "--shard_size=5"]) == 0
    return folder / "store"


def sources_drawn(store: Path, **options: Any) -> Counter[str]:
    data = FeatureData(str(store), batch_size=2, workers=0, holdout=0.01, **options)
    loader = data.train_dataloader()
    seen = Counter("robot" if image[0, 0, 0] == 200 else "photos" for batch in loader for image in batch.images)
    assert data.trained_on - sum(seen.values()) in (0, 1)  # what makes no whole batch is left out
    return seen


def test_sources_are_drawn_as_often_as_their_weights_say(of_two_sources: Path) -> None:
    plain = sources_drawn(of_two_sources)
    weighted = sources_drawn(of_two_sources, weights={"robot": 3, "photos": 0.5})
    without = sources_drawn(of_two_sources, weights={"photos": 0})

    assert sum(plain.values()) == 14  # of 15: one is held out
    assert weighted["robot"] in range(20, 25)
    assert weighted["photos"] in range(3, 5)
    assert without.keys() == {"robot"}


def test_weights_change_neither_the_order_of_scorers_nor_unseen_in_a_resumed_run(of_two_sources: Path) -> None:
    data = FeatureData(str(of_two_sources), batch_size=2, workers=0, weights={"robot": 2})
    every = [row for batch in data.ordered_dataloader("train", torch.device("cpu")) for row in batch.rows.tolist()]
    assert every == sorted(set(every))
    data.train_dataloader()
    with pytest.raises(ConfigError, match=r"data\.weights \{'robot': 2\}, this one with \{\}"):
        FeatureData(str(of_two_sources), batch_size=2, workers=0).check_state(data.state_dict())


def test_weights_of_sources_that_are_not_there_are_refused(of_two_sources: Path, store: Path) -> None:
    for place, weights, said in (
        (of_two_sources, {"web": 2.0}, "names 'web', but .* come from robot, photos"),
        (of_two_sources, {"robot": 0.0, "photos": 0.0}, "leave no training sample"),
        (store, {"web": 2.0}, "come from one source, so leave it out"),
        (store, {"web": -1.0}, r"data\.weights\.web is -1"),
    ):
        with pytest.raises(ConfigError, match=said):
            FeatureData(str(place), weights=weights).check_training(1)
