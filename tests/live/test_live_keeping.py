"""A live run that keeps its teachers' features: the store is the one that an extraction would have made."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live.conftest import SIZE, write_images

from theia.data.datamodule import FeatureData
from theia.data.numbered import NumberedData
from theia.errors import ConfigError, FeatureError, StoreError
from theia.extraction.config import ExtractConfig
from theia.extraction.pipeline import extract
from theia.live import LiveData
from theia.store.reader import FeatureStore
from theia.store.verify import Problem, verify

Live = Callable[..., LiveData]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theia.live.keeping._SHARD_SIZE", 7)


@pytest.fixture
def keeping(live: Live, tmp_path: Path) -> Callable[..., LiveData]:
    """``keeping(**changes)``: live data that is ready for its first epoch, and counts what its teachers see."""

    def make(**changes: Any) -> LiveData:
        log = {"brightest": {"log": str(tmp_path / "log")}}
        data = live(**{"keep": str(tmp_path / "kept"), "teacher_options": log} | changes)
        (tmp_path / "log").unlink(missing_ok=True)
        data.setup("fit")
        return data

    return make


def seen(tmp_path: Path) -> int:
    """Number of images that a teacher has seen since the training began."""
    log = tmp_path / "log"
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def train(data: NumberedData, epoch: int = 0, batches: int | None = None) -> list[dict[str, torch.Tensor]]:
    """What an epoch gives, or its first batches."""
    loader = data._training_loader or data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    given = []
    for number, batch in enumerate(loader):
        fields = {"images": batch.images, "rows": batch.rows, **batch.patches, "cls": batch.cls["brightest"]}
        given.append({name: values.clone() for name, values in fields.items()})
        if number + 1 == batches:
            break
    return given


def extracted(images: Path, store: Path, split: str = "train", **changes: Any) -> Path:
    """A store that an extraction makes."""
    options: dict[str, Any] = {
        "images": str(images), "split": split, "teachers": "brightest,mean", "store": store, "size": SIZE,
        "shard_size": 7, "workers": 0, "accelerator": "cpu", "devices": 1,
    }  # fmt: skip
    extract(ExtractConfig(**(options | changes)))
    return store


def files(store: Path) -> dict[str, bytes]:
    """Content of all shards and of the list of unreadable images."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.glob("train/**/*.*"))}


def test_the_store_is_the_one_that_an_extraction_makes(
    keeping: Live, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    train(keeping())

    assert f"theia fit --data.store {tmp_path / 'kept'}" in said.text
    assert not [found for found in verify(tmp_path / "kept") if isinstance(found, Problem)]
    theirs = extracted(tmp_path / "images", tmp_path / "extracted")
    assert files(tmp_path / "kept") == files(theirs)
    ours = FeatureStore(tmp_path / "kept")
    for name in ("brightest", "mean"):
        for value in ("mean", "std", "count"):
            wanted = getattr(FeatureStore(theirs).statistics(name), value)
            np.testing.assert_allclose(getattr(ours.statistics(name), value), wanted, rtol=1e-12)
    assert not (tmp_path / "kept" / ".kept").exists()


def test_each_image_is_computed_once_and_later_epochs_read(keeping: Live, tmp_path: Path) -> None:
    """8 of 40 are held out, whose features the cache has; 5 batches of 6 are drawn, 2 images are left over."""
    data = keeping(batch_size=6)
    first = train(data)
    assert seen(tmp_path) == 32

    second = train(data, 1)

    assert seen(tmp_path) == 32
    stored = FeatureData(str(tmp_path / "kept"), batch_size=6, workers=0, holdout=0.2)
    for epoch, ours in enumerate((first, second)):
        theirs = train(stored, epoch)
        assert len(ours) == len(theirs) == 5
        for mine, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(values, other[name]) for name, values in mine.items())
            assert mine["brightest"].dtype == mine["mean"].dtype == torch.float16
    data.teardown("fit")


