import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from small_store import (
    CLS,
    ODD,
    UNREADABLE,
    begin,
    cls_token,
    extract,
    image,
    image_set,
    patches,
    readable,
    sample_id,
    write_features,
    write_images,
)

from theia.errors import FeatureError, ShapeError, StoreError
from theia.store import shard as shard_module
from theia.store.features import convert
from theia.store.reader import FeatureStore
from theia.store.schema import ImageSet
from theia.store.writer import SplitWriter
from theia.types import TeacherSpec


def shards(root: Path, name: str) -> list[Path]:
    return sorted((root / "train" / name).glob("shard-*.h5"))


def whole(root: Path, name: str, dataset: str) -> np.ndarray:
    parts = []
    for path in shards(root, name):
        with h5py.File(path) as file:
            parts.append(file[dataset][()])
    return np.concatenate(parts)


def test_h5py_reads_what_was_given(tmp_path: Path) -> None:
    extract(tmp_path)
    numbers = readable(image_set())
    assert [key.decode() for key in whole(tmp_path, "image", "key")] == [sample_id(number) for number in numbers]
    assert np.array_equal(whole(tmp_path, "image", "data"), np.stack([image(number) for number in numbers]))
    assert whole(tmp_path, "image", "label").tolist() == [number % 2 for number in numbers]
    for spec in (ODD, CLS):
        given = np.stack([patches(spec, number) for number in numbers])
        stored = whole(tmp_path, spec.name, "data")
        assert stored.dtype == np.float16
        assert np.array_equal(stored, given.astype(np.float16))
    given = np.stack([cls_token(CLS, number) for number in numbers])
    assert np.array_equal(whole(tmp_path, "with_cls", "cls"), given.astype(np.float16))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_datasets_are_contiguous_aligned_and_uncompressed(tmp_path: Path, dtype: str) -> None:
    extract(tmp_path, dtype=dtype)
    paths = list(tmp_path.rglob("*.h5"))
    assert len(paths) == 9
    for path in paths:
        with h5py.File(path) as file:
            assert file["data"].id.get_offset() % 4096 == 0
            assert all(file[name].chunks is None and file[name].compression is None for name in file)


def test_attributes_say_what_the_file_is(tmp_path: Path) -> None:
    extract(tmp_path)
    with h5py.File(shards(tmp_path, "odd")[1]) as file:
        assert file.attrs["schema"] == 1
        assert json.loads(file.attrs["description"]).items() >= {
            "split": "train", "set": "odd", "shard": 1, "rows": 3, "dtype": "float16",
            "spec": {**asdict(ODD), "grid_hw": [10, 10]},
            "preprocessing_sha256": sha256(b'{"mean":[0.5,0.5,0.5],"size":8}').hexdigest(),
        }.items()  # fmt: skip


def test_unreadable_images_are_absent_and_listed(tmp_path: Path) -> None:
    writer = extract(tmp_path)
    assert writer.skipped() == [(sample_id(UNREADABLE), "truncated, or not an image")]
    assert (tmp_path / "train/skipped.csv").read_text() == (
        f'id,reason\n{sample_id(UNREADABLE)},"truncated, or not an image"\n'
    )
    assert [writer.images(index).rows for index in range(3)] == [4, 3, 2]


def test_ids_that_are_not_utf8_survive(tmp_path: Path) -> None:
    writer = begin(tmp_path, listed=2)
    ids = ["a\udce9.jpg", "b.jpg"]
    writer.write_images(0, ids[:1], image(0)[None], None, [(ids[1], "bad \udcff")])
    assert writer.images(0).keys() == ids[:1]
    assert writer.skipped() == [(ids[1], "bad \udcff")]


def test_shard_without_readable_images(tmp_path: Path) -> None:
    writer = begin(tmp_path, listed=UNREADABLE + 1, shard_size=UNREADABLE)
    for index in range(2):
        write_images(writer, image_set(UNREADABLE + 1, UNREADABLE), index)
        for spec in (ODD, CLS):
            write_features(writer, spec, index)
    assert all(writer.has_shard(name, 1) for name in ("image", "odd", "with_cls"))
    writer.finish()
    with h5py.File(shards(tmp_path, "odd")[1]) as file:
        assert file["data"].shape == (0, 100, 48)


def test_images_are_read_back_in_slices(tmp_path: Path) -> None:
    writer = extract(tmp_path)
    shard = writer.images(0)
    assert np.array_equal(shard.read("data", 1, 3), np.stack([image(1), image(2)]))
    assert shard.read("data", 3, 99).shape == (1, 3, 8, 8)


