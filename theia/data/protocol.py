"""The contract of training data: what the author of a data class reads. Nothing here knows where images come from."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from theia.errors import ConfigError
from theia.types import FeatureBatch, FeatureStatistics


class TrainingData(L.LightningDataModule, ABC):
    """Images with the features of several teachers, for ``theia fit``, ``validate`` and ``test``.

    A subclass is chosen with ``--data my_package.MyData``; the arguments of its constructor are its options,
    ``--data.NAME``. What has to be written is marked abstract; the rest has a default that suits data which need no
    more. Loaders give :class:`theia.types.FeatureBatch`.

    A run that is killed goes on at the very next sample if ``state_dict`` and ``load_state_dict``, which are
    Lightning's, say where the training loader is and put it back there. By default they do nothing, and an epoch that
    was interrupted starts with its first samples again.

    Attributes:
        batch_size: Global training batch: samples per step over all processes.
    """

    batch_size: int

    @property
    @abstractmethod
    def teacher_shapes(self) -> Mapping[str, Mapping[str, Any]]:
        """What the model must know of each teacher, by name, as plain values.

        ``{"channels": int, "grid_hw": [rows, columns], "has_cls": bool}``.
        """

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Height and width of the images in pixels."""

    @abstractmethod
    def statistics(self) -> Mapping[str, FeatureStatistics]:
        """What each teacher's features are normalised with, by name: means and standard deviations of shape ``(C,)``.

        They are asked for at the start of a training, and of a test of an untrained student.
        """

    @property
    @abstractmethod
    def trained_on(self) -> int:
        """Number of samples that training draws from."""

    @property
    @abstractmethod
    def held_out(self) -> int:
        """Number of samples in validation and test, none of which training draws."""

    @abstractmethod
    def train_dataloader(self) -> Any:
        """Batches of this process for training, in an order of their own in each epoch.

        Lightning takes any sized iterable, calls ``sampler.set_epoch`` if there is a ``sampler``, and does not cut a
        batch among processes.
        """

    @abstractmethod
    def val_dataloader(self) -> Any:
        """Held-out batches of this process, each sample once."""

    def test_dataloader(self) -> Any:
        """The held-out batches of validation."""
        return self.val_dataloader()

    def ordered_dataloader(
        self,
        part: Literal["train", "held_out"],
        device: torch.device,
        most: int | None = None,
        features: bool = True,
    ) -> Iterable[FeatureBatch]:
        """Samples of one part, each once, in order, and all of them in this process. Only scorers need it.

        Args:
            part: The samples of training, or those of validation and test.
            device: Where the batches will be used. They may be elsewhere: they are moved.
            most: Largest number of samples: a fixed part of them, contained in that of a larger number.
            features: Whether the features of the teachers are needed beside the images.

        Raises:
            ConfigError: If these data cannot be read in order, which is the default.
        """
        raise ConfigError(
            f"{type(self).__qualname__} cannot be read in order, so scorers cannot use it: it has no "
            "ordered_dataloader. Leave out --scorers, or implement it."
        )

    def with_all_teachers(self) -> "TrainingData":
        """The data that scorers are given: the same samples with every teacher there is, whole. By default, these."""
        return self

    def labels_agree(self) -> bool:
        """Whether a label means the same class in the training and in the held-out images."""
        return True

    def provenance(self) -> dict[str, Any]:
        """What the features are exactly, as plain values, for ``environment.json`` and the reports of tests.

        Under ``teachers``, by name: ``weights``, ``revision`` and ``licence``, which a model card shows.
        """
        return {}

    def check_training(self, world_size: int) -> None:
        """Raises now what would otherwise be raised later, before the run folder is touched.

        Args:
            world_size: Number of processes that will share the work.

        Raises:
            TheiaError: Whatever training would stop at.
        """

    def check_state(self, state: dict[str, Any]) -> None:
        """Sees whether a run can go on with these data from where another was.

        Args:
            state: What ``state_dict`` gave then; empty if it gave nothing.

        Raises:
            ConfigError: If the samples, the features or their order are others.
        """

    def transfer_batch_to_device(self, batch: FeatureBatch, device: torch.device, dataloader_idx: int) -> FeatureBatch:
        """Moves a batch that is not there yet; what is there already is not copied."""

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
