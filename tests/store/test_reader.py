import json
import os
import pickle
import resource
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Thread

import h5py
import numpy as np
import pytest
from small_store import CLS, ODD, UNREADABLE, begin, extract, image_set, in_child, readable, sample_id, write_images

from theia.errors import ShapeError, StoreError
from theia.store.reader import FeatureStore, Split
from theia.store.writer import SplitWriter


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores") / "store"
    extract(root, listed=23)
    extract(root, split="val", listed=6, dtype="int8")
    return root


def through_h5py(root: Path, split: str) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {}
    for path in sorted((root / split).rglob("*.h5")):
        with h5py.File(path) as file:
            for name in ("data", "scale", "cls"):
                if name in file:
                    field = path.parent.name if name == "data" else f"{path.parent.name}/{name}"
                    found.setdefault(field, []).append(file[name][()])
    return {field: np.concatenate(parts) for field, parts in found.items()}


def check_rows(split: Split, expected: dict[str, np.ndarray], rows: list[int]) -> None:
    buffers = split.allocate(len(rows) + 1)
    split.read_into(np.array(rows, np.int64), buffers)
    assert buffers.keys() == expected.keys()
    for field, values in expected.items():
        assert np.array_equal(buffers[field][: len(rows)], values[rows])


@pytest.mark.parametrize("name", ["train", "val"])
def test_rows_are_what_h5py_reads(root: Path, name: str) -> None:
    split = FeatureStore(root).open_split(name)
    expected = through_h5py(root, name)
    check_rows(split, expected, list(range(len(split))))
    check_rows(split, expected, np.random.default_rng(0).integers(0, len(split), 50).tolist())
    check_rows(split, expected, [])


def test_fields_and_keys_and_labels(root: Path) -> None:
    store = FeatureStore(root)
    split = store.open_split("val")
    assert {name: (field.dtype.name, field.shape) for name, field in split.fields.items()} == {
        "image": ("uint8", (3, 8, 8)),
        "odd": ("int8", (100, 48)),
        "odd/scale": ("float32", (2, 48)),
        "with_cls": ("int8", (6, 7)),
        "with_cls/scale": ("float32", (2, 7)),
        "with_cls/cls": ("float16", (7,)),
    }
    assert split.image_hw == (8, 8)
    assert split.labels is not None
    assert split.labels.tolist() == [0, 1, 0, 1, 0]
    train = store.open_split("train")
    assert [train.key(row) for row in range(len(train))] == [sample_id(number) for number in readable(image_set(23))]


def test_teachers_have_their_specs(root: Path) -> None:
    assert FeatureStore(str(root)).teachers("train") == {"odd": ODD, "with_cls": CLS}
    assert FeatureStore(root).splits == ["train", "val"]


def test_only_what_has_a_buffer_is_read(root: Path) -> None:
    split = FeatureStore(root).open_split("train", ["with_cls"])
    assert list(split.fields) == ["image", "with_cls", "with_cls/cls"]
    buffers = {"with_cls/cls": split.allocate(2)["with_cls/cls"]}
    split.read_into(np.array([20, 1]), buffers)
    assert np.array_equal(buffers["with_cls/cls"], through_h5py(root, "train")["with_cls/cls"][[20, 1]])


def test_shards_without_rows_are_passed_over(tmp_path: Path) -> None:
    extract(tmp_path, listed=2 * UNREADABLE, shard_size=1)
    split = FeatureStore(tmp_path).open_split("train")
    assert len(split) == 2 * UNREADABLE - 1
    assert split.key(UNREADABLE) == sample_id(UNREADABLE + 1)
    check_rows(split, through_h5py(tmp_path, "train"), list(range(len(split))))


def test_pickled_split_reads_the_same(root: Path) -> None:
    split = FeatureStore(root).open_split("train")
    check_rows(split, through_h5py(root, "train"), [3])
    copy = pickle.loads(pickle.dumps(split))
    check_rows(copy, through_h5py(root, "train"), [3, 20])
    assert copy.key(20) == split.key(20)


def test_forked_process_reads_with_its_own_files(root: Path) -> None:
    split = FeatureStore(root).open_split("train")
    expected = through_h5py(root, "train")
    check_rows(split, expected, list(range(len(split))))
    assert in_child(lambda: check_rows(split, expected, list(range(len(split))))) == 0
    check_rows(split, expected, [0, 9, 1])