def test_int8_is_half_the_size_and_half_a_step_off_at_most(tmp_path: Path) -> None:
    extract(tmp_path, dtype="int8")
    given = np.stack([patches(ODD, number) for number in readable(image_set())]).astype(np.float64)
    stored, scale = whole(tmp_path, "odd", "data"), whole(tmp_path, "odd", "scale").astype(np.float64)
    assert stored.dtype == np.int8
    assert stored.nbytes == given.astype(np.float16).nbytes // 2
    step, middle = scale[:, :1], scale[:, 1:]
    np.testing.assert_allclose(step, np.ptp(given, axis=1, keepdims=True) / 254, rtol=1e-5)
    assert (np.abs(given - (stored * step + middle)) <= step * 0.501).all()


def test_int8_keeps_channels_of_any_offset_and_scale(tmp_path: Path) -> None:
    writer = begin(tmp_path, teachers=[ODD], dtype="int8", listed=1)
    write_images(writer, image_set(1), 0)
    random = np.random.default_rng(0)
    scale, offset = np.exp(random.normal(0, 3, 48)), random.choice([0, 100], 48)
    given = ((random.standard_normal((1, 100, 48)) + offset) * scale).astype(np.float32)
    given[..., 5], given[..., 6], given[..., 7] = 0, -1e6, np.where(given[..., 7] > given[..., 7].mean(), 3e38, -3e38)
    with writer.open_shard("odd", 0) as shard:
        shard.append(given, None)
    stored, (step, middle) = whole(tmp_path, "odd", "data"), whole(tmp_path, "odd", "scale")[0].astype(np.float64)
    error = np.abs(stored * step + middle - given)[0].max(0)
    assert (error <= 0.501 * np.ptp(given[0].astype(np.float64), axis=0) / 254).all()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_helpers_write_what_the_calling_thread_writes(tmp_path: Path, dtype: str) -> None:
    content = []
    for name in ("alone", "helped"):
        writer = begin(tmp_path / name, dtype=dtype)
        write_images(writer, image_set(), 0)
        with (
            ThreadPoolExecutor(3) as helpers,
            writer.open_shard("with_cls", 0, None if name == "alone" else helpers) as shard,
        ):
            for batch in (range(3), range(3, 4)):
                shard.append(
                    np.stack([patches(CLS, number) for number in batch]),
                    np.stack([cls_token(CLS, number) for number in batch]),
                )
        files = [tmp_path / name / f"train/with_cls/shard-000000{ending}" for ending in (".h5", ".json")]
        content.append([path.read_bytes() for path in files])
        assert json.loads(content[-1][1])["sha256"] == sha256(content[-1][0]).hexdigest()
    assert content[0] == content[1]


