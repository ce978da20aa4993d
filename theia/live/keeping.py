"""Keeps what live teachers compute: the first epoch of a training fills a feature store, and the next ones read it.

An epoch draws its samples in random order, and a shard holds neighbours in the list. So rows go into files beside the
store first, one for each shard, wherever they belong there. With the last batch of an epoch, shards are made of them as
``theia extract`` makes them.
"""

import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from numpy.typing import NDArray
from torch import Tensor

from theia.errors import FeatureError, StoreError
from theia.extraction.config import ExtractConfig
from theia.extraction.images import to_square
from theia.extraction.pipeline import describe_plan, free_bytes, how_computed, image_set, plan
from theia.extraction.processes import Processes
from theia.live.cache import HELD_OUT, Cache, digest
from theia.live.images import ReadableImages
from theia.live.teachers import LiveTeachers
from theia.store.disk import reading, writing
from theia.store.manifest import read_manifest
from theia.store.reader import FeatureStore, Split
from theia.store.schema import IMAGE, TRAIN, Resize, feature_fields, image_fields, to_plain
from theia.store.transfer import pull
from theia.store.writer import SplitWriter
from theia.types import FeatureBatch
from theia.utils.files import alone, write_whole
from theia.utils.progress import Progress, readable_bytes

logger = logging.getLogger(__name__)

Teach = Callable[[FeatureBatch], FeatureBatch]

_SPOOL, _CHECKSUMS = ".kept", "checksums"
_SHARD_SIZE = ExtractConfig.shard_size
_OVERHEAD = 1.01  # allows for keys, checksums and alignment
_WRITERS = 4  # threads


