"""Stored views: what torchvision draws with the seed of a view's id, the same for every teacher, run and process."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from extraction.test_pipeline import digests, keys, stored
from extraction.tiny_plugin import SIZE, write_images
from PIL import Image
from torchvision.transforms import v2

from theia.data.datamodule import FeatureData
from theia.errors import ConfigError, StoreError
from theia.extraction.pipeline import extract
from theia.extraction.sources import open_source
from theia.extraction.views import ViewedSource
from theia.live.data import LiveData

TORCHVISION = v2.Compose(
    [
        v2.RandomResizedCrop(SIZE, scale=(0.3, 1), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(0.5),
    ]
)


def expected(folder: Path, key: str) -> np.ndarray:
    """What torchvision makes of one image when torch is seeded with the digest of the key."""
    name, _, number = key.partition("#")
    image = Image.open(folder / name).convert("RGB")
    if number:
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") // 2)
        image = TORCHVISION(image)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of other sizes than the stored one, in two folders that could be classes."""
    random = np.random.default_rng(3)
    for number in range(6):
        coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8))
        path = tmp_path / "photos" / ("cats" if number < 3 else "dogs") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((60 + number, 40), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "photos"


def test_views_are_torchvisions_and_follow_their_image(config, photos: Path, tmp_path: Path) -> None:
    extract(config(images=str(photos), views=4, labels=True))
    found = keys(tmp_path / "store", "image")
    assert found[:5] == ["cats/0.png", "cats/0.png#view1", "cats/0.png#view2", "cats/0.png#view3", "cats/1.png"]
    assert len(found) == 24
    pixels = stored(tmp_path / "store", "image", "data")
    np.testing.assert_array_equal(pixels, np.stack([expected(photos, key) for key in found]))
    assert len(np.unique(pixels, axis=0)) == 24
    assert stored(tmp_path / "store", "image", "label").tolist() == [0] * 12 + [1] * 12


def test_a_view_is_the_same_alone_in_any_order_and_beside_any_other_views(photos: Path) -> None:
    images = open_source(str(photos), "train")
    whole = ViewedSource(images, 3, SIZE, "squash")
    state = torch.get_rng_state()
    for index in (17, 4, 5, 0, 4):
        alone = ViewedSource(open_source(str(photos), "train"), 3, SIZE, "squash").read(index)
        assert whole.read(index).tobytes() == alone.tobytes()
    assert torch.equal(torch.get_rng_state(), state)
    more = ViewedSource(images, 5, SIZE, "squash")
    assert more.read(more.ids.index("dogs/4.png#view2")).tobytes() == whole.read(14).tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_teacher_that_is_added_later_sees_the_same_views(config, photos: Path, tmp_path: Path, workers: int) -> None:
    extract(config(images=str(photos), views=3, workers=workers))
    before = digests(tmp_path / "store")
    extract(config(images=str(photos), views=3, teachers="mean"))
    after = digests(tmp_path / "store")
    assert {path: after[path] for path in before} == before
    assert keys(tmp_path / "store", "mean") == keys(tmp_path / "store", "pooled")
    means = np.stack([expected(photos, key).mean((1, 2)) for key in keys(tmp_path / "store", "mean")])
    np.testing.assert_allclose(stored(tmp_path / "store", "mean", "data")[:, 0], means, rtol=1e-3)


def test_held_out_splits_have_their_images_as_they_are(config, photos: Path, tmp_path: Path) -> None:
    held_out = write_images(tmp_path / "held_out", 3)
    extract(config(images={"train": str(photos), "val": str(tmp_path / "held_out")}, views=2))
    assert len(keys(tmp_path / "store", "image")) == 12
    assert keys(tmp_path / "store", "pooled", "val") == list(held_out)


def test_sizes_are_planned_with_views_and_unreadable_images_lack_all_of_them(
    config, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "cats/1.png").write_bytes(b"no image")
    caplog.set_level("INFO")
    extract(config(images=str(photos), views=3, max_skipped=0.5))
    planned = next(line for line in caplog.text.splitlines() if line.startswith("train    image"))
    assert planned.split()[-6:] == ["768", "B", "18", "0", "13.8", "kB"]  # 18 x 3 x 16 x 16 bytes
    assert len(keys(tmp_path / "store", "image")) == 15
    skipped = (tmp_path / "store/train/skipped.csv").read_text()
    assert [line.split(",")[0] for line in skipped.splitlines()[1:]] == [
        "cats/1.png",
        "cats/1.png#view1",
        "cats/1.png#view2",
    ]


@pytest.mark.parametrize(("views", "message"), [(2, "--views was 3, is 2"), (1, "--views was 3, is not set")])
def test_another_number_of_views_is_refused(config, photos: Path, views: int, message: str) -> None:
    extract(config(images=str(photos), views=3))
    with pytest.raises(StoreError, match=message):
        extract(config(images=str(photos), views=views, teachers="mean"))


def test_views_without_training_images_are_refused(config, photos: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--views is for the split 'train', and the images are of val\. Leave it out"
    ):
        config(images=str(photos), split="val", views=2)


def test_names_that_could_be_those_of_views_are_refused(config, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png\na.png#view1\n")
    with pytest.raises(ConfigError, match=r"'a\.png#view1' has a name as --views gives"):
        extract(config(images=str(tmp_path / "list.txt"), views=2))


def held_out_and_trained_on(data: FeatureData | LiveData, ids: list[str]) -> tuple[list[str], set[str]]:
    return [ids[row] for row in data.divided(len(ids))[1]], {ids[row] for row in data.all_training_rows()}


def test_views_of_held_out_images_are_not_trained_on(config, photos: Path, tmp_path: Path) -> None:
    extract(config(images=str(photos), views=3))
    ids = keys(tmp_path / "store", "image")
    options = {"batch_size": 2, "holdout": 0.3, "workers": 0}
    stored_data = FeatureData(str(tmp_path / "store"), **options)
    mixed = LiveData(
        teachers="pooled,mean",
        stored_features=str(tmp_path / "store"),
        size=SIZE,
        cache=str(tmp_path / "cache"),
        **options,
    )
    for data in (stored_data, mixed):
        held_out, trained_on = held_out_and_trained_on(data, ids)
        assert len(held_out) == 2
        assert not any("#" in key for key in held_out)
        assert trained_on == {key for key in ids if key.partition("#")[0] not in held_out}
    assert [ids[row] for row in stored_data.held_out_rows()] == held_out


def test_scorers_fit_to_images_as_they_are(config, photos: Path, tmp_path: Path) -> None:
    extract(config(images={"train": str(photos), "val": str(photos)}, views=3))
    data = FeatureData(str(tmp_path / "store"), batch_size=2, workers=0)
    seen = [batch.images for batch in data.ordered_dataloader("train", torch.device("cpu"))]
    assert (data.trained_on, data.scorers_fit_to) == (18, 6)
    np.testing.assert_array_equal(
        torch.cat(seen).numpy(),
        np.stack([expected(photos, key) for key in keys(tmp_path / "store", "image") if "#" not in key]),
    )


@pytest.mark.parametrize(("fraction", "images"), [(0.01, 1), (0.5, 3)])
def test_a_fraction_is_of_images_with_all_their_views(
    config, photos: Path, tmp_path: Path, fraction: float, images: int
) -> None:
    extract(config(images={"train": str(photos), "val": str(photos)}, views=3))
    ids = keys(tmp_path / "store", "image")
    data = FeatureData(str(tmp_path / "store"), batch_size=1, workers=0, fraction=fraction)

    drawn = [ids[row] for row in data.training_rows()]

    assert data.scorers_fit_to == images == len([key for key in drawn if "#" not in key])
    assert data.trained_on == 3 * images
    assert len({key.partition("#")[0] for key in drawn}) == images


def test_a_weight_draws_images_with_all_their_views(config, photos: Path, tmp_path: Path) -> None:
    sources = [f"{name}={photos}" for name in "xy"]
    extract(config(images={"train": sources, "val": str(photos)}, views=3))
    ids = keys(tmp_path / "store", "image")
    data = FeatureData(str(tmp_path / "store"), batch_size=1, workers=0, weights={"x": 0.5, "y": 1.5})

    drawn = Counter(ids[row].partition("#")[0] for row in data.drawn_rows())

    assert Counter((key[0], times) for key, times in drawn.items()) == {("x", 3): 3, ("y", 3): 3, ("y", 6): 3}
