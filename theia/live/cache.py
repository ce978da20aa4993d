"""What a live run computes once and keeps: features of the held-out images, and statistics of the training features."""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from theia.errors import ImageError, StoreError
from theia.extraction.config import ExtractConfig
from theia.extraction.pipeline import run
from theia.extraction.processes import Processes
from theia.extraction.sources import ImageSource
from theia.live.teachers import LiveTeachers
from theia.store import second_moments
from theia.store.disk import locked, writing
from theia.store.manifest import edit_manifest, read_manifest
from theia.store.reader import FeatureStore, Split
from theia.store.schema import MANIFEST, TRAIN, Resize, canonical_json, statistics_path
from theia.store.statistics import ChannelStatistics
from theia.utils.progress import Progress

logger = logging.getLogger(__name__)

Matrix = NDArray[np.float64]

HELD_OUT = "val"
_LOCK = ".filling"
_SHARD_SIZE = 256  # images; a killed pass repeats at most one shard of each teacher


class Cache:
    """A small feature store, one for each combination of teachers and images, filled by the extraction pipeline.

    Args:
        folder: Folder of all caches.
        facts: Everything that decides the content, as plain values. Another value means another cache.
        names: Names of the teachers.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], names: Sequence[str]) -> None:
        self.root = folder / digest(facts)[:16]
        self._names = list(names)

    @property
    def has_held_out(self) -> bool:
        """Whether the features of all held-out images are there."""
        if not (self.root / MANIFEST).exists():
            return False
        record = read_manifest(self.root).splits.get(HELD_OUT)
        return record is not None and all(name in record.sets and record.sets[name].complete for name in self._names)

    @property
    def has_statistics(self) -> bool:
        """Whether the statistics and covariances of all teachers are there."""
        paths = [path(self.root, name) for path in (statistics_path, second_moments.path_of) for name in self._names]
        there = all(path.exists() for path in paths)
        # They were merged from features, which are dropped once all statistics are written.
        return there and TRAIN not in read_manifest(self.root).splits

    def fill(
        self,
        held_out: ImageSource | None,
        sample: ImageSource | None,
        teachers: LiveTeachers,
        device: torch.device,
        size: int,
        resize: Resize,
        workers: int,
    ) -> None:
        """Computes what is missing; goes on where it was interrupted.

        Args:
            held_out: Held-out images; ``None`` if their features are not needed.
            sample: Training images for the statistics; ``None`` if those are not needed.
            teachers: The teachers.
            device: Device on which they run.
            size: Height and width of the images, in pixels.
            resize: Way to bring an image to that size.
            workers: Number of decoding processes.

        Raises:
            StoreError: If the disk is too small or full, or a file is damaged.
            ImageError: If more than 1 % of the images cannot be decoded.
            ConfigError: If a teacher does not fit into the memory of its device.
            FeatureError: If a teacher gives features of a wrong shape, or values that cannot be stored.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root / _LOCK):  # another run with the same images and teachers is waited for
            sources: dict[str, ImageSource] = {}
            if self.has_statistics:  # a kill may have left what they were merged from
                shutil.rmtree(self.root / TRAIN, ignore_errors=True)
            if held_out is not None and not self.has_held_out:
                sources[HELD_OUT] = held_out
            if sample is not None and not self.has_statistics:
                sources[TRAIN] = sample
            if not sources:
                return
            parts = {
                HELD_OUT: "the features of held-out images (val)",
                TRAIN: "statistics over training images (train)",
            }
            logger.info("Computed once and kept in %s: %s.", self.root, ", ".join(parts[split] for split in sources))
            config = ExtractConfig(
                images=dict.fromkeys(sources, "open already"),
                teachers=self._names,
                store=self.root,
                size=size,
                resize=resize,
                labels=any(source.labels is not None for source in sources.values()),
                batch_size=teachers.batch_size,
                workers=workers,
                shard_size=_SHARD_SIZE,
                all_at_once=True,
                precision=teachers.wanted,
                accelerator=device.type,
            )
            try:
                run(sources, teachers.built, config, Processes(device))
            except (StoreError, ImageError) as error:
                raise type(error)(
                    f"{error} That store is the cache of a live run: --data.cache names its folder."
                ) from error
            if TRAIN in sources:
                store = FeatureStore(self.root)
                for name in self._names:
                    with Progress(f"{name}: covariances", second_moments.count(store, name, None)) as progress:
                        second_moments.measure(store, name, None, device, progress.advance)
                # Their sums are in the statistics, and nothing reads the features again.
                with edit_manifest(self.root) as manifest:
                    del manifest.splits[TRAIN]
            shutil.rmtree(self.root / TRAIN, ignore_errors=True)

    def held_out(self) -> Split:
        """Held-out images with their features.

        Raises:
            StoreError: If they are missing or damaged.
        """
        return FeatureStore(self.root).open_split(HELD_OUT, self._names)

    def covariances(self) -> dict[str, Matrix]:
        """Covariances of the channels of the training features, float64, shape ``(C, C)``, by teacher.

        Raises:
            StoreError: If they are damaged.
        """
        found = {name: second_moments.load_kept(self.root, name) for name in self._names}
        return {name: one.covariance for name, one in found.items() if one is not None}

    def statistics(self) -> dict[str, ChannelStatistics]:
        """Statistics of the training features, by teacher.

        Raises:
            StoreError: If they are missing or damaged.
        """
        return {name: ChannelStatistics.load(statistics_path(self.root, name)) for name in self._names}


def digest(facts: Mapping[str, Any]) -> str:
    """Sha256 of plain values, in hexadecimal."""
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()
