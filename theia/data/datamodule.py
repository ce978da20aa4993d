"""Training data from a feature store."""

import hashlib
import logging
import os
import shlex
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn

from theia.data.loader import FeatureLoader
from theia.data.protocol import TrainingData
from theia.data.sampler import EvaluationSampler, Rows, TrainingSampler, fixed_fraction, hold_out, repeated
from theia.errors import ConfigError
from theia.store.reader import FeatureStore, Split
from theia.store.schema import canonical_json, to_plain
from theia.store.statistics import ChannelStatistics
from theia.utils.arguments import check_number, comma_list
from theia.utils.device import core_count

logger = logging.getLogger(__name__)

_DEFAULT_VAL_SPLIT = "val"
# A worker copies some 5 GB/s from the page cache, and takes memory for two batches and more.
_CORES_PER_WORKER = 4
_MOST_WORKERS = 4
_MOST_WEIGHT = 1000


class FeatureData(TrainingData):
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
        seed: Seed for the order of the training samples.
        val_split: Split for validation and test.
        holdout: Share of the training split to hold out if the store has no validation split.

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
    ) -> None:
        super().__init__()
        check_number("data.batch_size", batch_size, 1)
        check_number("data.val_batch_size", val_batch_size, 1)
        if workers is not None:
            check_number("data.workers", workers, 0)
        check_number("data.seed", seed, 0)
        check_number("data.fraction", fraction, 0, 1, above=True)
        check_number("data.holdout", holdout, 0, 1, above=True, below=True)
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.workers = workers
        self.fraction = fraction
        self.weights = weights or {}
        for name, weight in self.weights.items():
            check_number(f"data.weights.{name}", weight, 0, _MOST_WEIGHT)
        self.seed = seed
        self.holdout = holdout
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
        self._loaders: list[FeatureLoader] = []
        self._training_loader: FeatureLoader | None = None
        self._resume: dict[str, Any] | None = None
        self._sources: np.ndarray[Any, Any] | None = None  # number of the source of each training sample
        first = self._open(self.val_split or "train", names)
        self.teacher_specs = dict(first.teachers)

    @property
    def teacher_shapes(self) -> dict[str, dict[str, Any]]:
        """Channels, grid and presence of a CLS token for each teacher, by name; builtin types only."""
        return {
            name: {"channels": spec.channels, "grid_hw": list(spec.grid_hw), "has_cls": spec.has_cls}
            for name, spec in self.teacher_specs.items()
        }

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

    @property
    def held_out(self) -> int:
        """Number of samples in validation and test."""
        return len(self._held_out_rows())

    @property
    def trained_on(self) -> int:
        """Number of samples that training draws from.

        Raises:
            StoreError: If no training split was extracted.
        """
        return len(self._drawn_rows(self._open("train")))

    def provenance(self) -> dict[str, Any]:
        """The exact origin of the features: the store's digest and the weights of each teacher; builtin types only."""
        return {
            "manifest_sha256": self.store.manifest_sha256,
            "teachers": {
                name: {"weights": spec.weights, "revision": spec.revision, "licence": spec.licence}
                for name, spec in self.teacher_specs.items()
            },
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
        self._training_sampler(self._open("train"), 0, world_size)

    def train_dataloader(self) -> FeatureLoader:
        """Loader of shuffled training batches, whose state goes into the checkpoint."""
        split = self._compared("train")
        sampler = self._training_sampler(split, *self._processes())
        self._training_loader = self._loader(split, sampler)
        if self._resume is not None:
            self._training_loader.load_state_dict(self._resume)
        return self._training_loader

    def val_dataloader(self) -> FeatureLoader:
        """Loader of the held-out samples, each once, in order."""
        split = self._compared(self.val_split or "train")
        sampler = EvaluationSampler(self._held_out_rows(), self.val_batch_size, *self._processes())
        return self._loader(split, sampler)

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

    def ordered_dataloader(
        self,
        part: Literal["train", "held_out"],
        device: torch.device,
        most: int | None = None,
        features: bool = True,
    ) -> FeatureLoader:
        """Loader of all samples of one part in this process, each once, in order.

        Args:
            part: Training samples, or the held-out samples of validation and test.
            device: Device on which the batches will be used; the loader copies them there only if it is a CUDA device.
            most: Largest number of samples. The choice is fixed, and contained in the choice for any larger number.
            features: Whether to read the teachers' features, which are many times as large as the images.

        Raises:
            StoreError: If the split is missing or damaged.
        """
        split = self._open("train" if part == "train" else self.val_split or "train")
        rows = self._training_rows(split) if part == "train" else self._held_out_rows()
        if most is not None and most < len(rows):
            rows = fixed_fraction(rows, most / len(rows))
        sampler = EvaluationSampler(rows, self.val_batch_size)
        return self._loader(split if features else split.images_only(), sampler, device)

    def state_dict(self) -> dict[str, Any]:
        """Position of the training loader, kept in every checkpoint.

        Lightning would keep a loader's state by itself, but restores it only in a loader created after the checkpoint
        was read. Computing the number of steps creates the loader before.
        """
        if self._training_loader is None:
            return {}
        return {
            "images_sha256": self._training_images,
            "features": self._features("train"),
            "held_out": self._held_out_digest(),
            "weights": self.weights,
            "loader": self._training_loader.state_dict(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Checks that a run can continue with these data from the position of another run.

        Args:
            state: State of the other run's data, from :meth:`state_dict`.

        Raises:
            ConfigError: If the images, the features or the order of the samples differ.
        """
        if not state:
            return
        if state["images_sha256"] != self._training_images:
            raise ConfigError(
                f"The checkpoint's run drew from other training images than those of the store {self.store.root}. "
                "Resume with its own store, or start a new run."
            )
        then = state.get("features", {})  # an earlier version did not record it
        other = [name for name, digest in self._features("train").items() if then.get(name, digest) != digest]
        if other:
            raise ConfigError(
                f"The features of {', '.join(other)} in the store {self.store.root} are not those that the "
                "checkpoint's run learned from: other weights, options or precision. Resume with its own store, or "
                "start a new run."
            )
        held_out = self._held_out_digest()
        if state.get("held_out", held_out) != held_out:
            raise ConfigError(
                f"The held-out images of the store {self.store.root}, or their features, are not those that the "
                "checkpoint's run was validated on: another split, or one that was extracted since. The best of both "
                "would not be comparable. Resume with its own store, or start a new run."
            )
        if state.get("weights", {}) != self.weights:
            raise ConfigError(
                f"The checkpoint's run drew its samples with data.weights {state.get('weights', {})}, this one with "
                f"{self.weights}: their order would change in mid-run. Resume with the same, or start a new run."
            )
        self._training_sampler(self._open("train"), 0, 1).load_state_dict(state["loader"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the sample after the last one that the checkpoint's run used.

        Raises:
            ConfigError: If a run cannot continue with these data; see :meth:`check_state`.
        """
        # Lightning also passes the state in a test, which may use other images.
        if not state or (self.trainer and self.trainer.state.fn != TrainerFn.FITTING):
            return
        self.check_state(state)
        self._resume = state["loader"]
        if self._training_loader is not None:
            self._training_loader.load_state_dict(state["loader"])

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

    def _held_out_digest(self) -> str:
        """A digest of the images and features of validation and test, independent of the store's path."""
        split = self.val_split or "train"
        facts = {
            "held out of the training split": self.val_split is None,
            "images": self.store.manifest.splits[split].images.ids_sha256,
            "features": self._features(split),
        }
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()

    @property
    def _training_images(self) -> str:
        return self.store.manifest.splits["train"].images.ids_sha256

    def teardown(self, stage: str) -> None:
        """Ends the reading workers."""
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """Ends the reading workers when a run fails or is interrupted."""
        self._close()

    def _close(self) -> None:
        while self._loaders:
            self._loaders.pop().close()

    def _loader(
        self, split: Split, sampler: TrainingSampler | EvaluationSampler, device: torch.device | None = None
    ) -> FeatureLoader:
        if device is None and self.trainer:
            device = self.trainer.strategy.root_device
        workers = self._default_workers() if self.workers is None else self.workers
        loader = FeatureLoader(split, sampler, workers, device if device and device.type == "cuda" else None)
        self._loaders.append(loader)
        return loader

    def _default_workers(self) -> int:
        # Where each process is bound to cores of its own, as SLURM does it, it may use all of those.
        shared = (os.cpu_count() or 1) // (self.trainer.num_devices if self.trainer else 1)
        return min(max(min(core_count(), shared) // _CORES_PER_WORKER, 1), _MOST_WORKERS)

    def _compared(self, split: str) -> Split:
        """A split without the CLS tokens that the model does not compare, each of which would be a read of its own."""
        opened = self._open(split)
        return opened if self.cls_teachers is None else opened.with_cls_of(self.cls_teachers)

    def _open(self, split: str, teachers: list[str] | None = None) -> Split:
        if split not in self._splits:
            names = teachers or (list(self.teacher_specs) if self._splits else None)
            self._splits[split] = self.store.open_split(split, names)
        return self._splits[split]

    def _training_sampler(self, split: Split, rank: int, world_size: int) -> TrainingSampler:
        return TrainingSampler(self._drawn_rows(split), self.batch_size, self.seed, rank, world_size)

    def _training_rows(self, split: Split) -> Rows:
        rows = np.arange(len(split)) if self.val_split else hold_out(len(split), self.holdout)[0]
        return fixed_fraction(rows, self.fraction)

    def _drawn_rows(self, split: Split) -> Rows:
        """Rows of an epoch, some of them several times or not at all if there are weights."""
        rows = self._training_rows(split)
        if not self.weights:
            return rows
        source = self.store.manifest.splits["train"].images.source
        parts = source.get("parts")
        names = [str(part["as"]) for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        unknown = [name for name in self.weights if name not in names]
        if unknown:
            raise ConfigError(
                f"data.weights names {unknown[0]!r}, but the training images of {self.store.root} come from "
                f"{', '.join(names) or 'one source'}. Name those, or leave it out."
            )
        if self._sources is None:
            of_names = {name: number for number, name in enumerate(names)}
            self._sources = np.array([of_names[key.partition("/")[0]] for key in split.sample_ids()])
        here = self._sources[rows]
        weights = (self.weights.get(name, 1.0) for name in names)
        return np.concatenate([repeated(rows[here == number], weight) for number, weight in enumerate(weights)])

    def _held_out_rows(self) -> Rows:
        split = self._open(self.val_split or "train")
        return np.arange(len(split)) if self.val_split else hold_out(len(split), self.holdout)[1]

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
