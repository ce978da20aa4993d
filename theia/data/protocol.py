"""The contract of training data, for authors of data classes. It does not depend on where the images come from."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from theia.errors import ConfigError
from theia.types import FeatureBatch, FeatureStatistics


class TrainingData(L.LightningDataModule, ABC):
    """Images with the features of several teachers, for ``theia fit``, ``validate`` and ``test``.

    ``--data my_package.MyData`` chooses a subclass, and ``--data.NAME`` sets an argument of its constructor. A subclass
    must define the abstract methods; all others have a default that suits simple data. Loaders give
    :class:`theia.types.FeatureBatch`.

    A killed run continues at the very next sample if Lightning's ``state_dict`` and ``load_state_dict`` keep the
    position of the training loader. By default they do nothing, and an interrupted epoch starts again with its
    first samples.

    Attributes:
        batch_size: Global training batch: samples per step over all processes.
        cls_teachers: Names of the teachers whose CLS tokens the model compares; usually none. The model sets it before
            it asks for the loaders of training, validation and test, whose batches may leave out all other CLS tokens.
            ``None``, the default, if no model has set it: all may be needed.
        image_sizes: Heights and widths of the student's training images, in pixels, if they differ from step to step.
        seed: Seed of what the model draws in a step: dropped patches and teachers, shifts.
        teachers_per_step: Number of teachers of which a training batch has features, the same ones in all processes;
            ``None``, the default, for all. Each teacher must be there equally often. Held-out batches have all.
    """

    batch_size: int
    cls_teachers: Collection[str] | None = None
    image_sizes: Sequence[int] = ()
    seed: int = 0
    teachers_per_step: int | None = None

    @property
    @abstractmethod
    def teacher_shapes(self) -> Mapping[str, Mapping[str, Any]]:
        """Shapes of each teacher's features, by teacher name, as plain values.

        Each is ``{"channels": int, "grid_hw": [rows, columns], "has_cls": bool}``.
        """

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""

    @abstractmethod
    def statistics(self) -> Mapping[str, FeatureStatistics]:
        """Means and standard deviations, shape ``(C,)``, to normalise each teacher's features, by teacher name.

        They are requested at the start of a training, and at the start of a test of an untrained student.
        """

    def covariances(self) -> Mapping[str, Any]:
        """Population covariances of each teacher's channels, float64, shape ``(C, C)``, by teacher name.

        Only some normalisers of the targets need them.

        Raises:
            ConfigError: If the data have none, as is the case by default.
        """
        raise ConfigError(
            f"model.normalizer phi_s, whiten and power need the covariances of the teachers' channels, which "
            f"{type(self).__qualname__} does not give. Train from a store or with LiveData, or choose std or scale."
        )

    def check_covariances(self) -> None:
        """Checks before a training, if its normaliser needs them, that there are or will be covariances.

        Raises:
            ConfigError: If the data have none.
            StoreError: If they have not been measured yet.
        """
        self.covariances()

    @property
    @abstractmethod
    def trained_on(self) -> int:
        """Number of samples that training draws from."""

    @property
    def scorers_fit_to(self) -> int:
        """Number of training samples that :meth:`ordered_dataloader` has, by default those of ``trained_on``."""
        return self.trained_on

    @property
    @abstractmethod
    def held_out(self) -> int:
        """Number of samples in validation and test, which training never draws."""

    @abstractmethod
    def train_dataloader(self) -> Any:
        """Loader of this process's training batches, in a new order in each epoch.

        Lightning takes any iterable with a length, calls ``sampler.set_epoch`` if there is a ``sampler``, and does not
        divide a batch among processes.
        """

    @abstractmethod
    def val_dataloader(self) -> Any:
        """Loader of this process's held-out batches, each sample once."""

    def test_dataloader(self) -> Any:
        """Loader of the test batches, by default the held-out batches of validation."""
        return self.val_dataloader()

    def ordered_dataloader(
        self,
        part: Literal["train", "held_out"],
        device: torch.device,
        most: int | None = None,
        features: bool = True,
    ) -> Iterable[FeatureBatch]:
        """Loader of all samples of one part in this process, each once, in order. Only scorers need it.

        Args:
            part: Training samples, or the held-out samples of validation and test.
            device: Device on which the batches will be used. Batches on another device are moved by the caller.
            most: Largest number of samples. The choice is fixed, and contained in the choice for any larger number.
            features: Whether the teachers' features are needed in addition to the images.

        Raises:
            ConfigError: If the data cannot be read in order, as is the case by default.
        """
        raise ConfigError(
            f"{type(self).__qualname__} cannot be read in order, so scorers cannot use it: it has no "
            "ordered_dataloader. Leave out --scorers, or implement it."
        )

    def with_all_teachers(self) -> "TrainingData":
        """Data for scorers: the same samples, with every teacher that is complete. By default, this object itself."""
        return self

    def labels_agree(self) -> bool:
        """Whether a label means the same class in the training images and in the held-out images."""
        return True

    def provenance(self) -> dict[str, Any]:
        """The exact origin of the features, as plain values, for ``environment.json`` and test reports.

        The entry ``teachers`` holds ``weights``, ``revision`` and ``licence`` by teacher name, for the model card.
        """
        return {}

    def check_training(self, world_size: int) -> None:
        """Raises errors that training would raise later, before the run folder is touched.

        Args:
            world_size: Number of processes that share the training.

        Raises:
            TheiaError: If training would stop with this error.
        """

    def check_state(self, state: dict[str, Any]) -> None:
        """Checks that a run can continue with these data from the position of another run.

        Args:
            state: State of the other run's data, from ``state_dict``; empty if it keeps none.

        Raises:
            ConfigError: If the samples, the features or the order of the samples differ.
        """

    def transfer_batch_to_device(self, batch: FeatureBatch, device: torch.device, dataloader_idx: int) -> FeatureBatch:
        """Moves a batch to a device, without copying tensors that are there already."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return replace(
            batch,
            images=batch.images.to(device),
            patches=moved(batch.patches),
            scales=moved(batch.scales),
            cls=moved(batch.cls),
            labels=None if batch.labels is None else batch.labels.to(device),
        )
