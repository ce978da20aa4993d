"""One teacher of a model, and what can be shown of it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from theia import hub, registry
from theia.decoding.looks import Shown, Tokens
from theia.encoder.authors import HUB_IDS
from theia.encoder.encoder import Encoder
from theia.errors import ConfigError, FeatureError, PluginError, TheiaError, UnknownTeacherError, WeightsError
from theia.teacher import Teacher, check_decoded, check_features
from theia.types import Masks, TeacherSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A teacher as a model translates for it.

    Attributes:
        name: Of the teacher.
        key: What the model calls it: the same, or a hub id in published models.
        grid_hw: Rows and columns of its tokens.
        comparable: Whether translations can be brought to the teacher's own scale.
        teacher: With weights, if it could be had and is of use.
        decodes: Whether translations go through its ``decode``; otherwise they are shown as colours.
        shows_own: Whether what the teacher itself gives is shown, too.
        notes: What a viewer must know, as sentences.
    """

    name: str
    key: str
    grid_hw: tuple[int, int]
    comparable: bool
    teacher: Teacher | None = None
    decodes: bool = False
    shows_own: bool = False
    notes: list[str] = field(default_factory=list)

    def own_features(self, images: Tensor) -> Tensor | None:
        """What the teacher gives for images ``(B, 3, H, W)``, uint8; ``None`` if it is not shown."""
        if self.teacher is None or not self.shows_own:
            return None
        features = self.teacher(images)
        check_features(self.teacher.spec, features, len(images))
        return features.patches.float()  # type: ignore[no-any-return]

    def show(self, patches: Tensor, image: Tensor, own: bool) -> Shown:
        """Decodes the features of one image.

        Args:
            patches: Shape ``(1, N, C)``.
            image: uint8, shape ``(1, 3, H, W)``.
            own: Whether they are the teacher's own.

        Returns:
            Masks have the image's size, whatever size they were given in.

        Raises:
            FeatureError: If features are not finite, or the teacher decodes to something else than it may.
            PluginError: If its ``decode`` fails.
        """
        if not patches.isfinite().all():
            whose = f"Teacher {self.name!r} gives" if own else f"The model's translations for {self.name!r} have"
            raise FeatureError(
                f"{whose} values that are not finite. Leave it out with --teachers, or mend its weights."
            )
        if self.teacher is None or not (self.decodes or own):
            return Tokens(patches, self.grid_hw)
        try:
            decoded = self.teacher.decode(patches, image)
        except TheiaError:
            raise
        except Exception as error:
            raise PluginError(f"Teacher {self.name!r} cannot decode: {type(error).__name__}: {error}.") from error
        check_decoded(self.teacher.spec, decoded, len(patches))
        if isinstance(decoded, Masks):
            height, width = image.shape[2:]
            return Masks([_resized(each, height, width) for each in decoded.masks], decoded.scores)
        return Tokens(patches, self.grid_hw) if decoded is None else decoded


def names_of(encoder: Encoder) -> dict[str, str]:
    """What a model calls its teachers, by the names that they are installed under.

    A published model calls them by hub id.
    """
    installed = {hub_id: name for name, hub_id in HUB_IDS.items()}
    return {installed.get(key, key): key for key in encoder.teachers}


def is_of_use(name: str, encoder: Encoder, side_by_side: bool) -> bool:
    """Whether anything is shown that takes the teacher itself, and not only what the model has learned of it.

    Args:
        name: A teacher of the model, as :func:`names_of` gives it.
        encoder: The model.
        side_by_side: Whether the teacher's own output is wanted.

    Raises:
        UnknownTeacherError: If it is not installed.
        PluginError: If its plug-in is broken.
    """
    decodes = registry.find(name).decode is not Teacher.decode
    return side_by_side or (decodes and _has_statistics(encoder, names_of(encoder)[name]))


