"""From pictures to what is shown of each: translations, the teachers' own output, and the scores between them."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from theia.decoding.frames import Frames
from theia.decoding.render import Shown
from theia.decoding.subjects import Subject
from theia.encoder.encoder import Encoder
from theia.errors import FeatureError
from theia.extraction.images import to_square
from theia.types import Depth, Masks
from theia.utils.pictures import Picture

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


@dataclass(frozen=True)
class Pair:
    """What one teacher shows of one image.

    Attributes:
        translated: What the student's translation shows.
        own: What the teacher's own features show, if that is wanted and the teacher is available.
        scores: Scores by name: :func:`feature_cosine` as ``cosine``, and :func:`depth_error` or :func:`mask_iou`. One
            that is not defined is missing.
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
        pairs: What each teacher shows, by its name.
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
        batch_size: Number of images that are encoded together.
    """

    def __init__(self, encoder: Encoder, subjects: Sequence[Subject], batch_size: int) -> None:
        self.subjects = subjects
        self._encoder = encoder
        self._batch_size = batch_size

    @torch.no_grad()
    def views(self, frames: Frames, indices: Iterable[int]) -> Iterator[View]:
        """Shows some pictures, and leaves out what cannot be read.

        Args:
            frames: All pictures.
            indices: Indices of the pictures to show, ascending.
        """
        device = self._encoder.distiller.student.pixel_mean.device
        pictures = frames.pick(indices)
        while batch := list(itertools.islice(pictures, self._batch_size)):
            # Resized as for the training.
            squares = np.stack([to_square(image, self._encoder.image_size, "squash") for _, image in batch])
            images = torch.from_numpy(squares).to(device)
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