def test_few_open_files_suffice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theia.store.reads._open_files_at_most", lambda: 2)
    split = FeatureStore(root).open_split("train")
    before = len(list(Path("/proc/self/fd").iterdir()))
    rows = np.random.default_rng(0).integers(0, len(split), 100).tolist()
    check_rows(split, through_h5py(root, "train"), rows)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_threads_share_a_split(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theia.store.reads._open_files_at_most", lambda: 2)
    split, expected, done = FeatureStore(root).open_split("train"), through_h5py(root, "train"), []

    def read(seed: int) -> None:
        check_rows(split, expected, np.random.default_rng(seed).integers(0, len(split), 300).tolist())
        done.append(seed)

    threads = [Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "buffer",
    [
        np.empty((2, 100, 48), np.float32),
        np.empty((2, 100, 47), np.float16),
        np.empty((1, 100, 48), np.float16),
        np.empty((4, 100, 48), np.float16)[::2],
        np.broadcast_to(np.float16(0), (2, 100, 48)),
    ],
)
def test_buffer_that_does_not_fit_is_refused(root: Path, buffer: np.ndarray) -> None:
    split = FeatureStore(root).open_split("train")
    with pytest.raises(ShapeError, match=r"'odd' is .*needed is writable, C-contiguous float16"):
        split.read_into(np.array([0, 1]), {"odd": buffer})
    with pytest.raises(ShapeError, match="No field 'clip'"):
        split.read_into(np.array([0, 1]), {"clip": buffer})


@pytest.mark.parametrize("row", [-1, 22])
def test_row_that_does_not_exist_is_refused(root: Path, row: int) -> None:
    split = FeatureStore(root).open_split("train")
    with pytest.raises(StoreError, match="rows 0 to 21"):
        split.read_into(np.array([0, row]), split.allocate(2))


def test_missing_store_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"No feature store at .*theia extract --images DIR --split train"):
        FeatureStore(tmp_path / "nowhere")


def test_unknown_split_and_teacher_list_what_there_is(root: Path) -> None:
    store = FeatureStore(root)
    with pytest.raises(StoreError, match=r"no split 'test'\. It has: train, val\..*--split test"):
        store.open_split("test")
    with pytest.raises(StoreError, match=r"no teacher 'clip'\. It has: odd, with_cls\..*--teachers clip"):
        store.open_split("train", ["odd", "clip"])


def test_unfinished_extraction_is_told(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    write_images(writer, image_set(), 0)
    with pytest.raises(StoreError, match=r"'image' / 'train' .*unfinished: 1 of 3 shards\. Run the same theia extract"):
        FeatureStore(tmp_path).open_split("train")
    extract(tmp_path, teachers=[ODD])
    begin(tmp_path)
    FeatureStore(tmp_path).open_split("train", ["odd"])
    with pytest.raises(StoreError, match=r"'with_cls' / 'train' .*unfinished: 0 of 3 shards.*or drop this teacher"):
        FeatureStore(tmp_path).open_split("train")


def test_deleted_shard_makes_a_set_unfinished_again(tmp_path: Path) -> None:
    extract(tmp_path)
    (tmp_path / "train/odd/shard-000001.h5").unlink()
    with pytest.raises(StoreError, match=r"shard-000001\.h5 is missing"):
        FeatureStore(tmp_path).open_split("train")
    begin(tmp_path)
    with pytest.raises(StoreError, match=r"unfinished: 2 of 3 shards"):
        FeatureStore(tmp_path).open_split("train")
    extract(tmp_path)
    assert len(FeatureStore(tmp_path).open_split("train")) == 9


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    extract(tmp_path)
    path = tmp_path / "train/odd/shard-000001.h5"
    os.truncate(path, 5000)
    with pytest.raises(StoreError, match=r"odd/shard-000001\.h5 is damaged .it has 5000 bytes.*Delete it and run"):
        FeatureStore(tmp_path).open_split("train")


def test_shard_of_garbage_is_named(tmp_path: Path) -> None:
    extract(tmp_path)
    path = tmp_path / "train/odd/shard-000001.h5"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StoreError, match=r"odd/shard-000001\.h5 is damaged"):
        FeatureStore(tmp_path).open_split("train")


