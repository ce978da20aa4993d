"""A tiny extraction, without images or teachers: what it writes is a function of the sample's number."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from theia.store.schema import FeatureDtype, ImageSet, hash_ids
from theia.store.writer import SplitWriter
from theia.types import TeacherSpec

SIZE = 8
UNREADABLE = 5

ODD = TeacherSpec(
    name="odd",
    channels=48,
    grid_hw=(10, 10),
    licence="MIT",
    weights="none",
    revision="1",
    preprocessing={"size": 8, "mean": [0.5, 0.5, 0.5]},
)
CLS = TeacherSpec(
    name="with_cls", channels=7, grid_hw=(2, 3), licence="Apache-2.0", weights="random", has_cls=True, preprocessing={}
)


def sample_id(number: int) -> str:
    return f"caf\u00e9/{number}.jpg"


def image_set(listed: int = 10, shard_size: int = 4) -> ImageSet:
    return ImageSet(
        source={"kind": "test"},
        size=SIZE,
        resize="squash",
        listed=listed,
        ids_sha256=hash_ids(map(sample_id, range(listed))),
        shard_size=shard_size,
        classes=("cat", "dog"),
    )


def readable(images: ImageSet) -> list[int]:
    return [number for number in range(images.listed) if number != UNREADABLE]


def image(number: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (3, SIZE, SIZE), np.uint8)


def patches(spec: TeacherSpec, number: int) -> NDArray[np.float32]:
    generator = np.random.default_rng([number, spec.channels])
    return generator.standard_normal((spec.grid_hw[0] * spec.grid_hw[1], spec.channels), np.float32) * 3 + 1


def cls_token(spec: TeacherSpec, number: int) -> NDArray[np.float32]:
    return np.random.default_rng([number, 99]).standard_normal(spec.channels, np.float32)


def begin(
    root: Path,
    split: str = "train",
    teachers: Sequence[TeacherSpec] = (ODD, CLS),
    dtype: FeatureDtype = "float16",
    listed: int = 10,
    shard_size: int = 4,
) -> SplitWriter:
    writer = SplitWriter(root, split)
    writer.begin(image_set(listed, shard_size), teachers, dtype, {"device": "cpu"})
    return writer


def write_images(writer: SplitWriter, images: ImageSet, index: int) -> None:
    listed = range(index * images.shard_size, index * images.shard_size + images.listed_in(index))
    numbers = [number for number in listed if number != UNREADABLE]
    writer.write_images(
        index,
        [sample_id(number) for number in numbers],
        np.array([image(number) for number in numbers], np.uint8).reshape(-1, 3, SIZE, SIZE),
        np.array([number % 2 for number in numbers], np.int64),
        [(sample_id(number), "truncated, or not an image") for number in listed if number == UNREADABLE],
    )


def write_features(writer: SplitWriter, spec: TeacherSpec, index: int, batch: int = 2) -> None:
    with writer.open_shard(spec.name, index) as shard:
        numbers = [int(sample.split("/")[1].split(".")[0]) for sample in shard.ids]
        for start in range(0, len(numbers), batch):
            chosen = numbers[start : start + batch]
            shard.append(
                np.stack([patches(spec, number) for number in chosen]),
                np.stack([cls_token(spec, number) for number in chosen]) if spec.has_cls else None,
            )


def extract(
    root: Path,
    split: str = "train",
    teachers: Sequence[TeacherSpec] = (ODD, CLS),
    dtype: FeatureDtype = "float16",
    listed: int = 10,
    shard_size: int = 4,
) -> SplitWriter:
    """What ``theia extract`` does with a store, and does again after an interruption."""
    writer = begin(root, split, teachers, dtype, listed, shard_size)
    images = image_set(listed, shard_size)
    for index in range(images.shard_count):
        if not writer.has_shard("image", index):
            write_images(writer, images, index)
    for spec in teachers:
        for index in range(images.shard_count):
            if not writer.has_shard(spec.name, index):
                write_features(writer, spec, index)
    writer.finish()
    return writer


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a store, by its path."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def in_child(work: Callable[[], object]) -> int:
    """Runs something in a forked process and gives its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(call: int) -> None:
    """Makes this process kill itself before its n-th system call that changes a disk."""
    calls = iter(range(1, 1 << 30))

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in ("pwrite", "fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
