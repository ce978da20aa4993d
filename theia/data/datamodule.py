"""Training data from a feature store."""

import hashlib
import logging
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from theia.data.loader import FeatureLoader
from theia.data.numbered import NumberedData, Part
from theia.data.sampler import EvaluationSampler, Rows, TrainingSampler
from theia.errors import ConfigError
from theia.store import second_moments
from theia.store.reader import FeatureStore, Split
from theia.store.schema import canonical_json, to_plain
from theia.store.statistics import ChannelStatistics
from theia.types import Json
from theia.utils.arguments import comma_list

logger = logging.getLogger(__name__)

_DEFAULT_VAL_SPLIT = "val"


class FeatureData(NumberedData):
    """Streams images and the stored features of several teachers.

    Args:
        store: Folder of the feature store that `theia extract` wrote.
        teachers: Teachers to use, comma-separated or a YAML list; all teachers in the store by default.
        batch_size: Samples per training batch over all processes. With accumulated gradients, a step takes several.
        val_batch_size: Samples per batch and process in validation and test.
        workers: Reading processes per training process; 0 reads in the training process. By default one for every 4
            cores per training process, from 1 to 4.
        fraction: Share of the training samples to use, in (0, 1]; the same samples for every seed.
        weights: Number of times that the images of a source are drawn in an epoch, by the name that its sample ids
            begin with, such as {robot: 3, imagenet: 0.5}; 1 for the sources that are left out. For a store of several
            sources.
        seed: Seed for the order of the training samples, and for what is drawn in a step.
        val_split: Split for validation and test.
        holdout: Share of the training split to hold out if the store has no validation split.
        image_sizes: Heights and widths, comma-separated, of which each training step draws one for the student. The
            stored images are resized to it.
        teachers_per_step: Number of teachers whose features each training step reads and learns from, such as 1; all by
            default. All are drawn equally often.

    Raises:
        StoreError: If the store, a split or a teacher is missing or damaged.
    """

    def __init__(
        self,
        store: str = "stores/imagenet",
        teachers: str | list[str] | None = None,
        batch_size: int = 128,
        val_batch_size: int = 64,
        workers: int | None = None,
        fraction: float = 1.0,
        weights: dict[str, float] | None = None,
        seed: int = 0,
        val_split: str = _DEFAULT_VAL_SPLIT,
        holdout: float = 0.01,
        image_sizes: str | list[int] | None = None,
        teachers_per_step: int | None = None,
    ) -> None:
        super().__init__(
            batch_size, val_batch_size, workers, fraction, weights, seed, holdout, image_sizes, teachers_per_step
        )
        self.store = FeatureStore(store)
        self.val_split = val_split if val_split in self.store.splits else None
        if self.val_split is None:
            if val_split != _DEFAULT_VAL_SPLIT:
                raise ConfigError(
                    f"The store {store} has no split {val_split!r}. It has: {', '.join(self.store.splits)}. "
                    "Correct data.val_split, or extract that split."
                )
            logger.warning(
                "The store %s has no split %r: %.3g %% of its training images are held out for validation and test. "
                "For others, run: theia extract --images DIR --split %s --store %s",
                store, val_split, 100 * holdout, val_split, shlex.quote(str(store)),
            )  # fmt: skip
        # Splits are opened when Lightning needs them, but the names of the teachers are needed now.
        splits = self.store.splits
        if "train" in splits and teachers is None:
            teachers = list(self.store.teachers("train"))
        names = None if teachers is None else comma_list(teachers)
        self._splits: dict[str, Split] = {}
        first = self._open(self.val_split or "train", names)
        self.teacher_specs = dict(first.teachers)

    @property
    def image_size(self) -> int:
        """Height and width of the stored images, in pixels."""
        return int(next(iter(self._splits.values())).image_hw[0])

    def statistics(self) -> dict[str, ChannelStatistics]:
        """Mean and standard deviation of each channel over the training split, by teacher.

        Raises:
            StoreError: If no training split was extracted.
        """
        return {name: self.store.statistics(name) for name in self.teacher_specs}

    def covariances(self) -> dict[str, Any]:
        """Covariances as ``theia store statistics`` wrote them, float64, shape ``(C, C)``, by teacher.

        Raises:
            StoreError: If there are none, or they are of other features.
        """
        return {name: second_moments.load(self.store, name).covariance for name in self.teacher_specs}

    def provenance(self) -> dict[str, Any]:
        """The exact origin of the features: the store's digest and the weights of each teacher; builtin types only."""
        return {
            "manifest_sha256": self.store.manifest_sha256,
            "teachers": self.teacher_origins,
        }

    def check_training(self, world_size: int) -> None:
        """Raises errors now that training would otherwise raise later.

        Args:
            world_size: Number of processes that share the training.

        Raises:
            StoreError: If the training split or its statistics are missing or damaged.
            ConfigError: If there are too few samples for a batch, or the processes cannot share it evenly.
        """
        self.statistics()
        super().check_training(world_size)

    def with_all_teachers(self) -> "FeatureData":
        """Data with the same store and held-out samples, and every teacher whose features are complete in both parts.

        They have all training samples whatever the fraction in use here, so that students trained on different shares
        of the images are scored in the same way.

        Raises:
            StoreError: If the training split, or features or statistics of one of its teachers, are missing or damaged.
        """
        data = FeatureData(
            str(self.store.root),
            self.store.finished_teachers(("train", self.val_split or "train")),
            val_batch_size=self.val_batch_size,
            workers=self.workers,
            val_split=self.val_split or _DEFAULT_VAL_SPLIT,
            holdout=self.holdout,
        )
        data._open("train")
        data.statistics()
        return data

    def labels_agree(self) -> bool:
        """Whether classes have the same numbers in both parts; logs a warning if not."""
        splits = self.store.manifest.splits
        training, held_out = (splits[name].images.classes for name in ("train", self.val_split or "train"))
        if training is None or held_out is None or training == held_out:
            return True
        logger.warning(
            "Scorers get no labels: splits 'train' and %r of %s number their classes differently (%d and %d classes). "
            "Extract both from folders with the same classes.",
            self.val_split, self.store.root, len(training), len(held_out),
        )  # fmt: skip
        return False

    @property
    def origin(self) -> str:
        """The store and its folder."""
        return f"the store {self.store.root}"

    def identity(self) -> dict[str, Any]:
        """Digests of the training images, of each teacher's features, and of what is held out; no path."""
        split = self.val_split or "train"
        facts = {
            "held out of the training split": self.val_split is None,
            "images": self.store.manifest.splits[split].images.ids_sha256,
            "features": self._features(split),
        }
        return {
            "images_sha256": self.store.manifest.splits["train"].images.ids_sha256,
            "features": self._features("train"),
            "held_out": hashlib.sha256(canonical_json(facts).encode()).hexdigest(),
        }

    def all_training_rows(self) -> Rows:
        """All rows of the training split, or those that are not held out."""
        rows = len(self._open("train"))
        return np.arange(rows) if self.val_split else self.divided(rows)[0]

    @property
    def training_source(self) -> Mapping[str, Json]:
        """Record of the source of the training split."""
        return self.store.manifest.splits["train"].images.source

    def training_ids(self) -> Sequence[str]:
        """Ids of the samples of the training split."""
        return self._open("train").sample_ids()

    def held_out_rows(self) -> Rows:
        """All rows of the validation split, or those held out of the training split."""
        rows = len(self._open(self.val_split or "train"))
        return np.arange(rows) if self.val_split else self.divided(rows)[1]

    def loader(
        self,
        part: Part,
        sampler: TrainingSampler | EvaluationSampler,
        device: torch.device | None = None,
        features: bool = True,
    ) -> FeatureLoader:
        """See :meth:`NumberedData.loader`. CLS tokens that the model does not compare are not read."""
        split = self._open("train" if part == "train" else self.val_split or "train")
        if not features:
            split = split.images_only()
        elif device is None and self.cls_teachers is not None:  # each CLS token would be a read of its own
            split = split.with_cls_of(self.cls_teachers)
        return self.keep(FeatureLoader(split, sampler, self.worker_count(), self.copied_to(device)))

    def _features(self, split: str) -> dict[str, str]:
        """A digest of each teacher's spec and of the stored type of its features in a split, by teacher."""
        sets = self.store.manifest.splits[split].sets
        digests = {}
        for name, spec in self.teacher_specs.items():
            facts = {**to_plain(spec), "licence": None, "dtype": sets[name].dtype}
            if (basis := sets[name].basis) is not None:
                facts["basis"] = basis.sha256
            digests[name] = hashlib.sha256(canonical_json(facts).encode()).hexdigest()
        return digests

    def _open(self, split: str, teachers: list[str] | None = None) -> Split:
        if split not in self._splits:
            names = teachers or (list(self.teacher_specs) if self._splits else None)
            self._splits[split] = self.store.open_split(split, names)
        return self._splits[split]
