"""Ways to read the same samples. They take turns of whole epochs: no worker is busy while another's turn is timed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.throughput.data import IMAGE, ROW, Batch
from benchmarks.throughput.measure import Cost, interleave
from theia.data.loader import FeatureLoader
from theia.data.sampler import TrainingSampler
from theia.store.reader import FeatureStore

# Reading processes of Theia's loader.
WORKERS = 1


@dataclass(frozen=True)
class Contender:
    """One way to read the samples.

    Attributes:
        epoch: Function that starts an epoch over all samples.
        epochs: Number of epochs in one turn; fast contenders need several, as the clocks tick every 10 ms.
    """

    epoch: Callable[[], Iterable[Batch]]
    epochs: int = 1

    def turn(self) -> None:
        """Takes every batch of a turn's epochs, and drops it."""
        for _ in range(self.epochs):
            for _ in self.epoch():
                pass


def cost_per_epoch(contenders: Mapping[str, Contender], pairs: int) -> dict[str, list[Cost]]:
    """Gives each contender its turn, several times.

    Args:
        contenders: Contenders by name.
        pairs: Number of turns of each.

    Returns:
        Cost of an epoch in each turn, by contender.
    """
    turns = interleave({name: contender.turn for name, contender in contenders.items()}, pairs)
    return {name: [cost / contenders[name].epochs for cost in costs] for name, costs in turns.items()}


@contextmanager
def ended(loader: "DataLoader[Any]") -> Iterator["DataLoader[Any]"]:
    """Ends a loader's persistent workers when it is left.

    Args:
        loader: Loader of torch, or of a subclass.
    """
    try:
        yield loader
    finally:
        # Not left to the garbage collector. litdata's iterator refers back to its loader: it would be found at any
        # later time, its queues be taken first, and each worker be waited for 5 s in the middle of something else's
        # turn. And once a Lightning run of this process has failed while it made its loaders, torch's loaders remember
        # every iterator for good.
        iterator: Any = loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            loader._iterator = None


def theia_loader(
    store: Path,
    batch_size: int,
    stack: ExitStack,
    teachers: Sequence[str] | None = None,
    workers: int = WORKERS,
    direct: bool | None = None,
) -> Callable[[], Iterator[Batch]]:
    """Theia's loader over a store's split ``train``.

    Args:
        store: Folder of the store.
        batch_size: Number of samples per batch; an incomplete last batch is left out.
        stack: Stack that closes the loader.
        teachers: Teachers to read; all by default.
        workers: Number of reading processes.
        direct: Whether to read past the page cache; the split's own choice by default.

    Returns:
        Function that starts an epoch.
    """
    split = FeatureStore(store).open_split("train", teachers)
    if direct is not None:
        split.direct = direct
    sampler = TrainingSampler(np.arange(len(split)), batch_size, seed=0)
    loader = FeatureLoader(split, sampler, workers)
    stack.callback(loader.close)

    def epoch() -> Iterator[Batch]:
        sampler.set_epoch(sampler.epoch + 1)
        for batch in loader:
            yield {ROW: batch.rows, IMAGE: batch.images, **batch.patches}  # type: ignore[dict-item]  # a store has rows

    return epoch
