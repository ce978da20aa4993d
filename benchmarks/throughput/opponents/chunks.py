"""litdata: optimised chunks, streamed and shuffled by its own loader with two workers."""

import os
from pathlib import Path
from typing import Any

from benchmarks.throughput.data import ROW, Samples

WORKERS = 2


def write(folder: Path, samples: Samples) -> None:
    """Writes chunks of as many samples as the other formats have in a file."""
    folder.mkdir()
    litdata = _confined(folder)
    cache = litdata.streaming.cache.Cache(str(folder / "chunks"), chunk_size=samples.shard)
    for row in range(len(samples)):
        cache[row] = {ROW: row, **samples.tensors(row)}
    cache.done()
    cache.merge()


def loader(folder: Path, batch_size: int) -> Any:
    """Shuffled batches of what :func:`write` wrote."""
    litdata = _confined(folder)
    dataset = litdata.StreamingDataset(str(folder / "chunks"), cache_dir=str(folder / "cache"), shuffle=True)
    return litdata.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=WORKERS, persistent_workers=True)


def _confined(folder: Path) -> Any:
    # Left alone it makes its cache in the home folder and under the system's temporary folder, and deletes what it
    # finds there, another program's included. It reads one of these when it is imported, so that comes afterwards.
    for variable in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER", "LITDATA_CACHE_DIR"):
        os.environ[variable] = str(folder / "cache")
    import litdata
    import litdata.streaming.cache

    return litdata