@pytest.mark.parametrize("damaged", [False, True])
def test_what_a_killed_run_has_written_is_used(keeping: Live, tmp_path: Path, damaged: bool) -> None:
    """A loss of power may leave the checksum of a row without the row."""
    whole = keeping(keep=str(tmp_path / "whole"))
    expected = train(whole)
    killed = keeping()
    train(killed, batches=3)
    assert killed._kept is not None
    killed._kept._settle()
    killed._kept._held.close()  # as the system does
    if damaged:
        row = int(expected[0]["rows"][2])
        path, offset = killed._kept._place(row)
        with path.open("r+b") as file:
            file.seek(offset + 100)
            file.write(b"torn")

    again = keeping()
    state = killed.state_dict()
    again.load_state_dict({**state, "loader": {**state["loader"], "consumed": 8}})
    given = train(again)

    # One batch is taught; of the two before, only one with a damaged row, when shards are made.
    assert seen(tmp_path) == 8 + (1 if damaged else 0)
    for ours, theirs in zip(given, expected[1:], strict=True):
        assert all(torch.equal(values, theirs[name]) for name, values in ours.items())
    assert files(tmp_path / "kept") == files(tmp_path / "whole")


def test_a_kill_while_shards_are_made_loses_nothing(
    keeping: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(keeping(keep=str(tmp_path / "whole")))
    killed = keeping()
    finish, made = type(killed.kept)._finish_shard, []

    def stop(kept: Any, shard: int, teach: Any) -> None:
        if shard == 3:
            raise KeyboardInterrupt
        made.append(shard)
        finish(kept, shard, teach)

    with monkeypatch.context() as patch:
        patch.setattr("theia.live.keeping.Kept._finish_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            train(killed)
    killed.on_exception(KeyboardInterrupt())
    assert made == [0, 1, 2]

    again = keeping()
    given = train(again)

    assert all(
        torch.equal(ours[name], theirs[name]) for ours, theirs in zip(given, expected, strict=True) for name in ours
    )
    assert files(tmp_path / "kept") == files(tmp_path / "whole")


def test_a_cut_epoch_says_so_and_another_one_goes_on(
    keeping: Live, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    cut = keeping()
    train(cut, batches=2)
    cut.teardown("fit")
    assert "is not finished" in said.text
    assert f"features of {8 + 16} of 40 images are kept" in said.text
    with pytest.raises(StoreError, match="is unfinished: 0 of 6 shards"):
        FeatureStore(tmp_path / "kept").open_split("train")

    train(keeping(seed=5))

    assert 8 <= seen(tmp_path) <= 32
    assert files(tmp_path / "kept") == files(extracted(tmp_path / "images", tmp_path / "extracted"))


def test_an_extraction_completes_the_store_of_a_cut_epoch(keeping: Live, tmp_path: Path) -> None:
    cut = keeping()
    train(cut, batches=2)
    cut.teardown("fit")

    extracted(tmp_path / "images", tmp_path / "kept", teacher_options={"brightest": {"log": str(tmp_path / "log")}})

    assert files(tmp_path / "kept") == files(extracted(tmp_path / "images", tmp_path / "extracted"))
    later = keeping()
    train(later)
    assert seen(tmp_path) == 0
    assert not (tmp_path / "kept" / ".kept").exists()


def test_images_that_cannot_be_decoded_and_labels_are_those_of_an_extraction(
    keeping: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theia.live.images._MOST_UNREADABLE", 0.3)
    for number in (*range(7, 14), 30):
        (tmp_path / "images" / "ab"[number * 2 // 40] / f"{number:03d}.png").write_bytes(b"no image")

    train(keeping(labels=True))

    theirs = extracted(tmp_path / "images", tmp_path / "extracted", labels=True, max_skipped=0.3)
    assert files(tmp_path / "kept") == files(theirs)


def test_held_out_images_of_their_own_become_a_split(keeping: Live, tmp_path: Path) -> None:
    write_images(tmp_path / "others", 9)
    train(keeping(val_images=str(tmp_path / "others")))

    ours = FeatureData(str(tmp_path / "kept"), val_batch_size=9, workers=0)
    theirs = extracted(tmp_path / "others", tmp_path / "extracted", "val")
    (batch,) = ours.val_dataloader()
    assert (ours.trained_on, ours.held_out) == (40, 9)
    wanted = FeatureStore(theirs).open_split("val")
    arrays = wanted.allocate(9)
    wanted.read_into(np.arange(9), arrays)
    assert np.array_equal(batch.images, arrays["image"])
    assert np.array_equal(batch.patches["brightest"], arrays["brightest"])
    assert not [found for found in verify(tmp_path / "kept") if isinstance(found, Problem)]


@pytest.mark.parametrize(
    "change", [{"augment_flip": 0.5}, {"fraction": 0.5}, {"weights": {"a": 2.0}}, {"stored_features": "somewhere"}]
)
def test_what_is_not_each_image_once_is_refused(live: Live, tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"each training image once, as it is\. Leave out"):
        live(prepare=False, keep=str(tmp_path / "kept"), **change)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "more"}, "was begun with other images"),
        ({"size": 16}, "was begun with other images: size was 32, is 16"),
        ({"teacher_options": {"brightest": {"negative": True}}}, "has features of another 'brightest'"),
        ({"teacher_precision": "bf16-mixed"}, "precision was '32-true'"),
    ],
)
def test_a_store_of_something_else_is_refused_before_teachers_run(
    live: Live, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    extracted(tmp_path / "images", tmp_path / "kept")
    if "images" in change:
        change = {"images": str(tmp_path / "more")}
        write_images(tmp_path / "more", 10)

    with pytest.raises(StoreError, match=f"{message}.*--data.keep names that folder"):
        live(keep=str(tmp_path / "kept"), **change)
    assert not list((tmp_path / "cache").glob("*/val"))


def test_features_of_something_else_that_are_no_store_yet_are_refused(keeping: Live, tmp_path: Path) -> None:
    cut = keeping()
    train(cut, batches=1)
    cut.teardown("fit")

    with pytest.raises(StoreError, match=r"features of other images, teachers or precisions.*or delete .*\.kept"):
        keeping(teacher_precision="bf16-mixed")


def test_a_folder_in_use_is_refused(keeping: Live, tmp_path: Path) -> None:
    first = keeping()

    with pytest.raises(ConfigError, match=r"Another process works in .*another folder with --data\.keep"):
        keeping()

    first.teardown("fit")
    keeping()


def test_a_folder_of_other_files_is_refused(keeping: Live, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"not empty and not a feature store.*--data\.keep names that folder"):
        keeping(keep=str(tmp_path / "images"))


def test_a_disk_that_is_too_small_is_found_before_the_first_step(
    keeping: Live, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = 3 * SIZE * SIZE + 2 * (16 * 3 + 3) + 2 * 3
    monkeypatch.setattr("theia.live.keeping.free_bytes", lambda path: 40 * row)

    with pytest.raises(StoreError, match=r"The features to keep do not fit: 1[45]\d kB .* has 127 kB free"):
        keeping()
    assert "To write: 127 kB" in said.text


def test_a_disk_that_is_full_stops_the_training_by_name(keeping: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.fdopen

    def full(file: int, mode: str = "r", *more: Any) -> Any:
        if mode == "wb":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(file, mode, *more)

    data = keeping()
    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(StoreError, match=r"Disk full while writing .*\.kept/shard-.*\.rows.*free space"):
        train(data)


def test_values_that_cannot_be_stored_stop_the_training_by_name(keeping: Live) -> None:
    data = keeping()
    data.teachers.built["mean"].forward = lambda images: type(
        "Huge", (), {"patches": images.float().mean((2, 3))[:, None] * 1e6, "cls": None}
    )()

    with pytest.raises(FeatureError, match=r"Teacher 'mean', image '[ab]/0\d\d\.png': .*beyond float16"):
        train(data)


def test_a_run_does_not_go_on_without_what_it_kept(keeping: Live) -> None:
    data = keeping()
    train(data, batches=1)
    state = data.state_dict()
    data.teardown("fit")

    keeping().check_state(state)
    with pytest.raises(ConfigError, match="are not those that the checkpoint's run learned from"):
        keeping(keep=None).check_state(state)
