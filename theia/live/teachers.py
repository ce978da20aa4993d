"""Teachers that run during training: one batch of images in, the same batch with features out."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from theia.data.loader import FeatureLoader, Read
from theia.data.ring import Samples
from theia.data.sampler import EvaluationSampler, TrainingSampler
from theia.errors import ConfigError, WeightsError
from theia.extraction.computing import choose, compute, placed, weight_bytes
from theia.extraction.stages import build_teacher
from theia.teacher import Teacher
from theia.types import FeatureBatch, Precision, TeacherSpec

if TYPE_CHECKING:
    from theia.live.keeping import Kept


class LiveTeachers:
    """Several teachers in memory.

    Args:
        names: Names of the teachers.
        options: Arguments of the teachers' constructors, by teacher.
        batch_size: Number of images per forward pass of a teacher.
        precision: Arithmetic of the teachers; ``"auto"`` chooses as ``theia extract`` does for a new store.

    Raises:
        UnknownTeacherError: If a teacher is not installed.
        ConfigError: If a teacher does not have one of its options, or a teacher with options does not run.
        PluginError: If the plugin of a teacher is broken.
        WeightsError: If the weights of a teacher cannot be loaded.
    """

    def __init__(
        self,
        names: Sequence[str],
        options: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        precision: Precision | Literal["auto"],
    ) -> None:
        idle = [name for name in options if name not in names]
        if idle:
            raise ConfigError(
                f"data.teacher_options has options of {idle[0]!r}, which does not run: the teachers that run are "
                f"{', '.join(names)}. Name it in data.teachers, or leave its options out."
            )
        self.built = {name: _build(name, options.get(name)) for name in names}
        self.batch_size = batch_size
        self.wanted = precision

    @property
    def specs(self) -> dict[str, TeacherSpec]:
        """Specs of the teachers, by name."""
        return {name: teacher.spec for name, teacher in self.built.items()}

    @property
    def bytes(self) -> int:
        """Memory of all weights."""
        return sum(map(weight_bytes, self.built.values()))

    def precision(self, name: str, device: torch.device) -> Precision:
        """Arithmetic of one teacher on a device."""
        return choose(self.wanted, None, device.type == "cuda", self.built[name].gpu_precision)

    def move(self, device: torch.device) -> None:
        """Moves all teachers to a device.

        Raises:
            ConfigError: If one does not fit there.
        """
        for teacher in self.built.values():
            placed(teacher, device)

    @torch.no_grad()  # not inference_mode, whose tensors a loss cannot keep for its gradients
    def added(self, batch: FeatureBatch, device: torch.device, without: Collection[str] = ()) -> FeatureBatch:
        """The batch with the features of all teachers.

        Args:
            batch: Batch of images, on any device.
            device: Device of the teachers.
            without: Names of teachers that are not run.

        Returns:
            The same images, with features on their device.

        Raises:
            ConfigError: If the memory of the device is too small.
            FeatureError: If features do not fit a teacher's spec.
        """
        patches, cls = dict(batch.patches), dict(batch.cls)
        pieces = torch.split(batch.images.to(device), self.batch_size)
        for name, teacher in self.built.items():
            if name in without:
                continue
            given = [compute(teacher, piece, self.precision(name, device)) for piece in pieces]
            patches[name] = _joined([features.patches for features in given], batch.images.device)
            tokens = [features.cls for features in given if features.cls is not None]
            if tokens:
                cls[name] = _joined(tokens, batch.images.device)
        return replace(batch, patches=patches, cls=cls)


def _build(name: str, options: Mapping[str, Any] | None) -> Teacher:
    try:
        return build_teacher(name, options)
    except WeightsError as error:  # whose advice is about theia extract
        raise WeightsError(
            f"{error} In theia fit, that option is --data.teacher_options.{name} '{{weights: /path/to/folder}}'."
        ) from error


def _joined(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    whole = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
    return whole.to(device).contiguous()  # as from a store: sums in another order round differently


class LiveLoader(FeatureLoader):
    """A loader whose batches get the features of live teachers, in the training process.

    Args:
        samples: Images by row number, perhaps with the stored features of other teachers.
        sampler: Sampler that chooses the rows and their order.
        workers: Number of decoding processes.
        device: CUDA device of the training, to which batches are copied; ``None`` for host memory.
        read: Function that the workers call to read samples; ``None`` for a split of a store.
        teachers: The live teachers.
        teacher_device: Device on which they run.
        kept: Store that keeps the features of an epoch, and gives them in the next ones; none by default.
    """

    def __init__(
        self,
        samples: Samples,
        sampler: TrainingSampler | EvaluationSampler,
        workers: int,
        device: torch.device | None,
        read: Read | None,
        teachers: LiveTeachers,
        teacher_device: torch.device,
        kept: "Kept | None" = None,
    ) -> None:
        super().__init__(samples, sampler, workers, device, read)
        self._teachers, self._teacher_device = teachers, teacher_device
        self._kept = kept
        self._from_kept: FeatureLoader | None = None

    @property
    def bytes(self) -> int:
        """Memory of the slots that the workers decode into."""
        return self._ring.bytes

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Gives batches with features. See :meth:`FeatureLoader.__iter__`."""
        if self._kept is not None and self._kept.split is not None:
            if self._from_kept is None:
                super().close()
                self._from_kept = FeatureLoader(self._kept.split, self.sampler, self._kept.workers, self._device)
            yield from self._from_kept
            return
        self._teachers.move(self._teacher_device)
        yield from super().__iter__()

    def close(self) -> None:
        """See :meth:`FeatureLoader.close`."""
        super().close()
        if self._from_kept is not None:
            self._from_kept.close()

    def _complete(self, batch: FeatureBatch, without: Sequence[str]) -> FeatureBatch:
        teach = partial(self._teachers.added, device=self._teacher_device, without=without)
        if self._kept is None or not isinstance(self.sampler, TrainingSampler):
            return teach(batch)
        batch = self._kept.add(batch, teach)
        if self.sampler.consumed == len(self.sampler) * self.sampler.batch_size:
            self._kept.finish(teach)
        return batch


def as_device(text: str) -> torch.device:
    """A device by its name.

    Raises:
        ConfigError: If there is no such device.
    """
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"data.teacher_device is {text!r}, on which torch cannot compute here: {said}. Name a device "
            "that is there, such as 'cpu', or leave it out: teachers then run on the device of the training."
        ) from error
    return device