def test_helped_writing_goes_to_the_disk_before_the_end_and_tells_its_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "_FLUSHED_BYTES", 1)
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    writer = begin(tmp_path)
    write_images(writer, image_set(), 0)

    def store() -> None:
        with ThreadPoolExecutor(3) as helpers, writer.open_shard("odd", 0, helpers) as shard:
            for number in range(4):
                shard.append(patches(ODD, number)[None], None)

    store()
    assert flushed
    shards(tmp_path, "odd")[0].unlink()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(StoreError, match=r"Disk full .*odd/shard-000000\.h5"):
        store()
    assert not shards(tmp_path, "odd")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_features_converted_on_their_device_are_stored_like_others(tmp_path: Path, dtype: str, device: str) -> None:
    given = [np.stack([values(CLS, number) for number in range(4)]) for values in (patches, cls_token)]
    for name in ("host", "device"):
        writer = begin(tmp_path / name, dtype=dtype)
        write_images(writer, image_set(), 0)
        with writer.open_shard("with_cls", 0) as shard:
            if name == "host":
                shard.append(*given)
            else:
                rows = convert(dtype, *(torch.from_numpy(values).to(device) for values in given)).to_host()
                if device == "cuda":
                    torch.cuda.synchronize()
                shard.append_stored(rows)
    for dataset in ("data", "cls", "crc32", *(["scale"] if dtype == "int8" else [])):
        assert np.array_equal(*(whole(tmp_path / name, "with_cls", dataset) for name in ("host", "device")))
    for dataset in ("sum", "sumsq", "cls_sum", "cls_sumsq"):
        np.testing.assert_allclose(
            *(whole(tmp_path / name, "with_cls", dataset) for name in ("host", "device")), rtol=1e-12
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_converting_on_a_gpu_waits_for_nothing(dtype: str) -> None:
    given = torch.randn(3, 256, 768, device="cuda"), torch.randn(3, 768, device="cuda")
    convert(dtype, *given).to_host()
    torch.cuda.set_sync_debug_mode("error")
    try:
        convert(dtype, *given).to_host()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_features_may_lie_in_memory_channel_by_channel_and_be_of_another_type(tmp_path: Path) -> None:
    writer = begin(tmp_path, teachers=[ODD])
    write_images(writer, image_set(), 0)
    given = np.stack([patches(ODD, number) for number in range(4)])
    by_channel = torch.from_numpy(given.transpose(0, 2, 1).copy()).double().transpose(1, 2)
    with writer.open_shard("odd", 0) as shard:
        shard.append(by_channel, None)
    assert np.array_equal(whole(tmp_path, "odd", "data"), given.astype(np.float16))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (7e4, "float16", r"70000 is beyond float16, .*Store this teacher as int8"),
        (np.nan, "float16", "nan is not a finite number"),
        (-np.inf, "float16", "-inf is not a finite number"),
        (np.nan, "int8", "nan is not a finite number"),
        (np.inf, "int8", "inf is not a finite number"),
    ],
)
def test_value_that_cannot_be_stored_is_named(tmp_path: Path, value: float, dtype: str, message: str) -> None:
    writer = begin(tmp_path, teachers=[ODD], dtype=dtype)
    write_images(writer, image_set(), 0)
    given = np.zeros((4, 100, 48), np.float32)
    given[2, 11, 45] = value

    def append() -> None:
        with writer.open_shard("odd", 0) as shard:
            shard.append(given, None)

    with pytest.raises(FeatureError, match=rf"'odd', image 'café/2.jpg', patch token 11, channel 45: {message}"):
        append()
    assert not shards(tmp_path, "odd")


def test_cls_token_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    writer = begin(tmp_path, dtype="int8")
    write_images(writer, image_set(), 0)
    cls = np.zeros((4, 7), np.float32)
    cls[3, 6] = 1e5

    def append() -> None:
        with writer.open_shard("with_cls", 0) as shard:
            shard.append(np.zeros((4, 6, 7), np.float32), cls)

    with pytest.raises(FeatureError, match=r"'with_cls', image 'café/3.jpg', CLS token 0, channel 6: 100000 is beyond"):
        append()


def test_largest_float16_is_stored(tmp_path: Path) -> None:
    writer = begin(tmp_path, teachers=[ODD], listed=1)
    write_images(writer, image_set(1), 0)
    with writer.open_shard("odd", 0) as shard:
        # 65519 rounds down to the largest finite value, as IEEE 754 says.
        shard.append(np.full((1, 100, 48), 65519, np.float32), None)
    assert (whole(tmp_path, "odd", "data") == 65504).all()


@pytest.mark.parametrize(
    ("shape", "cls", "message"),
    [
        ((2, 100, 47), None, r"patches of shape \(2, 100, 47\) .*its spec says \(2, 100, 48\)"),
        ((2, 99, 48), None, r"patches of shape \(2, 99, 48\) .*its spec says \(2, 100, 48\)"),
        ((2, 100, 48), (2, 48), r"CLS token of shape \(2, 48\); its spec .has_cls=False. says None"),
        ((5, 100, 48), None, r"more than the 4 images of .*odd/shard-000000\.h5"),
    ],
)
def test_features_of_another_shape_are_refused(
    tmp_path: Path, shape: tuple[int, ...], cls: tuple[int, ...] | None, message: str
) -> None:
    writer = begin(tmp_path)
    write_images(writer, image_set(), 0)

    def append() -> None:
        with writer.open_shard("odd", 0) as shard:
            shard.append(np.zeros(shape, np.float32), None if cls is None else np.zeros(cls, np.float32))

    with pytest.raises(FeatureError, match=rf"'odd' .*{message}"):
        append()


