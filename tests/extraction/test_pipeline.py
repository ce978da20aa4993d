import errno
import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from events import aged
from extraction.tiny_plugin import pooled, write_images

from theia import registry
from theia.cli.parser import as_one_word
from theia.errors import ConfigError, FeatureError, ImageError, ShapeError, StoreError, UnknownTeacherError
from theia.extraction import sources
from theia.extraction.pipeline import extract
from theia.extraction.user_files import EARLY_ENDINGS
from theia.models.backbone import StudentOptions
from theia.models.student import Student


def stored(store: Path, name: str, dataset: str, split: str = "train") -> np.ndarray:
    """All rows of one dataset, read with h5py alone."""
    parts = []
    for path in sorted((store / split / name).glob("*.h5")):
        with h5py.File(path) as file:
            parts.append(file[dataset][()])
    return np.concatenate(parts)


def keys(store: Path, name: str, split: str = "train") -> list[str]:
    return [key.decode() for key in stored(store, name, "key", split)]


def digests(store: Path) -> dict[str, tuple[str, int]]:
    """Content and time of change of every file except the manifest and its lock."""
    return {
        str(path.relative_to(store)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.parent != store
    }


def test_stores_what_the_teacher_gives_for_every_image(config, pixels, tmp_path: Path) -> None:
    extract(config())
    store = tmp_path / "store"
    expected = np.stack([pooled(image) for image in pixels.values()])
    assert keys(store, "pooled") == keys(store, "image") == list(pixels)
    np.testing.assert_array_equal(stored(store, "image", "data"), np.stack(list(pixels.values())))
    np.testing.assert_allclose(stored(store, "pooled", "data"), expected, rtol=1e-3)
    np.testing.assert_allclose(stored(store, "pooled", "cls"), expected.mean(1), rtol=1e-3)


def test_statistics_are_numpys_over_the_stored_training_features(config, tmp_path: Path) -> None:
    extract(config())
    values = stored(tmp_path / "store", "pooled", "data").astype(np.float64).reshape(-1, 8)
    with np.load(tmp_path / "store" / "statistics" / "pooled.npz") as statistics:
        np.testing.assert_allclose(statistics["mean"], values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics["std"], values.std(0), rtol=1e-9)


def test_several_splits_have_their_own_images(config, tmp_path: Path) -> None:
    held_out = write_images(tmp_path / "held_out", 3)
    splits = extract(config(images={"train": str(tmp_path / "images"), "val": str(tmp_path / "held_out")}))
    assert [(split.name, split.listed) for split in splits] == [("train", 10), ("val", 3)]
    assert keys(tmp_path / "store", "pooled", "val") == list(held_out)


def test_labels_of_class_folders_are_kept(config, tmp_path: Path) -> None:
    for name, count in {"cat": 2, "dog": 3}.items():
        write_images(tmp_path / "classes" / name, count)
    extract(config(images=str(tmp_path / "classes"), labels=True))
    store = tmp_path / "store"
    assert stored(store, "image", "label").tolist() == [0, 0, 1, 1, 1]
    assert json.loads((store / "manifest.json").read_text())["splits"]["train"]["images"]["classes"] == ["cat", "dog"]


def test_labels_are_for_all_shards_or_for_none(config, pixels, tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for name in pixels:
            tar.add(tmp_path / "images" / name, name)
            info = tarfile.TarInfo(Path(name).with_suffix(".cls").name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"7"))
    extract(config(images=str(path)))
    with pytest.raises(StoreError, match=r"source\.labels was False, is True"):
        extract(config(images=str(path), labels=True))


def test_another_precision_is_refused(config) -> None:
    extract(config())
    with pytest.raises(StoreError, match=r"precision was '32-true', is 'bf16-mixed'"):
        extract(config(precision="bf16-mixed"))


def test_a_failing_file_system_is_not_recorded_as_skipped_images(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def fail(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == "006.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as failing:
        failing.setattr(os, "open", fail)
        with pytest.raises(ImageError, match=r"^\S*006\.png cannot be read: .*run the same command again\.$"):
            extract(config(max_skipped=0.5, workers=1))
    assert [path.name for path in (tmp_path / "store" / "train" / "image").glob("*.h5")] == ["shard-000000.h5"]
    (split,) = extract(config(max_skipped=0.5))
    assert split.skipped == 0


@pytest.mark.parametrize(
    ("options", "times"),
    [({}, 1), ({"teachers": "pooled,mean", "all_at_once": True}, 2), ({"teachers": "pooled,mean"}, 4)],
)
def test_a_teacher_is_built_again_only_to_save_memory(
    config, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], times: int
) -> None:
    built, real = [], registry.create
    monkeypatch.setattr(registry, "create", lambda *arguments: built.append(arguments[0]) or real(*arguments))
    extract(config(**options))
    assert len(built) == times


def test_a_run_opens_each_former_shard_once(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(config(teachers="pooled,mean"))
    opened, real = [], h5py.File
    monkeypatch.setattr(h5py, "File", lambda path, *args, **kwargs: opened.append(path) or real(path, *args, **kwargs))
    extract(config(teachers="pooled,mean"))
    assert sorted(opened) == sorted((tmp_path / "store").rglob("*.h5"))


def test_decoding_processes_change_nothing(config, tmp_path: Path) -> None:
    extract(config())
    extract(config(workers=2, store=tmp_path / "other"))
    for name in ("image", "pooled"):
        np.testing.assert_array_equal(
            stored(tmp_path / "store", name, "data"), stored(tmp_path / "other", name, "data")
        )


def test_all_at_once_gives_the_same_features(config, tmp_path: Path) -> None:
    extract(config(teachers=["pooled", "mean"]))
    extract(config(teachers=["pooled", "mean"], all_at_once=True, store=tmp_path / "other"))
    for name in ("pooled", "mean"):
        np.testing.assert_array_equal(
            stored(tmp_path / "store", name, "data"), stored(tmp_path / "other", name, "data")
        )


def test_adding_a_teacher_leaves_every_other_file_untouched(config, tmp_path: Path) -> None:
    extract(config())
    aged(tmp_path / "store")
    before = digests(tmp_path / "store")
    extract(config(teachers="mean"))
    after = digests(tmp_path / "store")
    assert {name: after[name] for name in before} == before
    assert any("mean" in name for name in after)


def test_batches_are_cut_at_the_same_rows_of_each_shard(config, tmp_path: Path) -> None:
    extract(config(teacher_options={"pooled": {"log": str(tmp_path / "log")}}))
    sizes = [int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines()]
    assert sizes == [3, 1, 3, 1, 2]


def test_whole_shards_are_not_computed_again(config, tmp_path: Path) -> None:
    extract(config())
    aged(tmp_path / "store")
    before = digests(tmp_path / "store")
    (tmp_path / "store" / "train" / "pooled" / "shard-000001.h5").unlink()
    extract(config(teacher_options={"pooled": {"log": str(tmp_path / "log")}}))
    after = digests(tmp_path / "store")
    assert len((tmp_path / "log").read_text().splitlines()) == 2  # a batch of 3 and one of 1
    redone = "train/pooled/shard-000001.h5"
    assert after[redone][0] == before[redone][0]
    assert {name: value for name, value in after.items() if name != redone} == {
        name: value for name, value in before.items() if name != redone
    }


def test_autocast_reaches_the_teacher(config, tmp_path: Path) -> None:
    extract(config(precision="bf16-mixed", teacher_options={"pooled": {"log": str(tmp_path / "log")}}))
    assert {line.split()[2] for line in (tmp_path / "log").read_text().splitlines()} == {"True"}


def test_auto_goes_on_in_the_precision_in_which_the_features_were_begun(config, tmp_path: Path) -> None:
    extract(config(precision="bf16-mixed"))
    (tmp_path / "store/train/pooled/shard-000001.h5").unlink()
    places = {split: str(tmp_path / "images") for split in ("train", "val")}
    extract(config(images=places, teacher_options={"pooled": {"log": str(tmp_path / "log")}}))
    assert {line.split()[2] for line in (tmp_path / "log").read_text().splitlines()} == {"True"}
    splits = json.loads((tmp_path / "store" / "manifest.json").read_text())["splits"]
    assert [splits[split]["sets"]["pooled"]["computed"]["precision"] for split in splits] == ["bf16-mixed"] * 2


@pytest.mark.gpu
def test_auto_is_the_teachers_own_precision_on_a_gpu(config, tmp_path: Path) -> None:
    extract(config(accelerator="cuda"))
    record = json.loads((tmp_path / "store" / "manifest.json").read_text())["splits"]["train"]["sets"]["pooled"]
    assert record["computed"]["precision"] == "tf32"


def test_the_store_says_how_features_were_computed(config, tmp_path: Path) -> None:
    extract(config())
    record = json.loads((tmp_path / "store" / "manifest.json").read_text())["splits"]["train"]["sets"]["pooled"]
    assert record["computed"]["torch"] == torch.__version__
    assert record["computed"]["precision"] == "32-true"
    assert record["computed"]["device"].startswith("cpu")


def test_unreadable_images_are_skipped_and_listed(config, pixels, tmp_path: Path) -> None:
    (tmp_path / "images" / "002.png").write_bytes(b"no image")
    (split,) = extract(config(max_skipped=0.1))
    assert split.skipped == 1
    assert split.skipped_list.read_text().splitlines()[1].startswith("002.png,")
    assert keys(tmp_path / "store", "pooled") == [name for name in pixels if name != "002.png"]


def test_odd_files_are_skipped_and_listed_and_the_work_goes_on(config, pixels, tmp_path: Path, never_waits) -> None:
    os.mkfifo(tmp_path / "images" / "fifo.png")
    (tmp_path / "images" / "self.png").symlink_to("self.png")
    (split,) = extract(config(max_skipped=0.2, workers=1))
    lines = split.skipped_list.read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["id", "fifo.png", "self.png"]
    assert "a FIFO, not a regular file" in lines[1]
    assert keys(tmp_path / "store", "pooled") == list(pixels)


def test_too_many_unreadable_images_stop_the_work(config, tmp_path: Path) -> None:
    for name in ("001.png", "005.png"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    with pytest.raises(ImageError) as error:
        extract(config(max_skipped=0.1))
    message = str(error.value)
    assert "2 of the 10 images" in message
    assert "--max_skipped" in message
    assert "001.png: " in message
    assert not (tmp_path / "store" / "train" / "pooled").exists()


def test_nothing_readable_is_an_error_whatever_is_allowed(config, tmp_path: Path) -> None:
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"10 of the 10 images.*which is all"):
        extract(config(max_skipped=1.0))


def test_what_does_not_fit_on_the_disk_is_refused_before_work(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    # 10 images of 3*16*16 bytes with 16*8+8 values of 2 bytes, and 1 % for the rest: 10 504 bytes.
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_503))
    with pytest.raises(StoreError, match=r"do not fit.*--dtype int8"):
        extract(config())
    assert not list((tmp_path / "store").rglob("*.h5"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_504))
    extract(config())


def test_after_a_refusal_for_size_the_smaller_type_goes_into_the_same_store(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        usage = shutil.disk_usage(tmp_path)
        full.setattr("shutil.disk_usage", lambda path: usage._replace(free=0))
        with pytest.raises(StoreError):
            extract(config())
    extract(config(dtype="int8"))
    assert stored(tmp_path / "store", "pooled", "data").dtype == np.int8


def test_what_is_there_already_needs_no_space(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(config())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=0))
    extract(config())


@pytest.mark.parametrize(("fault", "message"), [("shape", r"'pooled'.*\(3, 16, 5\)"), ("nan", "'pooled'.*002.png")])
def test_bad_features_name_the_teacher(config, fault: str, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        extract(config(teacher_options={"pooled": {"fault": fault}}))


def test_an_unknown_teacher_is_refused_before_work(config, tmp_path: Path) -> None:
    with pytest.raises(UnknownTeacherError, match="Did you mean 'pooled'"):
        extract(config(teachers="mean,poled"))
    assert not (tmp_path / "store").exists()


def test_a_missing_device_is_a_clear_error(config) -> None:
    with pytest.raises(ConfigError, match="accelerator='tpu'"):
        extract(config(accelerator="tpu"))


def test_more_processes_than_devices_would_all_do_all_the_work(config, monkeypatch: pytest.MonkeyPatch) -> None:
    # What torchrun --nproc_per_node 2 tells the first of its processes.
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"2 processes were started.*--devices"):
        extract(config())


@pytest.mark.parametrize(("size", "nearest"), [(225, "Give 224 or 240"), (239, "Give 224 or 240"), (9, r"Give 16\.")])
def test_a_size_that_no_student_takes_is_refused_before_anything_is_written(
    config, tmp_path: Path, size: int, nearest: str
) -> None:
    with pytest.raises(ShapeError):
        Student(StudentOptions(image_size=size, width=8, depth=1, heads=1))
    with pytest.raises(ConfigError, match=rf"--size is {size}.*16x16.*{nearest}"):
        extract(config(size=size))
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("weights", [True, False])
def test_weights_that_run_on_the_cpu_unasked_are_named(
    weights: bool, config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = registry.create

    def create(*arguments: Any) -> Any:
        teacher = real(*arguments)
        if weights:
            teacher.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
        return teacher

    monkeypatch.setattr(registry, "create", create)
    with caplog.at_level(logging.WARNING, "theia"):
        extract(config(accelerator="auto"))
    assert ("No GPU found: pooled run on the CPU" in caplog.text) == weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"workers": -1}, "--workers is -1"),
        ({"max_skipped": 1.5}, "--max_skipped is 1.5"),
        ({"resize": "stretch"}, "--resize is 'stretch'; choose 'squash' or 'center_crop'"),
        ({"teachers": " , "}, "--teachers is empty"),
        ({"teachers": "mean,pooled,mean"}, "names mean twice"),
        ({"images": {}}, "--images is empty"),
        ({"split": "a/b"}, "'a/b' cannot be the name of a split"),
        ({"split": "statistics"}, "'statistics' cannot be the name of a split"),
    ],
)
def test_impossible_options_are_refused(config, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_a_store_that_was_begun_with_fewer_endings_goes_on_without_the_others(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "images/later.gif").write_bytes((tmp_path / "images/000.png").read_bytes())
    with monkeypatch.context() as early:
        early.setattr(sources, "IMAGE_ENDINGS", EARLY_ENDINGS)
        extract(config())
    before = keys(tmp_path / "store", "image")
    assert "later.gif" not in before
    extract(config())
    assert "1 images of split 'train' are left out" in caplog.text
    assert keys(tmp_path / "store", "image") == before
    # A store of its own has them.
    extract(config(store=tmp_path / "other"))
    assert keys(tmp_path / "other", "image") == [*before, "later.gif"]


def test_several_places_make_one_split(config, pixels, tmp_path: Path) -> None:
    write_images(tmp_path / "more", 3)
    extract(config(images=[str(tmp_path / "images"), f"lab={tmp_path / 'more'}"]))
    assert keys(tmp_path / "store", "pooled") == [
        *(f"images/{name}" for name in pixels), *(f"lab/{name}" for name in list(pixels)[:3]),
    ]  # fmt: skip


def test_the_command_takes_several_places_as_words() -> None:
    argv = ["--images", "a b", "c", "--teachers", "hog"]
    assert as_one_word(argv, "--images") == ["--images", '["a b", "c"]', "--teachers", "hog"]
    assert as_one_word(["--images", "{train: a}", "--every", "2"], "--images") == [
        "--images",
        "{train: a}",
        "--every",
        "2",
    ]
