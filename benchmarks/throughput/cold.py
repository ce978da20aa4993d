"""Reading from a disk instead of the page cache, and from files that answer late, as those on a network do.

The same C+Di+V samples as in the suite ``loaders``. Before each turn, the kernel is asked to forget the pages of every
file (``posix_fadvise``). Every turn's work is 1.85 MB a sample, so that the clock gives the rate. A virtual disk may be
cached by its host, which nothing here can see: compare ratios.

A late file system is made here, by a delay in the system call that reads. As with a network file system, the call does
not tell what is in the page cache, and reading ahead by the kernel does not help.
"""

import os
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from errno import EOPNOTSUPP
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.throughput.contenders import Contender, ended, theia_loader
from benchmarks.throughput.data import (
    Batch,
    Samples,
    check_parity,
    check_space,
    random_samples,
    write_store,
)
from benchmarks.throughput.loaders import SMALL, TEACHERS
from benchmarks.throughput.measure import Cost, Measure, Result, Settings, interleave, ratios
from benchmarks.throughput.opponents import chunks, limits, tars
from theia.store.reader import FeatureStore, shared_array

DEPTH = 32  # reads under way at a time
BLOCK = 1 << 19  # bytes, the size of most rows
DELAY = 0.001  # seconds

RAW = f"raw reads of {BLOCK >> 10} KiB, {DEPTH} at a time"
LOOP = "plain loop of one process"
CACHED = "loader, through the page cache"
DIRECT = "loader, past the page cache"

_STORE = "store"
_FORMATS = {"webdataset": tars, "litdata": chunks}


def run(settings: Settings) -> Result:
    """Runs the suite.

    Args:
        settings: How much to measure.

    Returns:
        Ratios of rates by the clock.

    Raises:
        ParityError: If a path gives other bytes than were written, or not every sample once.
        BenchmarkError: If the disk is too small.
    """
    if settings.small:
        samples, batch_size = random_samples(32, 16, SMALL, shard=8), 4
    else:
        samples, batch_size = random_samples(512, 224, TEACHERS, shard=64), 32
    check_space(settings.folder, (len(_FORMATS) + 2) * samples.nbytes)  # one to spare
    store = settings.folder / _STORE
    write_store(store, samples)
    for name, format_ in _FORMATS.items():
        format_.write(settings.folder / name, samples)
    fio_rate = _fio(store)
    with ExitStack() as stack:
        contenders = {RAW: Contender(partial(_raw, store))}
        contenders[LOOP] = Contender(partial(_plain, store, batch_size))
        for name, direct in ((CACHED, False), (DIRECT, True)):
            contenders[name] = Contender(theia_loader(store, batch_size, stack, workers=1, direct=direct))
        for name, format_ in _FORMATS.items():
            loader = stack.enter_context(ended(format_.loader(settings.folder / name, batch_size)))
            contenders[name] = Contender(partial(iter, loader))
        for name, contender in contenders.items():
            if name != RAW:
                check_parity(name, contender.epoch(), samples)
        turns = {name: contender.turn for name, contender in contenders.items()}
        costs = interleave(turns, settings.pairs, before=partial(drop, settings.folder))
    lately = _late(store, samples, batch_size, settings)
    rates = {name: [samples.nbytes / cost.wall_s / 1e9 for cost in values] for name, values in (costs | lately).items()}
    return Result(
        measures=_measures(costs, lately),
        details={
            "samples": len(samples),
            "sample_bytes": samples.nbytes // len(samples),
            "batch_size": batch_size,
            "workers": 1,
            "depth": DEPTH,
            "delay_s": DELAY,
            "costs_per_epoch": {name: [vars(cost) for cost in values] for name, values in (costs | lately).items()},
            "gb_per_s": {name: statistics.median(values) for name, values in rates.items()},
            "fio_gb_per_s": fio_rate,
        },
        notes=[
            f"{len(samples)} samples, {samples.nbytes / 1e9:.2f} GB a path. Before each turn, the page cache of the "
            f"files was dropped: of the store, {_dropped(settings.folder):.0%} had left memory. "
            + (
                f"fio, {DEPTH} direct reads at a time: {fio_rate:.2f} GB/s. "
                if fio_rate is not None
                else "fio is not installed. "
            )
            + f"Our raw reads: {statistics.median(rates[RAW]):.2f} GB/s.",
            f"Late files: {DELAY * 1000:.0f} ms added to each read by a wrapper around os.preadv, in every process.",
        ],
    )


