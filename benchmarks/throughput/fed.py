"""Whether the loader keeps up: steps on batches from a store against steps on one batch that is in memory."""

import shutil
from pathlib import Path

import numpy as np
import torch

from benchmarks.throughput.cases import Case, OurStep
from benchmarks.throughput.data import check_space, random_samples, write_store
from benchmarks.throughput.measure import Cost, interleave
from theia.data.loader import FeatureLoader
from theia.data.sampler import TrainingSampler
from theia.store.reader import FeatureStore


def fed_and_resident(
    case: Case, step: OurStep, folder: Path, batches: int, workers: int, pairs: int
) -> dict[str, list[Cost]]:
    """Times the same number of steps both ways.

    Args:
        case: Model and batch, whose shapes the store takes over.
        step: Training step of the case, already compiled.
        folder: Folder for the store, whose files stay in the page cache.
        batches: Number of steps in one repetition: a whole epoch of the store.
        workers: Number of the loader's worker processes.
        pairs: Number of repetitions.

    Returns:
        Costs of ``"resident"`` and ``"loader"``.
    """
    batch, device = case.batch, case.batch.images.device
    count = batches * len(batch.images)
    teachers = {name: (round(raw.shape[1] ** 0.5), raw.shape[2]) for name, raw in batch.patches.items()}
    root = folder / "fed"
    samples = random_samples(count, batch.images.shape[-1], teachers, shard=64)
    check_space(folder, samples.nbytes)
    write_store(root, samples)
    del samples
    sampler = TrainingSampler(np.arange(count), len(batch.images), seed=0)
    split = FeatureStore(root).open_split("train")
    loader = FeatureLoader(split, sampler, workers, device if device.type == "cuda" else None)

    def from_the_loader() -> None:
        sampler.set_epoch(sampler.epoch + 1)
        for fresh in loader:
            step(fresh)
        finish(device)

    def resident() -> None:
        for _ in range(batches):
            step()
        finish(device)

    try:
        return interleave({"resident": resident, "loader": from_the_loader}, pairs)
    finally:
        loader.close()
        shutil.rmtree(root)


def finish(device: torch.device) -> None:
    """Waits until the device has done all work that was given to it.

    Args:
        device: Device to wait for; a CPU needs no wait.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
