"""From pictures to what is shown of each: translations, the teachers' own, and the scores between them."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from theia import hub, registry
from theia.decoding.frames import Frames
from theia.decoding.render import Shown, Tokens
from theia.encoder.encoder import Encoder
from theia.encoder.load import CONFIG
from theia.encoder.published import HUB_IDS
from theia.errors import ConfigError, FeatureError, PluginError, TheiaError, UnknownTeacherError, WeightsError
from theia.teacher import Teacher, check_decoded, check_features
from theia.types import Depth, Masks, TeacherSpec
from theia.utils.pictures import Picture


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
        device: Where the teacher runs.
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


Array = npt.NDArray[Any]


def depth_error(prediction: Array, target: Array) -> float:
    """Scale- and shift-invariant error of a depth map.

    The prediction ``d`` is fitted to the target ``t`` by least squares over all pixels, ``min (s d + b - t)^2`` with
    ``s >= 0``, and what remains is given as root mean square over the target's standard deviation. In closed form that
    is ``sqrt(1 - r^2)`` with Pearson's correlation ``r``, or 1 where ``r < 0``: near and far must not be exchanged.

    Args:
        prediction: Depth map, shape ``(H, W)``, of any scale and shift.
        target: Same shape.

    Returns:
        0 for equal up to scale and shift, 1 for no better than a constant; NaN if the target is constant.

    Source: alignment of Ranftl et al., "Towards Robust Monocular Depth Estimation" (MiDaS), 2020, eq. (5).
    """
    d, t = (np.asarray(each, np.float64) - np.mean(each, dtype=np.float64) for each in (prediction, target))
    if not t.any() or np.ptp(target) == 0:
        return math.nan
    if np.ptp(prediction) == 0:
        return 1.0
    correlation = float((d * t).sum() / math.sqrt((d * d).sum() * (t * t).sum()))
    return math.sqrt(max(0.0, 1 - max(0.0, correlation) ** 2))


def mask_iou(prediction: Array, target: Array) -> float:
    """Mean intersection over union of masks in their best one-to-one matching.

    Masks are matched so that the sum of IoUs is largest (Hungarian method); it is divided by the larger of the two
    counts: a mask without a partner, missing or surplus, counts as 0.

    Args:
        prediction: bool, shape ``(M, H, W)``.
        target: bool, shape ``(K, H, W)``.

    Returns:
        From 0 to 1; NaN if there are no masks at all.
    """
    if not len(prediction) and not len(target):
        return math.nan
    if not len(prediction) or not len(target):
        return 0.0
    a, b = (np.asarray(each, np.float32).reshape(len(each), -1) for each in (prediction, target))
    intersection = (a @ b.T).astype(np.float64)
    union = a.sum(1, dtype=np.float64)[:, None] + b.sum(1, dtype=np.float64) - intersection
    iou = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    rows, columns = linear_sum_assignment(iou, maximize=True)
    return float(iou[rows, columns].sum() / max(len(a), len(b)))


def feature_cosine(prediction: Array, target: Array) -> float:
    """Cosine between two whole feature maps, each flattened, as the training loss has it.

    Args:
        prediction: Normalised features, shape ``(N, C)``.
        target: Same shape.

    Returns:
        From -1 to 1; NaN if one is all zero.
    """
    a, b = (np.asarray(each, np.float64).ravel() for each in (prediction, target))
    norms = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / norms if norms else math.nan


Square = Callable[[Image.Image, int], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Pair:
    """What one teacher shows of one image.

    Attributes:
        translated: What the student's translation shows.
        own: What the teacher's own features show, if that is wanted and the teacher is available.
        scores: By name: :func:`feature_cosine` as ``cosine``, and :func:`depth_error` or :func:`mask_iou`. A score that
            is not defined is missing.
    """

    translated: Shown
    own: Shown | None
    scores: dict[str, float]


@dataclass(frozen=True)
class View:
    """One image as all teachers show it.

    Attributes:
        index: Place of the image among all frames.
        image: The image as it was read, RGB.
        square: The image as student and teachers see it, ``(S, S, 3)``.
        pairs: What is shown, by teacher.
    """

    index: int
    image: Image.Image
    square: Picture
    pairs: dict[str, Pair]


class Viewer:
    """Shows pictures through a student and its teachers.

    Args:
        encoder: The student with its translators.
        subjects: Teachers to show.
        square: Resizes an image to a square of this side in pixels, uint8 ``(3, S, S)``, as for the training.
        batch_size: How many images are encoded together.
    """

    def __init__(self, encoder: Encoder, subjects: Sequence[Subject], square: Square, batch_size: int) -> None:
        self.subjects = subjects
        self._encoder = encoder
        self._square = square
        self._batch_size = batch_size

    def views(self, frames: Frames, indices: Iterable[int]) -> Iterator[View]:
        """Shows some pictures, and leaves out what cannot be read.

        Args:
            frames: All pictures.
            indices: Which of them, ascending.
        """
        pictures = frames.pick(indices)
        while batch := list(itertools.islice(pictures, self._batch_size)):
            yield from self._of_batch(batch)

    @torch.no_grad()
    def _of_batch(self, batch: list[tuple[int, Image.Image]]) -> Iterator[View]:
        distiller = self._encoder.distiller
        squares = np.stack([self._square(image, self._encoder.image_size) for _, image in batch])
        images = torch.from_numpy(squares).to(distiller.student.pixel_mean.device)
        translated = self._encoder.translate(images, [subject.key for subject in self.subjects])
        own = {subject.name: subject.own_features(images) for subject in self.subjects}
        for at, ((index, image), square) in enumerate(zip(batch, squares, strict=True)):
            # One by one: how much a decoder needs for an image is its own affair, and it may take long.
            here = slice(at, at + 1)
            pairs = {}
            for subject in self.subjects:
                theirs = own[subject.name]
                pairs[subject.name] = self._pair(
                    subject,
                    translated[subject.key][here].float(),
                    None if theirs is None else theirs[here],
                    images[here],
                )
            yield View(index, image, square.transpose(1, 2, 0), pairs)

    def _pair(self, subject: Subject, translated: torch.Tensor, own: torch.Tensor | None, image: torch.Tensor) -> Pair:
        """Shows one image: normalised translation, and the teacher's features as they are, ``(1, N, C)``."""
        distiller, key = self._encoder.distiller, subject.key
        features = distiller.denormalize(key, translated) if subject.comparable else translated
        shown = subject.show(features, image, own=False)
        if own is None:
            return Pair(shown, None, {})
        theirs = subject.show(own, image, own=True)
        if isinstance(shown, Depth) and isinstance(theirs, Depth) and shown.maps.shape != theirs.maps.shape:
            sizes = " and to ".join("x".join(map(str, each.maps.shape[1:])) for each in (shown, theirs))
            raise FeatureError(
                f"Teacher {subject.name!r} decoded features of one image to {sizes}. Correct its decode(): the size of "
                "depth may depend on that of the image only."
            )
        scores = _scores(shown, theirs)
        if subject.comparable:
            target = distiller.normalize(key, own)
            scores = {"cosine": feature_cosine(*_numpy(translated[0], target[0])), **scores}
        return Pair(shown, theirs, {key: value for key, value in scores.items() if math.isfinite(value)})


def _scores(shown: Shown, own: Shown) -> dict[str, float]:
    match shown, own:
        case Depth(a), Depth(b):
            return {"depth_error": depth_error(*_numpy(a[0], b[0]))}
        case Masks([a], _), Masks([b], _):
            return {"mask_iou": mask_iou(*_numpy(a, b))}
        case _:
            return {}


def _numpy(*tensors: torch.Tensor) -> Iterator[npt.NDArray[np.generic]]:
    return (tensor.cpu().numpy() for tensor in tensors)
