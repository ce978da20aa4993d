"""Features are stored while the teacher computes the next ones."""

import errno
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from events import PATIENCE_S

from theia import registry
from theia.errors import StoreError
from theia.extraction.pipeline import extract
from theia.store.features import ShardWriter
from theia.store.reader import FeatureStore
from theia.store.writer import SplitWriter
from theia.teacher import Teacher
from theia.types import TeacherFeatures


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("handover")]


def shards(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((store / "train" / "pooled").glob("*.h5"))}


def temporary_files(store: Path) -> list[Path]:
    return list(store.rglob("*.tmp"))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``watch(before, after)`` calls these around every batch that the teacher computes."""

    def install(before: Any = None, after: Any = None) -> None:
        def create(name: str, options: Any = None) -> Teacher:
            teacher = real(name, options)
            if before:
                teacher.register_forward_pre_hook(lambda module, images: before())
            if after:
                teacher.register_forward_hook(lambda module, images, features: after(features))
            return teacher

        real = registry.create
        monkeypatch.setattr(registry, "create", create)

    return install


def test_the_bytes_are_those_of_storing_each_shard_at_once(config, tmp_path: Path) -> None:
    options = config()
    extract(options)
    expected, other = shards(options.store), tmp_path / "other"
    manifest = FeatureStore(options.store).manifest.splits["train"]
    teacher = registry.create("pooled", None)
    writer, source = SplitWriter(other, "train"), SplitWriter(options.store, "train")
    writer.begin(manifest.images, [teacher.spec], "float16", {})
    for index in range(manifest.images.shard_count):
        images = source.images(index)
        pixels = images.read("data")
        writer.write_images(index, images.keys(), pixels, None, [])
        with writer.open_shard("pooled", index) as shard:
            features = teacher(torch.from_numpy(pixels))
            shard.append(features.patches.numpy(), features.cls.numpy())
    assert shards(other) == expected


def test_a_slow_disk_and_a_fast_teacher_have_two_batches_in_memory(
    config, watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts: list[int] = []
    next_one = threading.Semaphore(0)

    def count(features: TeacherFeatures) -> None:
        alive.add(features.patches)
        counts.append(len(alive))
        if len(counts) > 1:
            next_one.release()
        if len(counts) == 10:
            next_one.release()

    append = ShardWriter.append

    def slow(self: ShardWriter, *features: Any) -> None:
        assert next_one.acquire(timeout=PATIENCE_S)  # until the teacher has given the next batch, if there is one
        append(self, *features)

    watch(after=count)
    monkeypatch.setattr(ShardWriter, "append", slow)
    extract(config(batch_size=1, shard_size=10))
    assert counts == [1] + [2] * 9


def test_a_shard_comes_to_rest_while_the_next_is_computed(config, watch, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[None] = []
    came: list[bool] = []
    next_shard = threading.Event()
    sync = os.fsync

    def compute() -> None:
        computed.append(None)
        if len(computed) == 3:
            next_shard.set()

    def wait_for_a_batch_of_the_next_shard(file: int) -> None:
        if threading.current_thread() is not threading.main_thread() and not came:
            came.append(next_shard.wait(PATIENCE_S))
        sync(file)

    watch(before=compute)
    monkeypatch.setattr(os, "fsync", wait_for_a_batch_of_the_next_shard)
    extract(config())  # shards of a batch of 3 and one of 1
    assert came == [True]


@pytest.mark.parametrize("batch_size", [3, 4], ids=["in the first of two batches", "in the last batch of a shard"])
def test_a_full_disk_stops_the_work_and_leaves_whole_shards(
    config, watch, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    computed: list[None] = []
    options, real = config(batch_size=batch_size), os.pwrite

    def full(file: int, *arguments: Any) -> int:
        path = os.readlink(f"/proc/self/fd/{file}")  # noqa: PTH115 (a link that is no file's)
        if "shard-000001" in path and threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, *arguments)

    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names are enough)
    with monkeypatch.context() as disk:
        watch(before=lambda: computed.append(None))
        disk.setattr(os, "pwrite", full)
        with pytest.raises(
            StoreError, match=r"Disk full .*pooled/shard-000001\.h5.*run the same command again"
        ) as error:
            extract(options)
        # While the error, and with it every frame, is still held.
        assert error.value
        assert not temporary_files(options.store)
        assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208
    assert len(computed) == (4 if batch_size == 3 else 2)  # never more than one batch ahead
    assert list(shards(options.store)) == ["shard-000000.h5"]
    extract(options)
    assert len(shards(options.store)) == 3


def test_ctrl_c_leaves_whole_shards(config, watch, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[None] = []
    stored: list[None] = []
    interrupted = threading.Event()
    append = ShardWriter.append

    def interrupt() -> None:
        computed.append(None)
        if len(computed) == 4:
            interrupted.set()
            raise KeyboardInterrupt

    def slow(self: ShardWriter, *features: Any) -> None:
        if len(stored) == 2:  # the first batch of the second shard
            assert interrupted.wait(PATIENCE_S)
        append(self, *features)
        stored.append(None)

    options = config()
    watch(before=interrupt)
    monkeypatch.setattr(ShardWriter, "append", slow)
    with pytest.raises(KeyboardInterrupt):
        extract(options)
    assert list(shards(options.store)) == ["shard-000000.h5"]
    assert not temporary_files(options.store)


def test_features_of_a_narrower_type_are_stored_as_the_teacher_gave_them(config, watch) -> None:
    given: list[torch.Tensor] = []

    def narrow(features: TeacherFeatures) -> TeacherFeatures:
        given.append(features.patches.bfloat16())
        return TeacherFeatures(given[-1], features.cls.bfloat16())

    options = config()
    watch(after=narrow)
    extract(options)
    split = FeatureStore(options.store).open_split("train")
    buffers = split.allocate(len(split))
    split.read_into(np.arange(len(split)), buffers)
    expected = torch.cat(given).float().numpy().astype(np.float16)
    np.testing.assert_array_equal(buffers["pooled"], expected)


@pytest.mark.gpu
def test_features_computed_on_a_gpu_are_stored_when_they_have_arrived(config, tmp_path: Path) -> None:
    extract(config(batch_size=1))
    extract(config(batch_size=1, accelerator="cuda", store=tmp_path / "other"))
    values = []
    for store in ("store", "other"):
        split = FeatureStore(tmp_path / store).open_split("train")
        values.append(split.allocate(len(split)))
        split.read_into(np.arange(len(split)), values[-1])
    for name in ("pooled", "pooled/cls"):
        np.testing.assert_allclose(values[0][name], values[1][name], rtol=2e-3)
