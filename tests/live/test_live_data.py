"""LiveData in this process: what its batches hold, what it keeps, what it refuses."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live.conftest import SIZE, write_images
from PIL import Image, ImageOps

from theia.data.sampler import TrainingSampler, hold_out, teachers_of_step
from theia.errors import ConfigError, ImageError, UnknownTeacherError
from theia.live import LiveData
from theia.types import FeatureBatch

Live = Callable[..., LiveData]


def copied(batches: Any) -> list[FeatureBatch]:
    """Batches that outlive the slots they were read into."""
    return [
        FeatureBatch(
            batch.images.clone(),
            {name: tokens.clone() for name, tokens in batch.patches.items()},
            cls={name: tokens.clone() for name, tokens in batch.cls.items()},
            rows=batch.rows,
        )
        for batch in batches
    ]


def brightest(pixels: np.ndarray) -> np.ndarray:
    """What ``Brightest`` gives, ``(n, 16, 3)``."""
    cells = pixels.reshape(-1, 3, 4, SIZE // 4, 4, SIZE // 4).max((3, 5))
    return cells.reshape(-1, 3, 16).transpose(0, 2, 1)


def test_batches_hold_each_training_image_once_with_its_features(live: Live, pixels: np.ndarray) -> None:
    data = live(fraction=0.75, teacher_batch_size=3)

    batches = copied(data.train_dataloader())

    rows = torch.cat([batch.rows for batch in batches]).numpy()
    train, _ = hold_out(40, 0.2)
    assert len(set(rows)) == len(rows) == data.trained_on == 24
    assert set(rows) <= set(train)
    assert np.array_equal(torch.cat([batch.images for batch in batches]), pixels[rows])
    found = torch.cat([batch.patches["brightest"] for batch in batches]).numpy()
    assert np.array_equal(found, brightest(pixels[rows]))
    assert np.array_equal(torch.cat([batch.cls["brightest"] for batch in batches]), found.max(1))
    means = torch.cat([batch.patches["mean"] for batch in batches])[:, 0].numpy()
    np.testing.assert_allclose(means, pixels[rows].mean((2, 3)), rtol=1e-6)
    assert {key for batch in batches for key in batch.cls} == {"brightest"}


def test_held_out_images_come_with_stored_features_and_are_not_trained_on(live: Live, pixels: np.ndarray) -> None:
    data = live()

    batches = copied(data.val_dataloader())

    _, held_out = hold_out(40, 0.2)
    assert data.held_out == len(held_out) == 8
    assert np.array_equal(torch.cat([batch.images for batch in batches]), pixels[held_out])
    features = torch.cat([batch.patches["brightest"] for batch in batches])
    assert features.dtype == torch.float16
    assert np.array_equal(features, brightest(pixels[held_out]))


def test_images_of_their_own_may_be_held_out(live: Live, tmp_path: Path, pixels: np.ndarray) -> None:
    others = write_images(tmp_path / "others", 6)
    data = live(val_images=str(tmp_path / "others"))

    assert (data.trained_on, data.held_out) == (40, 6)
    assert np.array_equal(torch.cat([batch.images for batch in copied(data.val_dataloader())]), others)


def test_statistics_are_those_of_the_sampled_training_images(live: Live, pixels: np.ndarray) -> None:
    train, _ = hold_out(40, 0.2)
    whole = live().statistics()["brightest"]
    few, more = (live(statistics_images=number).statistics()["brightest"] for number in (5, 20))

    values = brightest(pixels[train]).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(whole.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.std, values.std(0), rtol=1e-9)
    assert (few.count, more.count, whole.count) == (5 * 16, 20 * 16, 32 * 16)
    np.testing.assert_allclose(live().covariances()["brightest"], np.cov(values.T, bias=True), rtol=1e-5)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_batch(live: Live, workers: int) -> None:
    views = {"augment_crop": 0.3, "augment_flip": 0.5, "augment_jitter": 0.4}
    one, several = (live(workers=number, **views) for number in (0, workers))
    try:
        loaders = [data.train_dataloader() for data in (one, several)]
        for epoch in (0, 1):
            for loader in loaders:
                loader.sampler.set_epoch(epoch)
            for ours, theirs in zip(*map(copied, loaders), strict=True):
                assert torch.equal(ours.rows, theirs.rows)
                assert torch.equal(ours.images, theirs.images)
                assert torch.equal(ours.patches["brightest"], theirs.patches["brightest"])
    finally:
        several.teardown("fit")


def test_two_processes_share_the_batches_of_one(live: Live) -> None:
    data = live()
    whole = copied(data.loader("train", data.training_sampler(0, 1)))
    halves = [copied(data.loader("train", data.training_sampler(rank, 2))) for rank in (0, 1)]

    for batch, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert torch.equal(batch.patches["mean"], torch.cat([part.patches["mean"] for part in parts]))


def test_a_loader_goes_on_at_the_next_batch_with_the_same_views(live: Live) -> None:
    views = {"augment_crop": 0.3, "augment_flip": 0.5}
    data = live(**views)
    data.train_dataloader().sampler.set_epoch(1)
    batches = iter(data._training_loader)
    next(batches)
    state = data.state_dict()
    expected = next(batches).images.clone()

    again = live(**views)
    again.check_state(state)
    again.load_state_dict(state)

    assert torch.equal(next(iter(again.train_dataloader())).images, expected)


def test_scorers_see_the_images_as_they_are(live: Live, pixels: np.ndarray) -> None:
    data = live(labels=True, augment_flip=1.0)

    train = copied(data.ordered_dataloader("train", torch.device("cpu"), most=10))
    (held_out,) = copied(data.ordered_dataloader("held_out", torch.device("cpu"), most=3, features=False))

    rows = torch.cat([batch.rows for batch in train]).numpy()
    assert len(rows) == 10
    assert np.array_equal(torch.cat([batch.images for batch in train]), pixels[rows])
    assert np.array_equal(torch.cat([batch.patches["brightest"] for batch in train]), brightest(pixels[rows]))
    assert not held_out.patches
    labels = next(iter(data.ordered_dataloader("train", torch.device("cpu")))).labels
    assert labels.tolist() == [int(row >= 20) for row in data.training_rows()[:4]]
    assert next(iter(data.ordered_dataloader("held_out", torch.device("cpu")))).labels is not None
    assert data.labels_agree()


@pytest.fixture
def calls(tmp_path: Path) -> Callable[[], int]:
    """Number of images that the teacher has seen since the last call."""
    log = tmp_path / "log"

    def count() -> int:
        images = sum(map(int, log.read_text().split())) if log.exists() else 0
        log.unlink(missing_ok=True)
        return images

    return count


@pytest.mark.parametrize(
    ("change", "images"),
    [
        ({}, 0),
        ({"batch_size": 4, "seed": 3, "fraction": 0.5, "augment_flip": 0.5}, 0),
        ({"holdout": 0.1}, 40),
        ({"statistics_images": 4}, 8 + 4),
        ({"negative": True}, 40),
        ({"resize": "center_crop"}, 40),
        ({"teacher_precision": "bf16-mixed"}, 40),
        ({"more": True}, 41),
    ],
)  # fmt: skip
def test_what_is_kept_is_used_again_for_the_same_images_and_teachers_only(
    live: Live, tmp_path: Path, calls: Callable[[], int], change: dict[str, Any], images: int
) -> None:
    def run(negative: bool = False, **changes: Any) -> None:
        options = {"brightest": {"log": str(tmp_path / "log"), "negative": negative}}
        live(teachers="brightest", teacher_options=options, **changes)

    run()
    assert calls() == 40
    if change.pop("more", False):
        shutil.copy(tmp_path / "images" / "a" / "000.png", tmp_path / "images" / "a" / "0000.png")

    run(**change)

    assert calls() == images


def test_what_only_statistics_needed_is_dropped(live: Live) -> None:
    data = live()

    assert {path.name for path in data.cache.root.iterdir() if path.is_dir()} == {"statistics", "val"}


def test_passes_go_on_where_they_were_interrupted(
    live: Live, tmp_path: Path, calls: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theia.live.cache._SHARD_SIZE", 8)
    options = {"teachers": "brightest", "teacher_options": {"brightest": {"log": str(tmp_path / "log")}}}

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    data = live(prepare=False, **options)
    with monkeypatch.context() as patch:
        patch.setattr("theia.extraction.pipeline._finish", fail)
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    assert calls() == 40
    shutil.rmtree(data.cache.root / "val" / "brightest")

    live(**options)

    assert calls() == 8


def test_where_things_are_and_what_they_take_is_said(live: Live, said: pytest.LogCaptureFixture) -> None:
    data = live(workers=2)
    data.train_dataloader()

    assert f"Held-out features and statistics: {data.cache.root}" in said.text
    # 8 images in each of 2 x 2 slots ahead and 2 in use
    assert f"{6 * 8 * 3 * SIZE * SIZE / 1000:.3g} kB for batches, which 2 processes decode into" in said.text


def damage(tmp_path: Path, *numbers: int) -> None:
    for number in numbers:
        (tmp_path / "images" / "ab"[number * 2 // 40] / f"{number:03d}.png").write_bytes(b"no image")


def test_images_that_cannot_be_decoded_are_left_out_and_listed(
    live: Live, tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theia.live.images._MOST_UNREADABLE", 0.1)
    damage(tmp_path, 3, 30)
    data = live()

    assert data.trained_on + data.held_out == 38
    assert not {"a/003.png", "b/030.png"} & set(data.source.ids)
    assert "2 of 40 images" in said.text
    (record,) = (tmp_path / "cache").glob("images-*.json")
    assert str(record) in said.text
    assert "not a JPEG" in record.read_text()


def test_too_many_images_that_cannot_be_decoded_stop_before_training(live: Live, tmp_path: Path) -> None:
    damage(tmp_path, 3)

    with pytest.raises(ImageError, match=r"(?s)1 of the first 40 images.*at most 1%.*a/003\.png: not a JPEG"):
        live()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_was_not_checked_stops_the_training_by_name(live: Live, tmp_path: Path, workers: int) -> None:
    data = live(check_images=False, workers=workers, val_images=str(tmp_path / "images"), statistics_images=1)
    damage(tmp_path, 3)
    try:
        with pytest.raises(ImageError, match=r"'a/003\.png' .* cannot be read: not a JPEG.*data\.check_images be true"):
            list(data.train_dataloader())
    finally:
        data.teardown("fit")


def test_a_check_goes_on_where_it_was_interrupted(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    from theia.extraction.sources import FolderSource

    read, seen = FolderSource.read, []

    def watched(self: FolderSource, index: int) -> Any:
        seen.append(index)
        if index == 23 and len(seen) == 24:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr("theia.live.data.pixels_sha256", lambda source: "the same")
    monkeypatch.setattr(FolderSource, "read", watched)
    monkeypatch.setattr("theia.live.images._CHECKED_TOGETHER", 10)
    monkeypatch.setattr("theia.live.images._SECONDS_BETWEEN_RECORDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        live()
    assert seen == list(range(24))
    seen.clear()

    live()

    assert seen[:20] == list(range(20, 40))


def test_tar_files_are_read_by_offset(live: Live, tmp_path: Path, pixels: np.ndarray) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "all.tar", "w") as tar:
        tar.add(tmp_path / "images", ".")
    data = live(images=str(tmp_path / "tars"))

    batch = next(iter(data.train_dataloader()))

    numbers = [int(Path(data.source.ids[row]).stem) for row in batch.rows.tolist()]
    assert np.array_equal(batch.images, pixels[numbers])


def test_several_places_are_joined(live: Live, tmp_path: Path) -> None:
    write_images(tmp_path / "more", 10)
    data = live(images=[str(tmp_path / "images"), str(tmp_path / "more")])

    assert len(data.source.ids) == 50
    assert "more/a/000.png" in data.source.ids


def test_places_are_drawn_as_often_as_their_weights_say(live: Live, tmp_path: Path) -> None:
    write_images(tmp_path / "more", 10)
    places = [str(tmp_path / "images"), str(tmp_path / "more")]
    data = live(images=places, val_images=places[:1], batch_size=1, weights={"images": 0.5, "more": 3.0})

    rows = torch.cat([batch.rows for batch in data.train_dataloader()]).tolist()

    names = [data.source.ids[row].partition("/")[0] for row in rows]
    assert {name: names.count(name) for name in names} == {"images": 20, "more": 30}
    assert data.trained_on == 50


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": None}, ConfigError, "--data.images PLACE"),
        ({"images": "nowhere"}, ImageError, "nowhere"),
        ({"teachers": None}, ConfigError, "--data.teachers NAMES"),
        ({"teachers": "brightets"}, UnknownTeacherError, "brightest"),
        ({"teacher_options": {"brightest": {"depth": 2}}}, ConfigError, "no option 'depth'. It has: log, negative"),
        ({"teacher_options": {"clip": {"weights": "random"}}}, ConfigError, "options of 'clip', which does not run"),
        ({"teacher_device": "cuda:99"}, ConfigError, "data.teacher_device is 'cuda:99'"),
        ({"teacher_device": "gpu"}, ConfigError, "data.teacher_device is 'gpu'"),
        ({"size": 0}, ConfigError, "data.size is 0"),
        ({"statistics_images": 0}, ConfigError, "data.statistics_images is 0"),
        ({"teacher_batch_size": 0}, ConfigError, "data.teacher_batch_size is 0"),
        ({"augment_crop": 0}, ConfigError, "data.augment_crop is 0"),
        ({"augment_flip": 1.5}, ConfigError, "data.augment_flip is 1.5"),
        ({"augment_jitter": -1}, ConfigError, "data.augment_jitter is -1"),
        ({"batch_size": 0}, ConfigError, "data.batch_size is 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    live: Live, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        live(prepare=False, **change)

    assert message in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_fewer_images_than_a_batch_are_refused(live: Live, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"32 samples, fewer than one global batch of 64.*Lower data\.batch_size"):
        live(prepare=False, batch_size=64).check_training(1)
    assert not (tmp_path / "cache").exists()


def test_images_that_must_be_read_in_order_are_refused(live: Live, tmp_path: Path) -> None:
    pq, pa = (pytest.importorskip(name) for name in ("pyarrow.parquet", "pyarrow"))
    (tmp_path / "tables").mkdir()
    image = (tmp_path / "images" / "a" / "000.png").read_bytes()
    pq.write_table(pa.table({"image": [image] * 3}), tmp_path / "tables" / "a.parquet")

    with pytest.raises(ImageError, match=r"of parquet data.*hf:FOLDER"):
        live(prepare=False, images=str(tmp_path / "tables"))
    with pytest.raises(ImageError, match="of parquet data"):
        live(prepare=False, images=[str(tmp_path / "images"), str(tmp_path / "tables")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_options": {"brightest": {"negative": True}}}, "features of brightest"),
        ({"holdout": 0.1}, "other training images"),
        ({"size": 16}, "other training images"),
        ({"seed": 1}, "their order would change"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(live: Live, change: dict[str, Any], message: str) -> None:
    data = live()
    next(iter(data.train_dataloader()))

    with pytest.raises(ConfigError, match=message):
        live(**change).check_state(data.state_dict())


def test_a_run_goes_on_where_its_images_were_moved(live: Live, tmp_path: Path) -> None:
    data = live()
    next(iter(data.train_dataloader()))
    (tmp_path / "images").rename(tmp_path / "moved")

    live(images=str(tmp_path / "moved")).check_state(data.state_dict())


def test_other_images_of_the_same_names_are_told_from_these(live: Live, tmp_path: Path) -> None:
    data = live()
    next(iter(data.train_dataloader()))
    state, cache = data.state_dict(), data.cache.root
    for path in (tmp_path / "images").rglob("*.png"):
        with Image.open(path) as image:
            ImageOps.invert(image.convert("RGB")).save(path)

    other = live()

    assert other.cache.root != cache
    with pytest.raises(ConfigError, match="other training images"):
        other.check_state(state)


def test_a_teacher_that_is_too_large_is_told_with_what_it_needs(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    data = live(prepare=False, teachers="mean")
    teacher = data.teachers.built["mean"]
    teacher.weight = torch.nn.Parameter(torch.zeros(1_000_000), requires_grad=False)

    def fail(images: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    teacher.forward = fail
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 10**6, 3 * 10**9))

    with pytest.raises(ConfigError, match=r"'mean' does not fit.* 4 MB, and it was given 8.*2 MB of 3 GB") as caught:
        data.prepare_data()
    assert "--data.teacher_batch_size" in str(caught.value)


@pytest.mark.parametrize("precision", ["auto", "bf16-mixed"])
def test_teachers_run_in_the_precision_that_is_asked_for(live: Live, precision: str) -> None:
    data = live(teachers="mean", teacher_precision=precision)
    teacher, seen = data.teachers.built["mean"], []
    forward = teacher.forward

    def watched(images: torch.Tensor) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(images)

    teacher.forward = watched
    next(iter(data.train_dataloader()))

    assert seen == [precision == "bf16-mixed"]


def test_each_epoch_shows_other_views(live: Live) -> None:
    loader = live(augment_crop=0.2).train_dataloader()
    seen = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        batches = copied(loader)
        rows = torch.cat([batch.rows for batch in batches]).tolist()
        seen.append(dict(zip(rows, torch.cat([batch.images for batch in batches]), strict=True)))

    assert seen[0].keys() == seen[1].keys()
    assert not any(torch.equal(image, seen[1][row]) for row, image in seen[0].items())


def test_the_order_is_that_of_the_sampler(live: Live) -> None:
    data = live(seed=4)
    sampler = TrainingSampler(hold_out(40, 0.2)[0], 8, 4)

    assert [batch.rows.tolist() for batch in data.train_dataloader()] == [rows.tolist() for rows in sampler]


def test_only_the_drawn_teachers_run(live: Live, tmp_path: Path, calls: Callable[[], int]) -> None:
    options = {"teacher_options": {"brightest": {"log": str(tmp_path / "log")}}}
    every, one = live(**options), live(teachers_per_step=1, **options)
    calls()
    whole = copied(every.train_dataloader())
    assert calls() == 32

    parts = copied(one.train_dataloader())

    drawn = [teachers_of_step(["brightest", "mean"], 1, 0, step) for step in range(4)]
    assert [list(batch.patches) for batch in parts] == drawn
    assert calls() == 16  # images in two of the four steps
    for batch, part in zip(whole, parts, strict=True):
        assert all(torch.equal(batch.patches[name], values) for name, values in part.patches.items())
        assert set(part.cls) == set(part.patches) & {"brightest"}
    assert all(batch.patches.keys() == {"brightest", "mean"} for batch in one.val_dataloader())


def test_a_store_is_not_kept_of_some_teachers_alone(live: Live, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.teachers_per_step and augmentation, or leave out data\.keep"):
        live(teachers_per_step=1, keep=str(tmp_path / "kept"))


@pytest.mark.parametrize(
    ("views", "keeps"), [({}, False), ({"augment_crop": 0.5, "augment_flip": 0.5}, False), ({}, True)]
)
def test_the_student_sees_other_sizes_of_what_the_teachers_see(
    live: Live, tmp_path: Path, pixels: np.ndarray, views: dict[str, float], keeps: bool
) -> None:
    """Images of 32 pixels are trained on at 16; larger ones are decoded, unless a store is to be used later."""
    keep = {"keep": str(tmp_path / "kept")} if keeps else {}
    seen = []
    for sizes in (None, "8,16,32"):
        data = live(size=16, batch_size=4, image_sizes=sizes, **views, **(keep if sizes else {}))
        data.setup("fit")
        loader = data.train_dataloader()
        batches = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            batches += copied(loader)
        seen.append(batches)

    assert {batch.images.shape[-1] for batch in seen[1]} == {8, 16, 32}
    for plain, batch in zip(*seen, strict=True):
        assert torch.equal(batch.rows, plain.rows)
        assert torch.equal(batch.patches["brightest"], plain.patches["brightest"].to(batch.patches["brightest"].dtype))
        side = batch.images.shape[-1]
        if side == 16:
            assert torch.equal(batch.images, plain.images)
        if side == 32 and not views and not keeps:
            assert np.array_equal(batch.images, pixels[batch.rows])
        # The same view: alike where both are brought to 8x8.
        ours, theirs = (
            torch.nn.functional.adaptive_avg_pool2d(images.float(), 8).flatten().numpy()
            for images in (batch.images, plain.images)
        )
        assert np.corrcoef(ours, theirs)[0, 1] > 0.98