def drop(folder: Path) -> None:
    """Has the kernel forget the pages of all files under a folder.

    Args:
        folder: Folder whose files to drop from the page cache.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)  # pages that are not on the disk yet would stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


@contextmanager
def late(delay: float) -> Iterator[None]:
    """Delays every read of this process, and of those that it forks meanwhile.

    Args:
        delay: Time added to each read, in seconds.
    """
    real = os.preadv

    def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(EOPNOTSUPP, "a late file does not tell what is in the page cache")
        time.sleep(delay)
        return real(file, buffers, offset)

    with patch("os.preadv", preadv):
        yield


def _late(store: Path, samples: Samples, batch_size: int, settings: Settings) -> dict[str, list[Cost]]:
    with ExitStack() as stack:
        stack.enter_context(late(0 if settings.small else DELAY))
        contenders = {
            f"late: {LOOP}": Contender(partial(_plain, store, batch_size)),
            "late: loader": Contender(theia_loader(store, batch_size, stack, workers=1, direct=False)),
        }
        for name, contender in contenders.items():
            check_parity(name, contender.epoch(), samples)
        return interleave({name: contender.turn for name, contender in contenders.items()}, settings.pairs)


def _plain(store: Path, batch_size: int) -> Iterator[Batch]:
    """One read after the other, in the process that uses the batches."""
    split = FeatureStore(store).open_split("train")
    split.direct = False
    ring = [split.allocate(batch_size) for _ in range(limits.RING)]
    order = np.random.default_rng().permutation(len(split))
    for number, rows in enumerate(np.split(order, len(split) // batch_size)):
        buffers = ring[number % len(ring)]
        split.read_into(rows, buffers)
        yield limits.as_batch(rows, buffers)


def _raw(store: Path) -> Iterable[Batch]:
    """What the disk gives: as many bytes as the store has, in blocks in random order, past the page cache."""
    places = [
        (path, offset)
        for path in sorted((store / "train").rglob("*.h5"))
        for offset in range(0, path.stat().st_size, BLOCK)
    ]
    random.shuffle(places)
    files = {path: _open_direct(path) for path in {path for path, _ in places}}
    buffers = shared_array((DEPTH, BLOCK), np.dtype(np.uint8))

    def read(start: int) -> None:
        for path, offset in places[start::DEPTH]:
            os.preadv(files[path], (buffers[start].data,), offset)

    with ThreadPoolExecutor(DEPTH) as pool:
        list(pool.map(read, range(DEPTH)))
    for file in files.values():
        os.close(file)
    return []


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # a file system without direct reads
        return os.open(path, os.O_RDONLY)


def _fio(store: Path) -> float | None:
    """Rate of the disk according to fio, in GB/s, or ``None`` where it is not installed or cannot run."""
    fio = shutil.which("fio")
    if fio is None:
        return None
    drop(store)
    files = ":".join(str(path) for path in sorted((store / "train").rglob("*.h5")))
    command = [
        fio, "--name=cold", "--rw=randread", f"--bs={BLOCK}", "--ioengine=libaio", f"--iodepth={DEPTH}", "--direct=1",
        "--readonly", "--runtime=5", "--time_based", "--output-format=terse", f"--filename={files}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    fields = re.search(r"^3;fio.*$", done.stdout, re.MULTILINE)
    return float(fields[0].split(";")[6]) * 1024 / 1e9 if fields else None


def _dropped(folder: Path) -> float:
    """Share of the store's pages that are not in the page cache after they were dropped."""
    drop(folder)
    here = total = 0
    page = bytearray(1)
    for path in sorted((folder / _STORE / "train").rglob("*.h5")):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, path.stat().st_size, 1 << 20):
            total += 1
            try:
                here += os.preadv(file, (page,), offset, os.RWF_NOWAIT)
            except OSError:
                continue
        os.close(file)
    return 1 - here / total


def _measures(costs: Mapping[str, Sequence[Cost]], late: Mapping[str, Sequence[Cost]]) -> list[Measure]:
    loop, loader = late
    measures = [
        Measure(f"cold: {name}, against {RAW}", ratios(costs, RAW, name, "wall_s"), aim=aim)
        for name, aim in ((DIRECT, 0.8), (CACHED, None), (LOOP, None))
    ]
    measures.append(Measure(f"cold: {DIRECT} against {LOOP}, CPU time", ratios(costs, LOOP, DIRECT, "cpu_s")))
    measures += [Measure(f"cold: {DIRECT}, against {name}", ratios(costs, name, DIRECT, "wall_s")) for name in _FORMATS]
    measures.append(
        Measure(f"{DELAY * 1000:.0f} ms late: loader against {LOOP}", ratios(late, loop, loader, "wall_s"), aim=8)
    )
    return measures
