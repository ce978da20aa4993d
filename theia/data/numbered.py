"""Training data with numbered samples: what reads them, in which order, and where a run goes on."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn

from theia.data.loader import FeatureLoader
from theia.data.protocol import TrainingData
from theia.data.sampler import (
    EvaluationSampler,
    Rows,
    TrainingSampler,
    fixed_fraction,
    hold_out,
    repeated,
    unaltered,
    with_views,
)
from theia.errors import ConfigError
from theia.store.schema import VIEWS
from theia.types import Json, TeacherSpec
from theia.utils.arguments import MOST_PIXELS, check_number, comma_list
from theia.utils.device import cores_of_process

# A worker that reads features copies some 5 GB/s from the page cache, and takes memory for two batches and more.
_CORES_PER_WORKER = 4
_MOST_WORKERS = 4
_MOST_WEIGHT = 1000
# torch.compile keeps at most 8 versions of a step, one of them for validation, and compiles no more.
_MOST_SIZES = 7

Part = Literal["train", "held_out"]


class NumberedData(TrainingData):
    """Data whose samples have row numbers: a :class:`TrainingSampler` orders them, and workers read them into slots.

    A subclass sets ``teacher_specs`` and says which rows there are, and what tells its samples from others.

    Args:
        batch_size: Samples per training batch over all processes.
        val_batch_size: Samples per batch and process in validation and test.
        workers: Reading processes per training process; ``None`` for :meth:`default_workers`.
        fraction: Share of the training samples to use, in (0, 1]; the same samples for every seed.
        weights: Number of times that the samples of a source are drawn in an epoch, by the name that their ids begin
            with; 1 for sources that are left out, ``None`` for all.
        seed: Seed for the order of the training samples, and for what is drawn in a step.
        holdout: Share of the training samples to hold out where there are no others.
        image_sizes: Heights and widths that the student's training images have in turn, comma-separated or a list;
            ``None`` if all have the size of the others.
        teachers_per_step: Number of teachers whose features each training step takes; ``None`` for all.
    """

    teacher_specs: dict[str, TeacherSpec]

    def __init__(
        self,
        batch_size: int,
        val_batch_size: int,
        workers: int | None,
        fraction: float,
        weights: dict[str, float] | None,
        seed: int,
        holdout: float,
        image_sizes: str | list[int] | None,
        teachers_per_step: int | None,
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
        self.image_sizes = _parse_sizes(image_sizes)
        check_number("data.teachers_per_step", teachers_per_step, 1)
        self.teachers_per_step = teachers_per_step
        self._loaders: list[FeatureLoader] = []
        self._training_loader: FeatureLoader | None = None
        self._resume: dict[str, Any] | None = None
        self._sources: Rows | None = None  # number of the source of each training sample

    @property
    def teacher_shapes(self) -> dict[str, dict[str, Any]]:
        """Channels, grid and presence of a CLS token for each teacher, by name; builtin types only."""
        return {
            name: {"channels": spec.channels, "grid_hw": list(spec.grid_hw), "has_cls": spec.has_cls}
            for name, spec in self.teacher_specs.items()
        }

    @property
    def teacher_origins(self) -> dict[str, dict[str, Any]]:
        """Weights, revision and licence of each teacher, by name; builtin types only."""
        return {
            name: {"weights": spec.weights, "revision": spec.revision, "licence": spec.licence}
            for name, spec in self.teacher_specs.items()
        }

    @property
    def held_out(self) -> int:
        """Number of samples in validation and test."""
        return len(self.held_out_rows())

    @property
    def trained_on(self) -> int:
        """Number of samples that training draws in an epoch.

        Raises:
            StoreError: If they come from a store that has no training split.
        """
        return len(self.drawn_rows())

    @property
    def scorers_fit_to(self) -> int:
        """Number of training samples, each counted once and views of images not."""
        return len(self._unaltered(self.training_rows()))

    @abstractmethod
    def all_training_rows(self) -> Rows:
        """Sorted row numbers that training may draw, before ``fraction``."""

    @property
    @abstractmethod
    def training_source(self) -> Mapping[str, Json]:
        """Record of the source of all training rows."""

    @abstractmethod
    def training_ids(self) -> Sequence[str]:
        """Ids of all samples of that source, by row number."""

    @abstractmethod
    def held_out_rows(self) -> Rows:
        """Sorted row numbers of validation and test."""

    @abstractmethod
    def loader(
        self,
        part: Part,
        sampler: TrainingSampler | EvaluationSampler,
        device: torch.device | None = None,
        features: bool = True,
    ) -> FeatureLoader:
        """Loader of one part, made with :meth:`keep`.

        Args:
            part: Training samples, or held-out samples.
            sampler: Sampler that chooses the rows and their order.
            device: Device on which the batches will be used. ``None`` in training, validation and test: the trainer's
                device, and CLS tokens that the model does not compare may be left out.
            features: Whether the teachers' features are needed in addition to the images.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a run must find again to go on: ``images_sha256``, ``features`` by teacher, and ``held_out``."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """What the data come from, for messages: ``"the store stores/imagenet"``."""

    def training_rows(self) -> Rows:
        """Sorted row numbers that training may draw."""
        return self._share(self.all_training_rows(), self.fraction)

    def divided(self, rows: int) -> tuple[Rows, Rows]:
        """Divides the one list of samples that there is into what to train on and what to hold out.

        Args:
            rows: Number of its samples.

        Returns:
            Sorted row numbers to train on, and sorted row numbers to hold out.
        """
        return hold_out(rows, self.holdout, self.training_ids() if self._has_views else None)

    def drawn_rows(self) -> Rows:
        """Rows of an epoch, some of them several times or not at all if there are weights.

        Raises:
            ConfigError: If the weights name a source that is not there.
        """
        rows = self.training_rows()
        if not self.weights:
            return rows
        parts = self.training_source.get("parts")
        names = [str(part["as"]) for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        unknown = [name for name in self.weights if name not in names]
        if unknown:
            come_from = f"{', '.join(names)}. Name those, or leave" if names else "one source, so leave"
            raise ConfigError(
                f"data.weights names {unknown[0]!r}, but the training images of {self.origin} come from {come_from} "
                "it out."
            )
        if self._sources is None:
            of_names = {name: number for number, name in enumerate(names)}
            self._sources = np.array([of_names[key.partition("/")[0]] for key in self.training_ids()])
        here = self._sources[rows]
        drawn = np.concatenate([
            repeated(rows[here == number], self.weights.get(name, 1.0), self._share)
            for number, name in enumerate(names)
        ])  # fmt: skip
        if not len(drawn):
            raise ConfigError(f"data.weights {self.weights} leave no training sample. Give one source more than 0.")
        return drawn

    def training_sampler(self, rank: int, world_size: int) -> TrainingSampler:
        """Sampler of the training samples of one process.

        Raises:
            ConfigError: If there are too few samples for a batch, the processes cannot share it evenly, or there are
                fewer teachers than a step is to take.
        """
        return TrainingSampler(
            self.drawn_rows(), self.batch_size, self.seed, rank, world_size, self.image_sizes,
            list(self.teacher_specs), self.teachers_per_step,
        )  # fmt: skip

    def check_training(self, world_size: int) -> None:
        """Raises errors now that training would otherwise raise later.

        Args:
            world_size: Number of processes that share the training.

        Raises:
            ConfigError: If there are too few samples for a batch, or the processes cannot share it evenly.
        """
        self.training_sampler(0, world_size)

    def train_dataloader(self) -> FeatureLoader:
        """Loader of shuffled training batches, whose state goes into the checkpoint."""
        self._training_loader = self.loader("train", self.training_sampler(*self.processes()))
        if self._resume is not None:
            self._training_loader.load_state_dict(self._resume)
        return self._training_loader

    def val_dataloader(self) -> FeatureLoader:
        """Loader of the held-out samples, each once, in order."""
        sampler = EvaluationSampler(self.held_out_rows(), self.val_batch_size, *self.processes())
        return self.loader("held_out", sampler)

    def ordered_dataloader(
        self, part: Part, device: torch.device, most: int | None = None, features: bool = True
    ) -> FeatureLoader:
        """Loader of all samples of one part in this process, each once, in order. Views of images are left out.

        Args:
            part: Training samples, or the held-out samples of validation and test.
            device: Device on which the batches will be used; the loader copies them there only if it is a CUDA device.
            most: Largest number of samples. The choice is fixed, and contained in the choice for any larger number.
            features: Whether the teachers' features are needed in addition to the images.

        Raises:
            StoreError: If a split of a store is missing or damaged.
        """
        rows = self._unaltered(self.training_rows()) if part == "train" else self.held_out_rows()
        if most is not None and most < len(rows):
            rows = fixed_fraction(rows, most / len(rows))
        return self.loader(part, EvaluationSampler(rows, self.val_batch_size), device, features)

    @property
    def _has_views(self) -> bool:
        return VIEWS in self.training_source

    def _share(self, training_rows: Rows, fraction: float) -> Rows:
        """A share of the images, each with all its views."""
        if not self._has_views:
            return fixed_fraction(training_rows, fraction)
        images = fixed_fraction(self._unaltered(training_rows), fraction)
        return np.intersect1d(training_rows, with_views(self.training_ids(), images))

    def _unaltered(self, training_rows: Rows) -> Rows:
        return np.intersect1d(training_rows, unaltered(self.training_ids())) if self._has_views else training_rows

    def state_dict(self) -> dict[str, Any]:
        """Position of the training loader, kept in every checkpoint.

        Lightning would keep a loader's state by itself, but restores it only in a loader created after the checkpoint
        was read. Computing the number of steps creates the loader before.
        """
        if self._training_loader is None:
            return {}
        return {**self.identity(), "weights": self.weights, "loader": self._training_loader.state_dict()}

    def check_state(self, state: dict[str, Any]) -> None:
        """Checks that a run can continue with these data from the position of another run.

        Args:
            state: State of the other run's data, from :meth:`state_dict`.

        Raises:
            ConfigError: If the images, the features or the order of the samples differ.
        """
        if not state:
            return
        now = self.identity()
        again = "Resume with its own data, or start a new run."
        if state["images_sha256"] != now["images_sha256"]:
            raise ConfigError(
                f"The checkpoint's run drew from other training images than those of {self.origin}. {again}"
            )
        then = state.get("features", {})  # an earlier version did not record it
        other = [name for name, digest in now["features"].items() if then.get(name, digest) != digest]
        if other:
            raise ConfigError(
                f"The features of {', '.join(other)} in {self.origin} are not those that the checkpoint's run learned "
                f"from: other weights, options or precision. {again}"
            )
        if state.get("held_out", now["held_out"]) != now["held_out"]:
            raise ConfigError(
                f"The held-out images of {self.origin}, or their features, are not those that the checkpoint's run was "
                "validated on: another split, or one that was extracted since. The best of both would not be "
                f"comparable. {again}"
            )
        if state.get("weights", {}) != self.weights:
            raise ConfigError(
                f"The checkpoint's run drew its samples with data.weights {state.get('weights', {})}, this one with "
                f"{self.weights}: their order would change in mid-run. Resume with the same, or start a new run."
            )
        self.training_sampler(0, 1).load_state_dict(state["loader"])

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

    def teardown(self, stage: str) -> None:
        """Ends the reading workers."""
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """Ends the reading workers when a run fails or is interrupted."""
        self._close()

    def _close(self) -> None:
        while self._loaders:
            self._loaders.pop().close()

    def keep(self, loader: FeatureLoader) -> FeatureLoader:
        """Notes a loader, whose workers end with the run."""
        self._loaders.append(loader)
        return loader

    def worker_count(self) -> int:
        """Number of reading processes for each loader of this process."""
        return self.default_workers() if self.workers is None else self.workers

    def default_workers(self) -> int:
        """One for every 4 cores that this process may use, from 1 to 4."""
        return min(max(self.cores() // _CORES_PER_WORKER, 1), _MOST_WORKERS)

    def cores(self) -> int:
        """Number of cores that this process may use."""
        return cores_of_process(self.trainer.num_devices if self.trainer else 1)

    def copied_to(self, device: torch.device | None = None) -> torch.device | None:
        """The CUDA device that loaders copy batches to, by default that of the trainer; ``None`` for host memory."""
        if device is None and self.trainer:
            device = self.trainer.strategy.root_device
        return device if device and device.type == "cuda" else None

    def processes(self) -> tuple[int, int]:
        """Number of this process, from 0, and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _parse_sizes(given: str | list[int] | None) -> list[int]:
    texts = comma_list(given) if isinstance(given, str) else [str(size) for size in given or []]
    if not all(text.isdecimal() for text in texts):
        raise ConfigError(f"--data.image_sizes is {given!r}; give numbers of pixels: --data.image_sizes 160,224,288.")
    sizes = [int(text) for text in texts]
    for size in sizes:
        check_number("data.image_sizes", size, 1, MOST_PIXELS)
    if len(set(sizes)) > _MOST_SIZES:
        raise ConfigError(f"--data.image_sizes names {len(set(sizes))} sizes; give at most {_MOST_SIZES}.")
    return sizes
