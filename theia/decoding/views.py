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

    def views(self, frames: Frames, indices: Iterable[int]) -> Iterator[View]:
        """Shows some pictures.

        Args:
            frames: All pictures.
            indices: Ascending. What cannot be read is left out.
        """
        pictures = frames.pick(indices)
        while batch := list(itertools.islice(pictures, self._batch_size)):
            yield from self._of_batch(batch)

    @torch.no_grad()
    def _of_batch(self, batch: list[tuple[int, Image.Image]]) -> list[View]:
        distiller = self._encoder.distiller
        squares = np.stack([self._square(image, self._encoder.image_size) for _, image in batch])
        images = torch.from_numpy(squares).to(distiller.student.pixel_mean.device)
        normalised = self._encoder.translate(images, [subject.name for subject in self.subjects])
        views = [
            View(index, image, square.transpose(1, 2, 0), {})
            for (index, image), square in zip(batch, squares, strict=True)
        ]
        for subject in self.subjects:
            name = subject.name
            translated = normalised[name].float()
            features = distiller.denormalize(name, translated) if subject.comparable else translated
            own = subject.own_features(images)
            target = distiller.normalize(name, own) if own is not None and subject.comparable else None
            for at, view in enumerate(views):
                # One by one: how much a decoder needs for an image is its own affair.
                here = slice(at, at + 1)
                shown = subject.show(features[here], images[here], own=False)
                theirs = None if own is None else subject.show(own[here], images[here], own=True)
                scores = {} if target is None else {"cosine": feature_cosine(*_numpy(translated[at], target[at]))}
                if theirs is not None:
                    scores |= _scores(shown, theirs)
                defined = {key: value for key, value in scores.items() if math.isfinite(value)}
                view.pairs[name] = Pair(shown, theirs, defined)
        return views


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
