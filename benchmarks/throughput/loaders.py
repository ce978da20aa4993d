"""Theia's reader and loader against other formats' loaders, and against the kernel's copies of the same bytes.

C+Di+V at full size: images of 224 pixels and three teachers of 16x16 tokens, float16, without CLS tokens; 1.85 MB a
sample. All read the same samples, in shuffled batches of 16, from the page cache. A batch is ready when the training
process holds its tensors; nobody looks into them while the clock runs.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.throughput.contenders import WORKERS, Contender, cost_per_epoch, ended, theia_loader
from benchmarks.throughput.data import Batch, Samples, check_parity, check_space, random_samples, write_store
from benchmarks.throughput.measure import Cost, Measure, Result, Settings, ratios
from benchmarks.throughput.opponents import chunks, hdf5, limits, tars
from theia.store.reader import FeatureStore

COPY = "memory copy"
RAW = "raw preadv"
READER = "reader"
LOADER = "loader"

_STORE = "store"
_FORMATS = {"h5py + DataLoader": hdf5, "webdataset": tars, "litdata": chunks}
_AIMS = {"h5py + DataLoader": 8.0, "webdataset": 8.0, "litdata": 2.0}
TEACHERS = {"clip": (16, 1024), "dinov2": (16, 1024), "vit": (16, 1280)}
SMALL = {"clip": (4, 16), "dinov2": (4, 16), "vit": (4, 20)}
_FAST = 8  # epochs in a turn


def run(settings: Settings) -> Result:
    """Runs the suite.

    Args:
        settings: How much to measure.

    Returns:
        Ratios of CPU time, and by the clock where the loader is compared with other loaders.

    Raises:
        ParityError: If a path gives other bytes than were written, or not every sample once.
        BenchmarkError: If the disk is too small.
    """
    if settings.small:
        samples, batch_size, fast = random_samples(32, 16, SMALL, shard=8), 4, 1
    else:
        samples, batch_size, fast = random_samples(256, 224, TEACHERS, shard=32), 16, _FAST
    check_space(settings.folder, (len(_FORMATS) + 2) * samples.nbytes)  # one to spare
    write_store(settings.folder / _STORE, samples)
    for name, format_ in _FORMATS.items():
        format_.write(settings.folder / name, samples)
    with ExitStack() as stack:
        contenders = _limits_and_ours(settings.folder / _STORE, samples, batch_size, fast, stack)
        for name, format_ in _FORMATS.items():
            loader = stack.enter_context(ended(format_.loader(settings.folder / name, batch_size)))
            contenders[name] = Contender(partial(iter, loader))
        for name, contender in contenders.items():
            check_parity(name, contender.epoch(), samples)
        costs = cost_per_epoch(contenders, settings.pairs)
    gigabytes = samples.nbytes / 1e9
    return Result(
        measures=_measures(costs, gigabytes),
        details={
            "samples": len(samples),
            "sample_bytes": samples.nbytes // len(samples),
            "batch_size": batch_size,
            "workers": {LOADER: WORKERS} | {name: format_.WORKERS for name, format_ in _FORMATS.items()},
            "webdataset_shuffle_buffer": tars.SHUFFLE_BUFFER,
            "epochs_per_turn": {name: contender.epochs for name, contender in contenders.items()},
            "costs_per_epoch": {name: [vars(cost) for cost in values] for name, values in costs.items()},
            "gb_per_cpu_s": {
                name: gigabytes / statistics.median(cost.cpu_s for cost in values) for name, values in costs.items()
            },
        },
        notes=[
            f"{len(samples)} samples, {gigabytes:.2f} GB a path, in the page cache; shuffled batches of {batch_size}. "
            "Every path gave the same bytes, every sample once.",
            "Nobody looks into the batches: that favours loaders that hand over memory which no one has touched yet.",
        ],
    )


def _limits_and_ours(
    store: Path, samples: Samples, batch_size: int, epochs: int, stack: ExitStack
) -> dict[str, Contender]:
    split = FeatureStore(store).open_split("train")
    ring = [split.allocate(batch_size) for _ in range(limits.RING)]
    raw = limits.Preadv(store, samples, ring)
    stack.callback(raw.close)
    random = np.random.default_rng(0)

    def shuffled() -> list[limits.Rows]:
        return np.split(random.permutation(len(split)), len(split) // batch_size)

    def reader() -> Iterator[Batch]:
        for number, rows in enumerate(shuffled()):
            buffers = ring[number % len(ring)]
            split.read_into(rows, buffers)
            yield limits.as_batch(rows, buffers)

    return {
        COPY: Contender(lambda: limits.copies(samples, ring, shuffled()), epochs),
        RAW: Contender(lambda: raw.epoch(shuffled()), epochs),
        READER: Contender(reader, epochs),
        LOADER: Contender(theia_loader(store, batch_size, stack), epochs),
    }


def _measures(costs: Mapping[str, Sequence[Cost]], gigabytes: float) -> list[Measure]:
    per_gb = [cost.cpu_s / gigabytes for cost in costs[LOADER]]
    measures = [
        Measure("reader against raw preadv, CPU time", ratios(costs, RAW, READER, "cpu_s"), aim=0.9),
        Measure("loader against raw preadv, CPU time", ratios(costs, RAW, LOADER, "cpu_s"), aim=0.65),
        Measure("loader against a memory copy, CPU time", ratios(costs, COPY, LOADER, "cpu_s")),
        Measure("loader, CPU time per GB", per_gb, unit="s", aim=0.4, at_most=True),
    ]
    for name, aim in _AIMS.items():
        measures.append(Measure(f"loader against {name}, CPU time", ratios(costs, name, LOADER, "cpu_s"), aim=aim))
        measures.append(Measure(f"loader against {name}, by the clock", ratios(costs, name, LOADER, "wall_s")))
    return measures