def test_shard_with_too_few_features_is_refused(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    write_images(writer, image_set(), 0)

    def append() -> None:
        with writer.open_shard("odd", 0) as shard:
            shard.append(np.zeros((3, 100, 48), np.float32), None)

    with pytest.raises(FeatureError, match=r"3 images .* 4"):
        append()
    assert not shards(tmp_path, "odd")


def test_image_shard_must_account_for_every_listed_image(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    with pytest.raises(ShapeError, match="1 images and 1 skipped"):
        writer.write_images(0, ["a"], image(0)[None], None, [("b", "bad")])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids_sha256": "0"}, "list of image ids"),
        ({"size": 16}, "size was 8, is 16"),
        ({"resize": "center_crop"}, "resize was 'squash', is 'center_crop'"),
        ({"shard_size": 5}, "shard_size was 4, is 5"),
        ({"classes": None}, "classes was"),
        ({"source": {"kind": "other"}}, "source.kind was 'test', is 'other'"),
    ],
)
def test_other_images_are_refused(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    extract(tmp_path)
    with pytest.raises(StoreError, match=rf"{message}.*another --split or --store"):
        SplitWriter(tmp_path, "train").begin(replace(image_set(), **changed), [ODD], "float16", {})


@pytest.mark.parametrize(
    ("spec", "dtype", "message"),
    [
        (replace(ODD, revision="2"), "float16", "revision was '1', is '2'"),
        (replace(ODD, channels=64), "float16", "channels was 48, is 64"),
        (replace(ODD, preprocessing={"size": 9}), "float16", "preprocessing.size was 8, is 9"),
        (ODD, "int8", "dtype was 'float16', is 'int8'"),
    ],
)
def test_another_teacher_of_the_same_name_is_refused(
    tmp_path: Path, spec: TeacherSpec, dtype: str, message: str
) -> None:
    extract(tmp_path)
    with pytest.raises(StoreError, match=rf"another 'odd': {message}.*delete .*odd to extract it anew"):
        SplitWriter(tmp_path, "train").begin(image_set(), [spec], dtype, {})


def test_tuples_in_a_spec_are_what_json_makes_of_them(tmp_path: Path) -> None:
    spec = replace(ODD, preprocessing={"mean": (0.5, 0.5, 0.5)})
    images = replace(image_set(), source={"kind": ("a", "b")})
    for _ in range(2):
        writer = SplitWriter(tmp_path, "train")
        writer.begin(images, [spec], "float16", {})
        write_images(writer, images, 0)
    assert writer.has_shard("image", 0)


def test_options_may_change_until_the_first_shard(tmp_path: Path) -> None:
    begin(tmp_path)
    other: ImageSet = replace(image_set(), size=16)
    SplitWriter(tmp_path, "train").begin(other, [replace(ODD, channels=3)], "int8", {})


def test_features_of_former_images_are_not_kept(tmp_path: Path) -> None:
    extract(tmp_path)
    for path in shards(tmp_path, "image"):
        path.unlink()
    images = replace(image_set(), resize="center_crop")
    with pytest.raises(StoreError, match=r"other images: resize was .*delete .*train to make the split anew"):
        SplitWriter(tmp_path, "train").begin(images, [ODD], "float16", {})
    shutil.rmtree(tmp_path / "train")
    writer = SplitWriter(tmp_path, "train")
    writer.begin(images, [ODD], "float16", {})
    write_images(writer, images, 0)
    assert not writer.has_shard("odd", 0)
    assert set(FeatureStore(tmp_path).teachers("train")) == {"odd"}


def test_dropped_teachers_do_not_block_a_split(tmp_path: Path) -> None:
    extract(tmp_path)
    shutil.rmtree(tmp_path / "train/odd")
    begin(tmp_path, teachers=[replace(ODD, name="never_written")])
    with pytest.raises(StoreError, match=r"drop this teacher: delete .*never_written and run any theia extract"):
        FeatureStore(tmp_path).open_split("train")
    extract(tmp_path, teachers=[CLS])
    assert list(FeatureStore(tmp_path).open_split("train").teachers) == ["with_cls"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(ODD, weights="other/model"), "weights was 'none', is 'other/model'"),
        (replace(ODD, revision="2"), "revision was '1', is '2'"),
        (replace(ODD, preprocessing={}), "preprocessing.size was 8, is not set"),
        (replace(ODD, channels=64), "channels was 48, is 64"),
        (replace(ODD, grid_hw=(5, 20)), r"grid_hw was \[10, 10\], is \[5, 20\]"),
    ],
)
def test_another_teacher_in_another_split_is_refused(tmp_path: Path, spec: TeacherSpec, message: str) -> None:
    extract(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match=rf"'val' .*another 'odd' than 'train': {message}.*delete .*train/odd"):
        begin(tmp_path, split="val", teachers=[spec])
    assert (tmp_path / "manifest.json").read_bytes() == before
    shutil.rmtree(tmp_path / "train/odd")
    begin(tmp_path, split="val", teachers=[spec])


