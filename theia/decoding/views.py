"""From pictures to what is shown of each: translations, the teachers' own, and the scores between them."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from theia.decoding.frames import Frames
from theia.decoding.looks import Shown
from theia.decoding.scores import depth_error, feature_cosine, mask_iou
from theia.decoding.subject import Subject
from theia.encoder.encoder import Encoder
from theia.errors import FeatureError
from theia.pictures import Picture
from theia.types import Depth, Masks

Square = Callable[[Image.Image, int], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Pair:
    """One teacher and one image.

    Attributes:
        translated: What the student's translation shows.
        own: What the teacher's own features show, if it is at hand.
        scores: By name: ``cosine`` of the normalised features, and ``depth_error`` or ``mask_iou``; see
            :mod:`theia.decoding.scores`. What is not defined is missing.
    """

    translated: Shown
    own: Shown | None
    scores: dict[str, float]


@dataclass(frozen=True)
class View:
    """One image as all teachers show it.

    Attributes:
        index: Of the image.
        image: RGB, as it was read.
        square: The same as student and teachers see it, ``(S, S, 3)``.
        pairs: By teacher.
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
        square: Brings an image to a side in pixels, uint8 ``(3, S, S)``, as for the training.
        batch_size: Images that are encoded together.
    """

    def __init__(self, encoder: Encoder, subjects: Sequence[Subject], square: Square, batch_size: int) -> None:
        self.subjects = subjects
        self._encoder = encoder
        self._square = square
        self._batch_size = batch_size

    def views(
        self, frames: Frames, indices: Iterable[int], subjects: Sequence[Subject] | None = None
    ) -> Iterator[View]:
        """Shows some pictures.

        Args:
            frames: All pictures.
            indices: Ascending. What cannot be read is left out.
            subjects: Those to show; all by default.
        """
        pictures = frames.pick(indices)
        while batch := list(itertools.islice(pictures, self._batch_size)):
            yield from self._of_batch(batch, self.subjects if subjects is None else subjects)

    @torch.no_grad()
    def _of_batch(self, batch: list[tuple[int, Image.Image]], subjects: Sequence[Subject]) -> Iterator[View]:
        distiller = self._encoder.distiller
        squares = np.stack([self._square(image, self._encoder.image_size) for _, image in batch])
        images = torch.from_numpy(squares).to(distiller.student.pixel_mean.device)
        translated = self._encoder.translate(images, [subject.key for subject in subjects])
        own = {subject.name: subject.own_features(images) for subject in subjects}
        for at, ((index, image), square) in enumerate(zip(batch, squares, strict=True)):
            # One by one: how much a decoder needs for an image is its own affair, and it may take long.
            here = slice(at, at + 1)
            pairs = {}
            for subject in subjects:
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