def test_shard_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    extract(tmp_path)
    split = FeatureStore(tmp_path).open_split("train")
    path = tmp_path / "train/odd/shard-000000.h5"
    os.truncate(path, 30000)
    with pytest.raises(StoreError, match=r"odd/shard-000000\.h5 is damaged .it ends too early"):
        split.read_into(np.arange(4), split.allocate(4))
    path.unlink()
    with pytest.raises(StoreError, match=r"odd/shard-000000\.h5 .*No such file"):
        pickle.loads(pickle.dumps(split)).read_into(np.arange(4), split.allocate(4))


def test_first_key_that_differs_is_named(tmp_path: Path) -> None:
    extract(tmp_path)
    path = tmp_path / "train/odd/shard-000001.h5"
    with h5py.File(path, "r+") as file:
        keys = file["key"][()]
        keys[1] = b"stranger.jpg"[: keys.dtype.itemsize]
        file["key"][()] = keys
    with pytest.raises(StoreError, match=r"row 1: 'café/6.jpg' in .*image/shard-000001.h5, 'stranger.jp.*odd/shard"):
        FeatureStore(tmp_path).open_split("train")


def test_manifest_digest_is_that_of_the_file(tmp_path: Path) -> None:
    extract(tmp_path)
    assert FeatureStore(tmp_path).manifest_sha256 == sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()


def test_labels_in_some_shards_only_are_refused(tmp_path: Path) -> None:
    extract(tmp_path)
    writer = begin(tmp_path)
    writer.write_images(2, [sample_id(8), sample_id(9)], np.zeros((2, 3, 8, 8), np.uint8), None, [])
    writer.finish()
    with pytest.raises(StoreError, match=r"Only 2 of 3 image shards of .*train have labels\. Delete that folder"):
        FeatureStore(tmp_path).open_split("train")


def test_splits_of_different_teachers_are_not_opened(tmp_path: Path) -> None:
    extract(tmp_path / "store")
    extract(tmp_path / "other", split="val", teachers=[replace(ODD, revision="2"), CLS])
    shutil.copytree(tmp_path / "other/val", tmp_path / "store/val")
    manifest, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("store", "other"))
    manifest["splits"] |= other["splits"]
    (tmp_path / "store/manifest.json").write_text(json.dumps(manifest))
    store = FeatureStore(tmp_path / "store")
    with pytest.raises(StoreError, match=r"'val' .*another 'odd' than 'train': revision was '1', is '2'"):
        store.open_split("val")
    assert len(store.open_split("val", ["with_cls"])) == 9


def test_too_many_open_files_is_not_taken_for_damage(root: Path) -> None:
    def limited() -> None:
        split = FeatureStore(root).open_split("train")
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        with pytest.raises(
            StoreError, match=r"cannot be read: .*Too many open files.*ulimit -n.*may be whole"
        ) as error:
            split.read_into(np.arange(4), split.allocate(4))
        # Reading processes hand it to the main one.
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
        with pytest.raises(StoreError, match=r"cannot be read: .*Too many open files"):
            FeatureStore(root)

    assert in_child(limited) == 0


def test_as_many_files_stay_open_as_the_system_allows(root: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 1000))
        split = FeatureStore(root).open_split("train")
        before = len(list(Path("/proc/self/fd").iterdir()))
        split.read_into(np.arange(len(split)), split.allocate(len(split)))
        files = len(list((root / "train").rglob("*.h5")))
        assert files == 18  # more than a quarter of 40
        assert len(list(Path("/proc/self/fd").iterdir())) == before + files
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000, 1000)

    assert in_child(limited) == 0


def test_images_without_labels(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train")
    images = image_set(1)
    writer.begin(images, [], "float16", {})
    writer.write_images(0, ["a"], np.zeros((1, 3, 8, 8), np.uint8), None, [])
    writer.finish()
    split = FeatureStore(tmp_path).open_split("train")
    assert split.labels is None
    assert list(split.fields) == ["image"]
    assert json.loads((tmp_path / "manifest.json").read_text())["splits"]["train"]["sets"]["image"]["complete"]
