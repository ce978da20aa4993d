"""Samples of random bytes: the same arrays for every format that is compared."""

import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.throughput.measure import BenchmarkError, ParityError
from theia.store.schema import ImageSet, hash_ids
from theia.store.writer import SplitWriter
from theia.types import TeacherSpec

IMAGE = "image"
# Key of the sample's number in a batch, beside its columns.
ROW = "row"

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Images and the features of some teachers.

    Attributes:
        columns: Arrays by column: ``"image"``, uint8 ``(n, 3, H, W)``, and each teacher, float16 ``(n, N, C)``.
        shard: Number of samples per file, for formats with several files.
    """

    columns: dict[str, NDArray[Any]]
    shard: int

    def __len__(self) -> int:
        return len(self.columns[IMAGE])

    @property
    def nbytes(self) -> int:
        """Number of bytes in all columns."""
        return sum(column.nbytes for column in self.columns.values())

    def only(self, teachers: Sequence[str]) -> "Samples":
        """The same samples with fewer teachers."""
        return Samples({name: self.columns[name] for name in (IMAGE, *teachers)}, self.shard)

    def tensors(self, row: int) -> dict[str, Tensor]:
        """One sample, by column."""
        return {name: torch.from_numpy(column[row]) for name, column in self.columns.items()}

    def shards(self) -> Iterator[range]:
        """Rows of each file."""
        for start in range(0, len(self), self.shard):
            yield range(start, min(start + self.shard, len(self)))


def random_samples(count: int, image_size: int, teachers: Mapping[str, tuple[int, int]], shard: int) -> Samples:
    """Makes samples that cannot be compressed.

    Args:
        count: Number of samples.
        image_size: Height and width of an image, in pixels.
        teachers: Rows (and columns) of patch tokens, and channels, by teacher name.
        shard: Number of samples per file.
    """
    random = np.random.default_rng(0)
    columns: dict[str, NDArray[Any]] = {IMAGE: random.integers(0, 256, (count, 3, image_size, image_size), np.uint8)}
    for name, (grid, channels) in teachers.items():
        bits = random.integers(0, 1 << 16, (count, grid**2, channels), np.uint16)
        # Without the exponent's highest bit, every pattern is a number below two: a store takes no infinity.
        columns[name] = (bits & 0xBFFF).view(np.float16)
    return Samples(columns, shard)


def write_store(root: Path, samples: Samples) -> None:
    """Writes samples as the split ``train`` of a feature store.

    Args:
        root: Folder of the store.
        samples: Samples to write.
    """
    images = samples.columns[IMAGE]
    features = {name: column for name, column in samples.columns.items() if name != IMAGE}
    specs = []
    for name, column in features.items():
        grid = round(column.shape[1] ** 0.5)
        specs.append(
            TeacherSpec(name=name, channels=column.shape[2], grid_hw=(grid, grid), licence="none", weights="none")
        )
    ids = [f"{row:06d}" for row in range(len(samples))]
    record = ImageSet(
        source={"kind": "random"}, size=images.shape[2], resize="squash", listed=len(ids), ids_sha256=hash_ids(ids),
        shard_size=samples.shard, classes=None,
    )  # fmt: skip
    writer = SplitWriter(root, "train")
    writer.begin(record, specs, "float16", {"device": "cpu"})
    for index, rows in enumerate(samples.shards()):
        part = slice(rows.start, rows.stop)
        writer.write_images(index, ids[part], images[part], None, [])
        for name, column in features.items():
            with writer.open_shard(name, index) as shard:
                shard.append(column[part].astype(np.float32), None)
    writer.finish()


def check_space(folder: Path, needed: int) -> None:
    """Refuses data that would not fit on the disk, before anything is written.

    Args:
        folder: Folder that they will be written into.
        needed: Number of bytes.

    Raises:
        BenchmarkError: If the disk has less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BenchmarkError(
            f"The data need {needed / 1e9:.1f} GB and the disk of the temporary folder has {free / 1e9:.1f} GB. "
            "Choose a folder on another one with --folder DIR."
        )


def check_parity(who: str, epoch: Iterable[Batch], samples: Samples) -> None:
    """Reads a whole epoch and compares every byte of it.

    Args:
        who: Name of the contender.
        epoch: Batches of one epoch, with the number of each sample under ``"row"``.
        samples: Samples that were written.

    Raises:
        ParityError: If a sample differs from what was written, or does not come exactly once.
    """
    seen: list[int] = []
    for batch in epoch:
        for position, row in enumerate(batch[ROW].tolist()):
            seen.append(row)
            for name, column in samples.columns.items():
                if _crc32(batch[name][position].numpy()) != _crc32(column[row]):
                    raise ParityError(f"{who} gives other bytes for {name!r} of sample {row} than were written.")
    if sorted(seen) != list(range(len(samples))):
        raise ParityError(
            f"{who} gave {len(seen)} samples, {len(set(seen))} of them different; expected {len(samples)}."
        )


def _crc32(array: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)
