"""What can be shown of each teacher that a model learned from, and what for lack of weights or statistics cannot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theia import hub, registry
from theia.decoding.render import Shown, Tokens
from theia.encoder.encoder import Encoder
from theia.encoder.load import CONFIG
from theia.encoder.published import HUB_IDS
from theia.errors import ConfigError, FeatureError, PluginError, TheiaError, UnknownTeacherError, WeightsError
from theia.teacher import Teacher, check_decoded, check_features
from theia.types import Masks, TeacherSpec


@dataclass(frozen=True)
class Subject:
    """A teacher that a model has a translator for, and what of it is shown.

    Attributes:
        name: Name of the teacher.
        key: What the model calls the teacher: the same, or a hub id in published models.
        grid_hw: Rows and columns of the teacher's tokens.
        comparable: Whether translations can be brought to the scale of the teacher's own features.
        teacher: The teacher itself with its weights, where it is needed and could be loaded.
        decodes: Whether translations go through the teacher's ``decode``; otherwise they are shown as colours.
        shows_own: Whether what the teacher itself gives is shown, too.
        notes: What somebody who looks at the pictures must know, as sentences.
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
        """The teacher's features ``(B, N, C)`` of images ``(B, 3, H, W)``, uint8; ``None`` if they are not shown."""
        if self.teacher is None or not self.shows_own:
            return None
        features = self.teacher(images)
        check_features(self.teacher.spec, features, len(images))
        return features.patches.float()  # type: ignore[no-any-return]

    def show(self, patches: Tensor, image: Tensor, own: bool) -> Shown:
        """Decodes the features of one image.

        Args:
            patches: Features, shape ``(1, N, C)``.
            image: uint8, shape ``(1, 3, H, W)``.
            own: Whether the features are the teacher's own, not a translation.

        Returns:
            What there is to paint; masks are resized to the image.

        Raises:
            FeatureError: If features are not finite, or the teacher decodes them to something that is not allowed.
            PluginError: If the teacher's ``decode`` fails.
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
    """The model's own name of each teacher, a hub id in published models, by the name of the installed teacher."""
    installed = {hub_id: name for name, hub_id in HUB_IDS.items()}
    return {installed.get(key, key): key for key in encoder.teachers}


def learned_from(model: Path) -> dict[str, Any]:
    """Weights and revisions of the teachers that a local model learned from, by teacher; empty if they are not known.

    Args:
        model: An exported folder, or a checkpoint in a run folder.
    """
    exported = model.is_dir()
    path = model / CONFIG if exported else model.absolute().parent.parent / "environment.json"
    try:
        content = json.loads(path.read_text())["record" if exported else "store"]["teachers"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return content if isinstance(content, dict) else {}


def needs_teacher(name: str, encoder: Encoder, side_by_side: bool) -> bool:
    """Whether what is shown needs the teacher itself, and not only what the model has learned from it.

    Args:
        name: A teacher of the model, as :func:`names_of` gives it.
        encoder: The model.
        side_by_side: Whether the teacher's own output is wanted.

    Raises:
        UnknownTeacherError: If the teacher is not installed.
        PluginError: If the teacher's plug-in is broken.
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
    """Finds out what can be shown of a teacher, and loads its weights only where they are needed.

    Args:
        name: A teacher of the model, as :func:`names_of` gives it.
        encoder: The model.
        options: Arguments of the teacher's constructor, if the user gave any.
        side_by_side: Whether the teacher's own output is wanted.
        device: Device that the teacher runs on.
        trained_on: ``weights`` and ``revision`` of the teacher that the model learned from, if they are known.

    Returns:
        The teacher to show; what is not available is missing, and its notes say why.

    Raises:
        ConfigError: If the options make a teacher of another shape than the one that the model learned from.
        UnknownTeacherError: If options are given for a teacher that is not installed.
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
        subject.notes.append(f"the teacher cannot be loaded, translations are shown as PCA colours{own}: {why}")
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


def open_subjects(
    encoder: Encoder,
    teachers: Sequence[str] | None,
    options: Mapping[str, Mapping[str, Any]],
    typed: bool,
    side_by_side: bool,
    device: torch.device,
    trained_on: Mapping[str, Any],
) -> list[Subject]:
    """Opens the teachers to show; see :func:`open_subject`.

    Args:
        encoder: The model.
        teachers: Their names or keys, in the order to show them; by default all teachers of the model.
        options: Arguments of the teachers' constructors, by teacher of the model.
        typed: Whether these options are for this call only, so that each must be of use.
        side_by_side: Whether the teachers' own output is wanted.
        device: Where the teachers run.
        trained_on: What :func:`learned_from` gives.

    Raises:
        UnknownTeacherError: If the model has no such teacher.
        ConfigError: If typed options have no effect, or options do not fit the model.
    """
    known = names_of(encoder)
    installed = {key: name for name, key in known.items()}
    chosen = [*known] if teachers is None else [installed.get(name, name) for name in teachers]
    for name in chosen:
        if name not in known:
            raise UnknownTeacherError(f"This model has no translator for {name!r}. It has: {', '.join(known)}.")
    for name in options if typed else ():
        if name not in chosen or not needs_teacher(name, encoder, side_by_side):
            raise ConfigError(
                f"--teacher_options has {name!r}, but nothing is shown that needs this teacher itself. Name it in "
                "--teachers, if it is left out there; a teacher that decodes nothing needs --teachers_side_by_side."
            )
    return [
        open_subject(name, encoder, options.get(name), side_by_side, device, trained_on.get(name))
        for name in dict.fromkeys(chosen)
    ]


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
