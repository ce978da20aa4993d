"""Image sets of Hugging Face: parquet files, and what the package datasets fetches."""

import io
import json
import pickle
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from theia.errors import ConfigError, ImageError
from theia.extraction.images import UnreadableImageError
from theia.extraction.sources import open_source

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}})}


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def png(seed):
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "PNG")
    return file.getvalue()


def write(path, seeds, *, group=2, column="image", kind=STRUCT, metadata=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [png(seed) if kind != STRUCT else {"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds]
    table = pa.table({column: pa.array(values, kind), **columns})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", [STRUCT, pa.binary(), pa.large_binary()], ids=["struct", "bytes", "large bytes"])
def test_images_are_read_in_the_order_of_files_and_rows(tmp_path, kind):
    write(tmp_path / "b.parquet", [10, 11], kind=kind)
    write(tmp_path / "a.parquet", range(5), kind=kind)
    source = open_source(str(tmp_path), "train")
    assert source.ids[:2] == ["a/row-000000", "a/row-000001"]
    assert source.ids[-1] == "b/row-000001"
    assert source.labels is None
    found = {index: np.asarray(source.read(index)) for index in (6, 0, 3, 4, 1)}
    copied = pickle.loads(pickle.dumps(source))
    for index, seed in zip((6, 0, 3, 4, 1), (11, 0, 3, 4, 1), strict=True):
        assert np.array_equal(found[index], pixels(seed))
        assert np.array_equal(np.asarray(copied.read(index)), pixels(seed))


def test_files_are_chosen_by_the_split_in_their_names(tmp_path):
    write(tmp_path / "data/train-00000-of-00002.parquet", [0])
    write(tmp_path / "data/train-00001-of-00002.parquet", [1])
    write(tmp_path / "data/validation-00000-of-00001.parquet", [2])
    assert len(open_source(str(tmp_path), "train").ids) == 2
    assert open_source(str(tmp_path), "val").ids == ["data/validation-00000-of-00001/row-000000"]
    with pytest.raises(ImageError, match=r"named after the split 'test'.*train \(2\), val \(1\)"):
        open_source(str(tmp_path), "test")


def test_labels_and_their_names_come_from_the_file(tmp_path):
    write(tmp_path / "a.parquet", range(3), label=pa.array([1, 0, 1]), metadata=NAMES)
    source = open_source(str(tmp_path / "a.parquet"), "train", labels=True)
    assert (source.labels, source.classes) == ([1, 0, 1], ["cat", "dog"])


@pytest.mark.parametrize(
    ("columns", "labels", "said"),
    [
        ({}, True, "has no column 'label'. It has: image"),
        ({"label": pa.array([0, -1, 0])}, True, "label of row 1 in .* is -1"),
        ({"depth": pa.array([b"x"] * 3)}, False, "has images in image, depth. Name one of them: PLACE#image"),
    ],
)
def test_what_is_missing_or_ambiguous_is_said(tmp_path, columns, labels, said):
    write(tmp_path / "a.parquet", range(3), **columns)
    with pytest.raises(ImageError, match=said):
        open_source(str(tmp_path), "train", labels=labels)


def test_one_of_several_columns_can_be_named(tmp_path):
    write(tmp_path / "a.parquet", range(3), depth=pa.array([png(seed + 50) for seed in range(3)]))
    assert np.array_equal(np.asarray(open_source(f"{tmp_path}#depth", "train").read(2)), pixels(52))
    with pytest.raises(ImageError, match=r"no images in a column 'mask'.*Columns: image, depth"):
        open_source(f"{tmp_path}#mask", "train")


def test_a_table_without_images_lists_its_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(ImageError, match=r"no column of images.*Columns: text, label"):
        open_source(str(tmp_path), "train")


def test_a_damaged_file_is_named_and_a_row_without_image_is_unreadable(tmp_path):
    path = write(tmp_path / "a.parquet", range(4))
    table = pa.table({"image": pa.array([None, {"bytes": png(1), "path": None}], STRUCT)})
    pq.write_table(table, tmp_path / "empty.parquet")
    source = open_source(str(tmp_path / "empty.parquet"), "train")
    with pytest.raises(UnreadableImageError, match="holds no image"):
        source.read(0)
    assert np.array_equal(np.asarray(source.read(1)), pixels(1))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ImageError, match=r"a\.parquet cannot be read as parquet"):
        open_source(str(path), "train")


def test_parquet_beside_images_is_refused(tmp_path):
    write(tmp_path / "a.parquet", [0])
    (tmp_path / "b.png").write_bytes(png(1))
    with pytest.raises(ImageError, match=r"both parquet files \(a\.parquet\) and others \(b\.png\)"):
        open_source(str(tmp_path), "train")


def test_without_datasets_the_extra_and_the_alternative_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'theia\[datasets\]'.*give their folder"):
        open_source("hf:owner/name", "train")


def test_a_set_that_cannot_be_had_names_cause_and_alternative(monkeypatch):
    def fail(name):
        raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nmore")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(get_dataset_split_names=fail))
    with pytest.raises(ImageError, match=r"owner/name.*doesn't exist on the Hub\).*accept its terms.*parquet files"):
        open_source("hf:owner/name", "train")


class TestDatasets:
    """With the package itself, on a set in a local folder, which it takes for one of the hub."""

    @pytest.fixture(autouse=True)
    def owner(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        labels = pa.array([1, 0, 1])
        write(tmp_path / "owner/name/data/train-00000-of-00001.parquet", range(3), label=labels, metadata=HUB)
        write(tmp_path / "owner/name/data/validation-00000-of-00001.parquet", [7], label=labels[:1], metadata=HUB)

    def test_images_and_labels_are_those_of_the_set(self):
        source = open_source("hf:owner/name", "train", labels=True)
        assert source.ids == [f"row-{row:09d}" for row in range(3)]
        assert (source.labels, source.classes) == ([1, 0, 1], ["cat", "dog"])
        source = pickle.loads(pickle.dumps(source))
        for index in range(3):
            assert np.array_equal(np.asarray(source.read(index)), pixels(index))

    @pytest.mark.parametrize("kind", [STRUCT, pa.binary(), pa.large_binary()], ids=["struct", "bytes", "large bytes"])
    def test_files_that_another_program_wrote(self, tmp_path, kind):
        write(tmp_path / "others/train.parquet", [3, 4], kind=kind, number=pa.array([1, 2]))
        source = open_source(f"hf:{tmp_path / 'others'}", "train")
        assert np.array_equal(np.asarray(source.read(1)), pixels(4))
        assert source.description == open_source("hf:others", "train").description  # wherever it lies

    def test_val_is_its_validation_and_another_split_can_be_named(self, tmp_path):
        folder = tmp_path / "owner/name"  # parquet files that lie here, for live training, which needs any one at once
        for place, split in (("hf:owner/name", "val"), ("hf:owner/name:validation", "train"), (f"hf:{folder}", "val")):
            assert np.array_equal(np.asarray(open_source(place, split).read(0)), pixels(7))
        with pytest.raises(ImageError, match=r"no split 'nosuch'. It has: train, validation.*hf:owner/name:train"):
            open_source("hf:owner/name:nosuch", "train")


HUB = {
    "huggingface": json.dumps(
        {
            "info": {
                "features": {
                    "image": {"_type": "Image"},
                    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
                }
            }
        }
    )
}