def open_subject(
    name: str,
    encoder: Encoder,
    options: Mapping[str, Any] | None,
    side_by_side: bool,
    device: torch.device,
    trained_on: Mapping[str, Any] | None = None,
) -> Subject:
    """Finds out what can be shown of a teacher, and gets its weights only where they are of use.

    Args:
        name: A teacher of the model, as :func:`names_of` gives it.
        encoder: The model.
        options: Arguments of the teacher's constructor, if the user gave any.
        side_by_side: Whether the teacher's own output is wanted.
        device: Where to put it.
        trained_on: ``weights`` and ``revision`` of the teacher that the model learned from, if they are known.

    Returns:
        What cannot be had is missing in it, and said in its notes.

    Raises:
        ConfigError: If the teacher that the options make is of another shape than the model's.
        UnknownTeacherError: If options are given for one that is not installed.
    """
    key = names_of(encoder)[name]
    record = encoder.architecture.teachers[key]
    rows, columns = record["grid_hw"]
    comparable = _has_statistics(encoder, key)
    subject = Subject(name, key, (rows, columns), comparable)
    if not comparable:
        subject.notes.append(
            "the model has no statistics of these features, as published models have none: its translations cannot be "
            "decoded or scored and are shown as PCA colours of their own"
        )
    shape = (record["channels"], (rows, columns))
    try:
        found = registry.find(name)
        decodes = found.decode is not Teacher.decode and comparable
        if not (decodes or side_by_side):
            return subject
        if not options and _shape(found.spec) != shape:
            raise WeightsError(
                f"the model was distilled from a {name!r} of {_said(shape)}, the default one has "
                f"{_said(_shape(found.spec))}; say which it was with --teacher_options"
            )
        with hub.known_to_answer(str((options or {}).get("weights", found.spec.weights))):
            teacher = registry.create(name, options).to(device)
    except (UnknownTeacherError, PluginError, WeightsError) as error:
        if options and isinstance(error, UnknownTeacherError | PluginError):
            raise
        own = "; its own output is not shown" if side_by_side else ""
        why = error.reason if isinstance(error, hub.UnreachableError) else error
        subject.notes.append(f"the teacher cannot be had, translations are shown as PCA colours{own}: {why}")
        return subject
    if _shape(teacher.spec) != shape:
        raise ConfigError(
            f"The model was distilled from a {name!r} of {_said(shape)}; these --teacher_options make one of "
            f"{_said(_shape(teacher.spec))}. Give those of the extraction."
        )
    learned_from = trained_on or {}
    then, now = learned_from.get("revision"), teacher.spec.revision
    if then and now and then != now:
        subject.notes.append(
            f"the model learned from other weights ({learned_from['weights']}, {then}) than these "
            f"({teacher.spec.weights}, {now}); what is decoded through them may be wrong. Give its own with "
            "--teacher_options"
        )
    return Subject(name, key, (rows, columns), comparable, teacher, decodes, side_by_side, subject.notes)


def _resized(masks: Tensor, height: int, width: int) -> Tensor:
    """Nearest neighbours; ``(M, H, W)``, also of no masks."""
    rows, columns = (
        ((torch.arange(wanted, device=masks.device) + 0.5) * (given / wanted)).long().clamp(max=given - 1)
        for given, wanted in zip(masks.shape[1:], (height, width), strict=True)
    )
    return masks[:, rows][:, :, columns]


def _has_statistics(encoder: Encoder, name: str) -> bool:
    try:
        device = encoder.distiller.student.pixel_mean.device
        encoder.distiller.denormalize(name, torch.zeros(1, 1, 1, device=device))
    except ConfigError:
        return False
    return True


def _shape(spec: TeacherSpec) -> tuple[int, tuple[int, int]]:
    return spec.channels, spec.grid_hw


def _said(shape: tuple[int, tuple[int, int]]) -> str:
    channels, (rows, columns) = shape
    return f"{channels} channels on {rows}x{columns}"
