"""webdataset, laid out as the paper's authors do: one tar column per teacher and one for the images, zipped.

Payloads are safetensors. A column is read in order, so the shuffling is that of a buffer, over shards in random order.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset, default_collate

from benchmarks.throughput.data import ROW, Batch, Samples

WORKERS = 2
SHUFFLE_BUFFER = 100
_PAYLOAD = "safetensors"


def write(folder: Path, samples: Samples) -> None:
    """Writes a folder of tar files for each column."""
    for name in samples.columns:
        (folder / name).mkdir(parents=True)
        for index, rows in enumerate(samples.shards()):
            with webdataset.TarWriter(str(folder / name / f"{index:06d}.tar")) as tar:
                for row in rows:
                    payload = safetensors.torch.save({name: samples.tensors(row)[name].contiguous()})
                    tar.write({"__key__": f"{row:06d}", _PAYLOAD: payload})


def loader(folder: Path, batch_size: int) -> "DataLoader[Batch]":
    """Shuffled batches of what :func:`write` wrote."""
    batches = webdataset.DataPipeline(
        _Zipped(folder),
        webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER),
        webdataset.batched(batch_size, collation_fn=default_collate),
    )
    return DataLoader(batches, batch_size=None, num_workers=WORKERS, persistent_workers=True)


class _Zipped(IterableDataset[Batch]):
    """Samples of several columns, joined by their place in the shards.

    Args:
        folder: With one folder of tar files per column.
    """

    def __init__(self, folder: Path) -> None:
        self._columns = [_column(path) for path in sorted(folder.iterdir())]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for parts in zip(*self._columns, strict=True):
            sample: dict[str, Any] = {ROW: int(parts[0]["__key__"])}
            for part in parts:
                sample |= part["tensors"]
            yield sample


def _column(folder: Path) -> webdataset.WebDataset:
    shards = [str(path) for path in sorted(folder.iterdir())]
    # One seed for all columns: they must put their shards into the same order.
    column = webdataset.WebDataset(shards, shardshuffle=len(shards), detshuffle=True, seed=0)
    return column.map(_decoded)


def _decoded(sample: dict[str, Any]) -> dict[str, Any]:
    return {"__key__": sample["__key__"], "tensors": safetensors.torch.load(sample[_PAYLOAD])}
