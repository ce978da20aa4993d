"""Live teachers beside stored features: joined sample by sample, and refused where they are of other images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live.conftest import SIZE, write_images

from theia.data.datamodule import FeatureData
from theia.data.sampler import teachers_of_step
from theia.errors import ConfigError, StoreError
from theia.extraction.config import ExtractConfig
from theia.extraction.pipeline import extract
from theia.live import LiveData

Live = Callable[..., LiveData]


@pytest.fixture
def store(tmp_path: Path, site: Path, pixels: np.ndarray) -> Path:
    """A store of the images with one of the two teachers, and both in another one."""
    write_images(tmp_path / "val", 6)
    for name, teachers in (("some", "brightest"), ("all", "brightest,mean")):
        for split, images in (("train", "images"), ("val", "val")):
            config = ExtractConfig(
                images=str(tmp_path / images), split=split, teachers=teachers, store=tmp_path / name, size=SIZE,
                shard_size=7, workers=0, accelerator="cpu", devices=1,
            )  # fmt: skip
            extract(config)
    return tmp_path / "some"


def whole(loader: Any) -> dict[str, torch.Tensor]:
    """Everything that a loader gives, one sample after another."""
    batches = []
    for batch in loader:
        fields = {"images": batch.images, "rows": batch.rows, **batch.patches}
        fields |= {f"{name}/cls": tokens for name, tokens in batch.cls.items()}
        batches.append({name: values.clone() for name, values in fields.items()})
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_drawn_teachers_are_read_or_run(live: Live, store: Path) -> None:
    loader = live(stored_features=str(store), images=None, teachers_per_step=1).train_dataloader()

    names = [name for batch in loader for name in batch.patches]

    assert names == [name for step in range(5) for name in teachers_of_step(["brightest", "mean"], 1, 0, step)]


@pytest.mark.parametrize("part", ["train_dataloader", "val_dataloader"])
@pytest.mark.parametrize("named", [True, False])
def test_samples_are_those_of_a_store_that_has_all(
    live: Live, store: Path, tmp_path: Path, part: str, named: bool
) -> None:
    images = {} if named else {"images": None}
    mixed = live(stored_features=str(store), **images)
    stored = FeatureData(str(tmp_path / "all"), batch_size=8, val_batch_size=4, workers=0)

    ours, theirs = (whole(getattr(data, part)()) for data in (mixed, stored))

    assert ours.keys() == theirs.keys() == {"images", "rows", "brightest", "brightest/cls", "mean"}
    for name in ours.keys() - {"mean"}:
        assert torch.equal(ours[name], theirs[name]), name
    torch.testing.assert_close(ours["mean"].half(), theirs["mean"])
    assert mixed.teacher_shapes == stored.teacher_shapes
    assert (mixed.trained_on, mixed.held_out) == (stored.trained_on, stored.held_out) == (40, 6)
    assert list(mixed.teachers.built) == ["mean"]
    for name, values in stored.statistics().items():
        np.testing.assert_array_equal(mixed.statistics()[name].mean, values.mean)


def test_components_are_restored_beside_live_features(live: Live, tmp_path: Path, site: Path, pixels: Any) -> None:
    config = ExtractConfig(
        images=str(tmp_path / "images"), teachers="brightest", store=tmp_path / "few", size=SIZE, keep_components=2,
        workers=0, accelerator="cpu", devices=1,
    )  # fmt: skip
    extract(config)
    mixed = live(stored_features=str(tmp_path / "few"))
    stored = FeatureData(str(tmp_path / "few"), batch_size=8, val_batch_size=4, workers=0, holdout=0.2)

    for part in ("train_dataloader", "val_dataloader"):
        ours, theirs = (whole(getattr(data, part)()) for data in (mixed, stored))
        assert ours["brightest"].shape[-1] == 3
        assert torch.equal(ours["brightest"], theirs["brightest"])
        assert "mean" in ours


def test_a_share_is_held_out_as_it_would_be_of_the_store(live: Live, tmp_path: Path, site: Path, store: Path) -> None:
    for name in ("some", "all"):
        manifest = tmp_path / name / "manifest.json"
        content = json.loads(manifest.read_text())
        del content["splits"]["val"]
        manifest.write_text(json.dumps(content))
    mixed = live(stored_features=str(store))
    stored = FeatureData(str(tmp_path / "all"), batch_size=8, val_batch_size=4, workers=0, holdout=0.2)

    ours, theirs = (whole(data.val_dataloader()) for data in (mixed, stored))

    assert len(ours["rows"]) == 8
    for name in ("images", "brightest"):
        assert torch.equal(ours[name], theirs[name])
    assert set(mixed.training_rows()) == set(stored.training_rows())


def test_live_teachers_see_the_views_of_a_store(live: Live, tmp_path: Path, site: Path, pixels: Any) -> None:
    for name, teachers in (("viewed", "brightest"), ("both", "brightest,mean")):
        config = ExtractConfig(
            images=str(tmp_path / "images"), teachers=teachers, store=tmp_path / name, size=SIZE, views=3, workers=0,
            accelerator="cpu", devices=1,
        )  # fmt: skip
        extract(config)
    mixed = live(stored_features=str(tmp_path / "viewed"), images=None)
    stored = FeatureData(str(tmp_path / "both"), batch_size=8, val_batch_size=4, workers=0, holdout=0.2)

    assert (mixed.trained_on, mixed.held_out) == (96, 8)  # 32 images with 3 views, and 8 as they are
    for part in ("train_dataloader", "val_dataloader"):
        ours, theirs = (whole(getattr(data, part)()) for data in (mixed, stored))
        assert torch.equal(ours["images"], theirs["images"])
        assert torch.equal(ours["brightest"], theirs["brightest"])
        torch.testing.assert_close(ours["mean"].half(), theirs["mean"])


def test_another_image_in_the_list_is_named(live: Live, store: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "a" / "003.png").rename(tmp_path / "images" / "a" / "003a.png")

    with pytest.raises(StoreError, match=r"at row 3, 'a/003a\.png' is in the list and 'a/003\.png' in the store"):
        live(prepare=False, stored_features=str(store))


def test_a_missing_image_at_the_end_is_named(live: Live, store: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "b" / "039.png").unlink()

    with pytest.raises(StoreError, match=r"at row 39, None is in the list and 'b/039\.png'"):
        live(prepare=False, stored_features=str(store))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": "mean"}, "none of the teachers mean; it has brightest"),
        ({"teachers": "brightest"}, "all of the teachers brightest"),
        ({"augment_flip": 0.5}, "and augmentation do not go together"),
        ({"val_images": "somewhere"}, "and data.val_images do not go together"),
        ({"size": 64}, "--data.size 32 --data.resize squash"),
        ({"teacher_options": {"brightest": {"negative": True}}}, "'brightest', which does not run"),
    ],
)
def test_what_does_not_go_together_is_refused(live: Live, store: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        live(prepare=False, stored_features=str(store), **change)
    assert message in str(caught.value)
