import hashlib
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data

from theia.errors import ImageError
from theia.extraction.sources import HELD_OUT_PHOTOS, TRAIN_PHOTOS, open_source

SPLITS = ["train", "val", "test"]


def digest(split, count):
    source = open_source(f"sample:{count}", split)
    pixels = b"".join(np.asarray(source.read(index)).tobytes() for index in range(count))
    return hashlib.sha256(pixels).hexdigest()


def photos(source):
    return {sample_id.split("/")[0] for sample_id in source.ids}


@pytest.mark.parametrize("split", SPLITS)
def test_crops_load_without_a_network_and_show_something(split, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the sample photographs must not need a network")

    monkeypatch.setattr(socket, "socket", refuse)
    source = open_source("sample:160", split)
    for index in range(160):
        crop = source.read(index)
        assert crop.mode == "RGB"
        assert crop.width == crop.height >= 64
        assert np.asarray(crop).std() > 1


def test_train_and_other_splits_share_no_photograph():
    train, val, test = (photos(open_source("sample", split)) for split in SPLITS)
    assert not train & val
    assert val == test == set(HELD_OUT_PHOTOS)
    assert train == set(TRAIN_PHOTOS)
    # Nor the same photograph under another name.
    assert not set(TRAIN_PHOTOS.values()) & set(HELD_OUT_PHOTOS.values())


@pytest.mark.parametrize(("location", "count"), [("sample", 640), ("sample:1", 1), ("sample:37", 37)])
def test_count(location, count):
    source = open_source(location, "train")
    assert len(source.ids) == len(set(source.ids)) == count
    assert source.ids[0] == "astronaut/crop-00000"
    assert source.labels is None


@pytest.mark.parametrize("location", ["sample:", "sample:0", "sample:-3", "sample:many", "sample:1.5"])
def test_bad_count_is_refused(location):
    with pytest.raises(ImageError, match="Give a number from 1"):
        open_source(location, "train")


def test_labels_are_refused():
    with pytest.raises(ImageError, match="no labels"):
        open_source("sample", "train", labels=True)


def test_a_longer_set_begins_with_the_shorter_one():
    short, long = open_source("sample:20", "val"), open_source("sample:40", "val")
    assert long.ids[:20] == short.ids
    for index in (0, 7, 19):
        np.testing.assert_array_equal(np.asarray(long.read(index)), np.asarray(short.read(index)))


def test_crops_are_the_same_in_another_process():
    # Another hash seed: nothing may depend on the order of a set.
    other = subprocess.run(
        [sys.executable, "-c", "from test_sources_sample import digest; print(digest('val', 24))"],
        cwd=Path(__file__).parent,
        env={"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == digest("val", 24)


def test_splits_of_the_same_photographs_show_different_crops():
    assert digest("val", 12) != digest("test", 12)


@pytest.mark.parametrize(("index", "photo", "left"), [(0, skimage.data.chelsea, 75), (1, skimage.data.coffee, 100)])
def test_the_first_crops_are_the_largest_centred_squares(index, photo, left):
    pixels = photo()
    side = pixels.shape[0]
    crop = np.asarray(open_source("sample:4", "val").read(index))
    np.testing.assert_array_equal(crop, pixels[:, left : left + side])


def test_later_crops_are_squares_of_the_photograph_some_mirrored():
    source = open_source("sample:80", "val")
    pixels = skimage.data.coffee()
    mirrored = 0
    for index in range(5, 80, 4):
        crop = np.asarray(source.read(index))
        assert source.ids[index] == f"coffee/crop-{index:05d}"
        assert 0.3 * 400 - 1 <= len(crop) <= 400
        plain, flipped = _contains(pixels, crop), _contains(pixels, crop[:, ::-1])
        assert plain != flipped
        mirrored += flipped
    assert 0 < mirrored < 19


def _contains(photo, crop):
    side = len(crop)
    corner = (photo[: len(photo) - side + 1, : photo.shape[1] - side + 1] == crop[0, 0]).all(-1)
    return any(np.array_equal(photo[y : y + side, x : x + side], crop) for y, x in np.argwhere(corner))