@pytest.mark.parametrize(("changed", "message"), [({"size": 16}, "size was 8"), ({"resize": "center_crop"}, "resize")])
def test_images_of_another_size_in_another_split_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    extract(tmp_path)
    writer = SplitWriter(tmp_path, "val")
    with pytest.raises(StoreError, match=rf"'val' .*those of 'train': {message}"):
        writer.begin(replace(image_set(), **changed), [], "float16", {})


def test_splits_may_differ_in_stored_type_and_in_images(tmp_path: Path) -> None:
    extract(tmp_path)
    extract(tmp_path, split="val", dtype="int8", listed=3)
    assert len(FeatureStore(tmp_path).open_split("val")) == 3


def test_moved_weights_of_the_same_digest_are_the_same(tmp_path: Path) -> None:
    here, there = (replace(ODD, weights=place, revision="sha256:00ff") for place in ("/here", "/there"))
    extract(tmp_path, teachers=[here])
    extract(tmp_path, teachers=[there])
    extract(tmp_path, teachers=[there], split="val")
    assert len(FeatureStore(tmp_path).open_split("val")) == 9
    with pytest.raises(StoreError, match="revision was"):
        begin(tmp_path, teachers=[replace(here, revision="sha256:11")], split="val")


def test_another_precision_is_refused_and_another_device_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = SplitWriter(tmp_path, "train")
    writer.begin(image_set(), [ODD], "float16", {"precision": "32-true", "device": "A"})
    write_images(writer, image_set(), 0)
    write_features(writer, ODD, 0)
    with pytest.raises(StoreError, match=r"another 'odd': precision was '32-true', is 'bf16-mixed'.*same options"):
        writer.begin(image_set(), [ODD], "float16", {"precision": "bf16-mixed", "device": "A"})
    assert not caplog.records
    writer.begin(image_set(), [ODD], "float16", {"precision": "32-true", "device": "B"})
    assert [record.getMessage() for record in caplog.records] == [
        "Features of 'odd' / 'train' were begun on A and go on on B."
    ]


def test_a_set_that_is_being_redone_is_not_complete(tmp_path: Path) -> None:
    extract(tmp_path)
    os.truncate(shards(tmp_path, "odd")[1], 999)
    writer = begin(tmp_path)
    assert not writer.has_shard("odd", 1)
    write_features(writer, ODD, 1)  # and then the process is killed
    store = FeatureStore(tmp_path)
    with pytest.raises(StoreError, match=r"'odd' / 'train' .*unfinished"):
        store.open_split("train")
    assert len(store.open_split("train", ["with_cls"])) == 9


def test_a_damaged_shard_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extract(tmp_path)
    os.truncate(shards(tmp_path, "odd")[1], 999)
    writer = begin(tmp_path)
    assert [writer.has_shard("odd", index) for index in (1, 1, 0)] == [False, False, True]
    assert len([record for record in caplog.records if "made again" in record.getMessage()]) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE, errno.ENOMEM])
@pytest.mark.parametrize("function", ["open", "stat", "preadv"])
def test_a_shard_that_the_system_refuses_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, function: str
) -> None:
    extract(tmp_path)
    writer = begin(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    if function == "open":
        monkeypatch.setattr(h5py, "File", refuse)
    elif function == "stat":
        monkeypatch.setattr(Path, "stat", refuse)
    else:
        monkeypatch.setattr(os, function, refuse)
    with pytest.raises(StoreError, match=rf"cannot be read: .*{os.strerror(code)}.*ulimit -n.*may be whole"):
        writer.has_shard("odd", 1)


def test_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(StoreError, match="not empty and not a feature store"):
        begin(tmp_path)


@pytest.mark.parametrize("split", ["", "statistics", "a/b", "..", ".hidden"])
def test_split_must_be_a_plain_name(tmp_path: Path, split: str) -> None:
    with pytest.raises(StoreError, match="cannot be named"):
        SplitWriter(tmp_path, split)


def test_process_that_did_not_begin_writes_what_was_announced(tmp_path: Path) -> None:
    begin(tmp_path)
    other = SplitWriter(tmp_path, "train")
    write_images(other, image_set(), 0)
    assert other.has_shard("image", 0)
    with pytest.raises(StoreError, match="no 'clip', only image, odd, with_cls"):
        other.has_shard("clip", 0)
    with pytest.raises(StoreError, match=r"begin\(\)"):
        other.finish()


def test_process_without_an_announced_split_is_told(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(StoreError, match="no split 'val' yet"):
        SplitWriter(tmp_path, "val").has_shard("image", 0)