class Kept:
    """The training split of a store, which a live run fills. What is trained on is what is stored: float16.

    Rows that are there are read, not computed again. A checksum tells those that are whole, whatever ended the run
    that wrote them.

    Args:
        root: Folder of the store.
        images: The training images. Training numbers its rows by those that can be decoded.
        teachers: The teachers.
        size: Height and width of the images, in pixels.
        resize: Way to bring an image to that size.
        device: Device of the teachers.
        trainer: Trainer whose processes share the work; ``None`` if this process does all of it.
        workers: Number of processes that read the finished split for a training process.

    Attributes:
        split: The finished split; ``None`` until it is finished.
        workers: The number of reading processes.
    """

    def __init__(
        self,
        root: Path,
        images: ReadableImages,
        teachers: LiveTeachers,
        size: int,
        resize: Resize,
        device: torch.device,
        trainer: Trainer | None,
        workers: int,
    ) -> None:
        self.root, self.workers = root, workers
        self.split: Split | None = None
        self._spool = root / _SPOOL
        self._listed, self._source, self._reasons = images.listed, images.source, images.unreadable
        self._teachers, self._device, self._trainer = teachers, device, trainer
        self._names, self._specs = list(teachers.built), list(teachers.specs.values())
        config = ExtractConfig(images=".", teachers=self._names, store=root, size=size, resize=resize)
        self._images = replace(image_set(self._listed, config), shard_size=_SHARD_SIZE)
        self._precisions = {name: teachers.precision(name, device) for name in self._names}
        self._writer = SplitWriter(root, TRAIN)
        # The row that each shard begins with, and the fields of a row in the order in which they are written.
        places = np.array([place for place in range(len(self._listed.ids)) if place not in self._reasons])
        self._starts = np.searchsorted(places, np.arange(self._images.shard_count + 1) * _SHARD_SIZE)
        self._fields = {IMAGE: image_fields(size, labels=False)["data"]}
        for name, spec in teachers.specs.items():
            for part, field in feature_fields(spec, "float16").items():
                self._fields[name if part == "data" else f"{name}/{part}"] = field
        self._row_bytes = sum(field.row_bytes for field in self._fields.values())
        self._checksums = np.zeros(len(self._source.ids), "<u4")  # of each row; 0 if it is not there
        self._wanted = np.ones(len(self._source.ids), bool)  # rows of unfinished shards
        facts = {"images": to_plain(self._images), "rows": len(self._source.ids), "precisions": self._precisions}
        facts["teachers"] = [to_plain(spec) for spec in self._specs]
        self._checksum_file = self._spool / f"{_CHECKSUMS}-{digest(facts)[:16]}"
        self._pool = ThreadPoolExecutor(_WRITERS, "keep")
        self._jobs: list[Future[None]] = []
        self._held = ExitStack()

    def begin(self, others: int) -> None:
        """Announces the split, checks that its folder, images and teachers fit, and that the disk has room.

        Only the first process calls it.

        Args:
            others: Number of held-out images that :meth:`take` will copy besides.

        Raises:
            StoreError: If the folder holds something else, or the disk is too small.
            ConfigError: If another run fills this folder.
        """
        try:
            computed = how_computed(self._device, self._teachers.batch_size)
            self._writer.begin(self._images, self._specs, "float16", computed, self._precisions)
        except StoreError as error:
            raise StoreError(f"{error} In theia fit, --data.keep names that folder.") from error
        with writing(self.root):
            self._held.enter_context(alone(self._spool, "--data.keep"))
        self.open()
        if self.split is not None:
            shutil.rmtree(self._spool)  # what another run, or an extraction, has finished since
            logger.info("The store %s is finished: its features are read, and no teacher runs.", self.root)
            return
        if not self._checksum_file.exists():
            if other := next(self._spool.glob(f"{_CHECKSUMS}-*"), None):
                raise StoreError(
                    f"{other.parent} holds features of other images, teachers or precisions, which another run has "
                    f"left there. Give that run's options, another --data.keep, or delete {other.parent}."
                )
            write_whole(self._checksum_file, self._checksums.tobytes(), StoreError)
        self._check_disk(0 if HELD_OUT in read_manifest(self.root).splits else others)

    def take(self, cache: Cache, inside: bool) -> None:
        """Takes over the features of the held-out images, which a cache has. Only the first process calls it.

        Args:
            cache: The cache, filled.
            inside: Whether they are some of the training images, and not a split of their own.

        Raises:
            StoreError: If the disk is full, or a file is damaged.
        """
        if not inside and HELD_OUT not in read_manifest(self.root).splits:
            pull(str(cache.root.absolute()), self.root, splits=[HELD_OUT])
        if not inside or self.split is not None:
            return
        held_out = cache.held_out()
        numbers = {sample: row for row, sample in enumerate(self._source.ids)}
        arrays = held_out.allocate(1)
        for place, sample in enumerate(held_out.sample_ids()):
            row = numbers[sample]
            if self._wanted[row] and not self._checksums[row]:
                held_out.read_into(np.array([place]), {name: arrays[name] for name in self._fields})
                self._write(row, {name: torch.from_numpy(arrays[name][0]) for name in self._fields}, None)

    def open(self) -> None:
        """Finds out what is there. Every process calls it before its first batch."""
        for shard in range(self._images.shard_count):
            whole = all(self._writer.has_shard(name, shard) for name in (IMAGE, *self._names))
            self._wanted[self._starts[shard] : self._starts[shard + 1]] = not whole
        sets = read_manifest(self.root).splits[TRAIN].sets
        if all(sets[name].complete for name in (IMAGE, *self._names)):
            self.split = FeatureStore(self.root).open_split(TRAIN, self._names)
            return
        if self._checksum_file.exists():
            with reading(self._checksum_file):
                self._checksums = np.fromfile(self._checksum_file, "<u4")

    def add(self, batch: FeatureBatch, teach: Teach) -> FeatureBatch:
        """Gives a batch its features, and keeps those that are new, while the training goes on.

        Args:
            batch: Images of training rows.
            teach: Function that has the teachers compute the features of a batch.

        Returns:
            The same images with float16 features, as they are stored.

        Raises:
            StoreError: If rows of the batch before could not be written, for instance because the disk is full.
            FeatureError: If they hold values that float16 does not.
        """
        self._settle()
        rows = [] if batch.rows is None else batch.rows.tolist()
        found = {place: record for place, row in enumerate(rows) if (record := self._read(row)) is not None}
        columns = {
            name: torch.empty(len(rows), *field.shape, dtype=torch.float16, device=batch.images.device)
            for name, field in self._fields.items()
            if name != IMAGE
        }
        if len(found) < len(rows):
            # All of the batch, so that what is computed does not depend on where a killed run had come.
            taught = teach(batch)
            for name, given in (taught.patches | {f"{name}/cls": cls for name, cls in taught.cls.items()}).items():
                columns[name].copy_(given)
        for place, record in found.items():
            stored = self._values(record)
            for name, column in columns.items():
                column[place] = torch.from_numpy(stored[name])
        new = {row: place for place, row in enumerate(rows) if place not in found and self._wanted[row]}
        if new:
            self._keep(new, {IMAGE: batch.images, **columns})
        return replace(
            batch,
            patches={name: columns[name] for name in self._names},
            cls={name: columns[f"{name}/cls"] for name in self._names if f"{name}/cls" in columns},
        )

    def finish(self, teach: Teach) -> None:
        """Computes the rows that are still missing and makes the shards. All processes call it, and share the work.

        Args:
            teach: Function that has the teachers compute the features of a batch.

        Raises:
            StoreError: If the disk is full.
            FeatureError: If there are values that float16 does not hold.
            ImageError: If an image can no longer be decoded.
        """
        self._settle()
        processes = Processes(self._device if self._trainer is None else self._trainer)
        processes.wait()
        self.open()  # rows of the other processes
        mine = processes.mine(self._images.shard_count)
        with Progress(f"store {self.root}", len(mine), processes.rank == 0, "shard") as progress:
            for shard in mine:
                self._finish_shard(shard, teach)
                progress.advance(1)
        processes.wait()
        processes.first(self._finish_split)
        self.open()
        if processes.rank == 0:
            logger.info(
                "The store %s is finished, with %d images. The next epochs read it, and no teacher runs. To train "
                "another student from it: theia fit --data.store %s", self.root, len(self._source.ids), self.root,
            )  # fmt: skip

    def close(self) -> None:
        """Waits for what is being written, lets other runs have the folder, and says what is missing."""
        wait(self._jobs)
        self._pool.shutdown()
        self._held.close()
        if self.split is None and self._checksum_file.exists() and (not self._trainer or self._trainer.is_global_zero):
            self.open()
            logger.warning(
                "The store %s is not finished, as no epoch has come to its end: features of %d of %d images are kept. "
                "A whole epoch with --data.keep %s completes it, and so does theia extract of these images.",
                self.root, np.count_nonzero(self._checksums), len(self._checksums), self.root,
            )  # fmt: skip

    def _check_disk(self, others: int) -> None:
        labels = self._listed.labels is not None
        sets = plan({TRAIN: self._writer}, {TRAIN: self._images}, self._specs, "float16", labels)
        logger.info("Features are kept in %s:\n%s", self.root, describe_plan(sets, self.root))
        there = sum(path.stat().st_blocks * 512 for path in self._spool.glob("*.rows"))
        # Each process writes a shard before it deletes the rows that the shard is made of.
        twice = self._images.listed_in(0) * (self._trainer.world_size if self._trainer else 1)
        needed = int(sum(part.missing_bytes for part in sets) * _OVERHEAD) + (others + twice) * self._row_bytes - there
        free = free_bytes(self.root)
        if needed > free:
            raise StoreError(
                f"The features to keep do not fit: {readable_bytes(needed)} are to be written and {self.root} has "
                f"{readable_bytes(free)} free. Free some space, or give another --data.keep or none."
            )

    def _settle(self) -> None:
        wait(self._jobs)
        done, self._jobs = self._jobs, []
        for job in done:
            job.result()

    def _keep(self, new: Mapping[int, int], columns: Mapping[str, Tensor]) -> None:
        """Begins to write rows, given by their place in the batch."""
        device = columns[IMAGE].device
        on_gpu = device.type == "cuda"
        host = {name: columns[name].to("cpu", non_blocking=on_gpu) for name in self._fields}
        copied = torch.cuda.current_stream(device).record_event() if on_gpu else None
        self._jobs = [
            self._pool.submit(self._write, row, {name: values[place] for name, values in host.items()}, copied)
            for row, place in new.items()
        ]

    def _write(self, row: int, values: Mapping[str, Tensor], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        arrays = {name: column.numpy() for name, column in values.items()}
        for name, array in arrays.items():
            if name != IMAGE and not np.isfinite(array).all():
                raise FeatureError(
                    f"Teacher {name.removesuffix('/cls')!r}, image {self._source.ids[row]!r}: a value is not a finite "
                    "number, or beyond float16. Remove that image from the source, or train without --data.keep."
                )
        record = b"".join(array.tobytes() for array in arrays.values())
        _write_at(*self._place(row), record)
        checksum = np.array(_checksum(record), "<u4")
        _write_at(self._checksum_file, row * checksum.itemsize, checksum.tobytes())
        self._checksums[row] = checksum

    def _read(self, row: int) -> bytearray | None:
        """The record of a row if it is there, and whole."""
        if not self._checksums[row]:
            return None
        path, offset = self._place(row)
        record = bytearray(self._row_bytes)
        with reading(path):
            if not path.exists():
                return None
            with path.open("rb") as file:
                file.seek(offset)
                file.readinto(record)
        return record if _checksum(record) == self._checksums[row] else None

    def _place(self, row: int) -> tuple[Path, int]:
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._rows_of(shard), (row - int(self._starts[shard])) * self._row_bytes

    def _rows_of(self, shard: int) -> Path:
        return self._spool / f"shard-{shard:06d}.rows"

    def _values(self, record: bytearray) -> dict[str, NDArray[Any]]:
        values, offset = {}, 0
        for name, field in self._fields.items():
            count = int(np.prod(field.shape))
            values[name] = np.frombuffer(record, field.dtype, count, offset).reshape(field.shape)
            offset += field.row_bytes
        return values

    def _finish_shard(self, shard: int, teach: Teach) -> None:
        missing = [name for name in (IMAGE, *self._names) if not self._writer.has_shard(name, shard)]
        rows = range(self._starts[shard], self._starts[shard + 1])
        step = self._teachers.batch_size
        pieces = [rows[start : start + step] for start in range(0, len(rows), step)]
        if IMAGE in missing:
            images = np.empty((len(rows), *self._fields[IMAGE].shape), np.uint8)
            for start, piece in zip(range(0, len(rows), step), pieces, strict=True):
                images[start : start + step] = [values[IMAGE] for values in self._completed(piece, teach)]
            labels = self._source.labels
            first = shard * _SHARD_SIZE
            self._writer.write_images(
                shard,
                [self._source.ids[row] for row in rows],
                images,
                None if labels is None else np.array([labels[row] for row in rows], np.int64),
                [
                    (self._listed.ids[place], self._reasons[place])
                    for place in range(first, first + self._images.listed_in(shard))
                    if place in self._reasons
                ],
            )
        with ExitStack() as opened:
            files = {
                name: opened.enter_context(self._writer.open_shard(name, shard, self._pool))
                for name in missing
                if name != IMAGE
            }
            for piece in pieces if files else []:
                values = self._completed(piece, teach)
                for name, file in files.items():
                    cls = [one[f"{name}/cls"] for one in values if f"{name}/cls" in one]
                    file.append(np.stack([one[name] for one in values]), np.stack(cls) if cls else None)
        self._rows_of(shard).unlink(missing_ok=True)

    def _completed(self, rows: Sequence[int], teach: Teach) -> list[dict[str, NDArray[Any]]]:
        """Rows in their stored form; those that are not there are computed first."""
        found = {row: self._read(row) for row in rows}
        missing = [row for row, record in found.items() if record is None]
        if missing:
            size, resize = self._images.size, self._images.resize
            images = np.stack([to_square(self._source.read(row), size, resize) for row in missing])
            self.add(FeatureBatch(torch.from_numpy(images).to(self._device), {}, rows=torch.tensor(missing)), teach)
            self._settle()
            found |= {row: self._read(row) for row in missing}
        return [self._values(record) for record in found.values() if record is not None]

    def _finish_split(self) -> None:
        self._writer.finish()
        shutil.rmtree(self._spool)


def _checksum(record: bytes | bytearray) -> int:
    return zlib.crc32(record) or 1  # 0 stands for a row that is not there


def _write_at(path: Path, offset: int, content: bytes) -> None:
    with writing(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
        file.seek(offset)
        file.write(content)
