"""The interface of every teacher, for authors of plugins."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from theia.errors import FeatureError
from theia.types import Decoded, Depth, Masks, Pictures, Precision, TeacherFeatures, TeacherSpec

logger = logging.getLogger(__name__)

RANDOM_SEED = 0


class Teacher(nn.Module, ABC):
    """A vision model that turns images into spatial tokens.

    A plugin subclasses this, sets ``spec`` on the class to what it gives by default, and implements
    :meth:`forward`. Constructor arguments must have type hints: they become options of ``theia extract`` under the
    teacher's name. Where an argument changes what the teacher gives, ``__init__`` sets ``self.spec`` to a changed
    copy (``dataclasses.replace``). Heavy imports and weights belong in ``__init__``, not at the top of the module:
    listing the installed teachers imports every plugin's module.

    The framework puts an instance into eval mode, freezes it and calls it without gradients. Given the same images
    and options it must give the same features in every process, or an interrupted extraction could not be resumed.
    """

    spec: TeacherSpec
    # Arithmetic on a GPU, unless --precision says otherwise. bf16-mixed is for a teacher whose features it changes by
    # no more than the rounding to float16 does: docs/teachers.md says how to measure that.
    gpu_precision: ClassVar[Precision] = "tf32"

    @abstractmethod
    def forward(self, images: Tensor) -> TeacherFeatures:
        """Computes the features of a batch.

        Args:
            images: RGB, uint8, shape ``(B, 3, H, W)``, on the teacher's device. The teacher owns everything that
                follows: resize, crop, mean and standard deviation.

        Returns:
            Fresh tensors, as they may be stored while the next batch is computed: ``patches`` of shape
            ``(B, spec.grid_hw[0] * spec.grid_hw[1], spec.channels)``, row by row, and ``cls`` of shape
            ``(B, spec.channels)`` if ``spec.has_cls``.
        """

    def decode(self, patches: Tensor, images: Tensor) -> Decoded | None:
        """Turns features into something that a person can look at. A plugin need not implement it.

        The features are the teacher's own or a student's translation of them. The result must come from the features
        alone: the images only give its size and what it is laid over.

        Args:
            patches: Features as :meth:`forward` gives them, float32, shape ``(B, N, C)``, on the teacher's device.
            images: Images that the features belong to, RGB, uint8, shape ``(B, 3, H, W)``.

        Returns:
            Depth, masks or pictures, at any resolution that is the same for all images of one size. Depth must be
            finite. Masks are resized to the images by nearest neighbours. By default ``None``: the features are then
            shown as the colours of their principal components.
        """
        return None


@contextmanager
def random_weights(teacher: str) -> Iterator[None]:
    """Draws the weights of everything built inside the block from a fixed seed, and warns of it.

    Random weights are for tests and for showing that a pipeline works. They must be the same in every process and in
    every run, and must leave the caller's random state alone.

    Args:
        teacher: Name of the teacher, for the warning.
    """
    logger.warning("Teacher %r has random weights (seed %d): its features carry no knowledge.", teacher, RANDOM_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)  # torch.manual_seed would reseed the devices too
        yield


def check_features(spec: TeacherSpec, features: TeacherFeatures, batch_size: int) -> None:
    """Checks that features have the shapes that the spec promises.

    Args:
        spec: Spec of the teacher that gave the features.
        features: Features that the teacher gave.
        batch_size: Number of images in the batch.

    Raises:
        FeatureError: If a shape or type differs, or a CLS token is missing or was not announced.
    """
    height, width = spec.grid_hw
    wanted = (batch_size, height * width, spec.channels)
    if tuple(features.patches.shape) != wanted or not features.patches.is_floating_point():
        raise FeatureError(
            f"Teacher {spec.name!r} gave patches of shape {tuple(features.patches.shape)} and type "
            f"{features.patches.dtype}; its spec says {wanted}, floating point. Correct its spec or its forward()."
        )
    cls = None if features.cls is None else tuple(features.cls.shape)
    wanted_cls = (batch_size, spec.channels) if spec.has_cls else None
    if cls != wanted_cls:
        raise FeatureError(
            f"Teacher {spec.name!r} gave a CLS token of shape {cls}; its spec (has_cls={spec.has_cls}) says "
            f"{wanted_cls}. Correct its spec or its forward()."
        )


def check_decoded(spec: TeacherSpec, decoded: Decoded | None, batch_size: int) -> None:
    """Checks the type, shape and values of the result of :meth:`Teacher.decode`.

    Args:
        spec: Spec of the teacher.
        decoded: Result of :meth:`Teacher.decode`.
        batch_size: Number of images that the teacher was given.

    Raises:
        FeatureError: If the result has a wrong type, shape or length, is empty, or is depth that is not finite.
    """
    match decoded:
        case None:
            return
        case Depth(maps):
            fits = maps.ndim == 3 and len(maps) == batch_size and maps.is_floating_point() and maps.numel() > 0
            if fits and not maps.isfinite().all():
                raise FeatureError(
                    f"Teacher {spec.name!r} decoded features to depth that is not finite (NaN or infinity). Correct "
                    "its decode(), or its weights."
                )
        case Pictures(pixels):
            fits = (
                pixels.ndim == 4
                and (len(pixels), pixels.shape[3]) == (batch_size, 3)
                and pixels.dtype == torch.uint8
                and pixels.numel() > 0
            )
        case Masks(masks, scores):
            fits = len(masks) == len(scores) == batch_size and all(
                each.ndim == 3 and each.dtype == torch.bool and of.shape == each.shape[:1] and 0 not in each.shape[1:]
                for each, of in zip(masks, scores, strict=True)
            )
        case _:
            fits = False  # type: ignore[unreachable]  # plugins may return anything
    if not fits:
        raise FeatureError(
            f"Teacher {spec.name!r} decoded {batch_size} image(s) to something that is neither Depth, Masks nor "
            "Pictures of them, as theia.types says what those are. Correct its decode()."
        )
