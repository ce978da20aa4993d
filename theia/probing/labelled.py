"""Images of known classes in folders."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theia.errors import ConfigError, ImageError
from theia.extraction.images import UnreadableImageError, to_square
from theia.extraction.sources import FolderSource, ImageSource, open_source
from theia.probing.datasets import IMAGE_SIZE, header
from theia.utils.progress import Progress

_BATCH_SIZE = 32
_HELD_OUT = 5  # every fifth image of a class
_MAX_THREADS = 8
_HEADERS = 1024  # at a time


@dataclass(frozen=True)
class Labelled:
    """Some images of a source.

    Attributes:
        source: Where the images come from.
        places: Indices of the images in the source.
        labels: Class index of each image, shape ``(n,)``.
        classes: Names of the classes, by index.
    """

    source: ImageSource
    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.places)

    def batches(self) -> Iterator[Tensor]:
        """Decoded images, uint8, shape ``(B, 3, 224, 224)``, in order.

        Raises:
            ImageError: If an image cannot be read. The message names it.
        """
        # Pillow lets go of the interpreter's lock while it decodes and resizes.
        with _threads() as pool:
            for start in range(0, len(self), _BATCH_SIZE):
                images = list(pool.map(self._decode, self.places[start : start + _BATCH_SIZE]))
                yield torch.from_numpy(np.stack(images))

    def some(self, count: int) -> NDArray[np.uint8]:
        """A few images, spread evenly over all of them, shape ``(count, 3, 224, 224)``; at most all."""
        spread = np.unique(np.linspace(0, len(self) - 1, count).round().astype(int))
        return np.stack([self._decode(place) for place in self.places[spread]])

    def _decode(self, place: np.int64) -> NDArray[np.uint8]:
        try:
            return to_square(self.source.read(int(place)), IMAGE_SIZE, "squash")
        except UnreadableImageError as error:
            raise ImageError(f"Image {self.source.ids[int(place)]} {error}. Remove or replace it.") from error


def open_labelled(images: str, val: str | None, neighbours: int) -> tuple[Labelled, Labelled]:
    """Training and held-out images. Headers of files in folders are read, so that few are missed after hours of work.

    Args:
        images: A folder whose sub-folders are the classes.
        val: Folder of held-out images with the same sub-folders; every fifth image of each class of ``images`` by
            default.
        neighbours: Smallest number of training images.

    Returns:
        Training images, held-out images; classes are numbered alike.

    Raises:
        ImageError: If there is no such folder, no image, or no class folder, or a file in a folder is no image.
        ConfigError: If there are less than two classes, a class has no image, held-out images are of a class that
            training has not, or there are fewer training images than neighbours.
    """
    source = open_source(images, "train", labels=True)
    labels, classes = _labels(source)
    _check_classes(labels, classes, images, least=1 if val else 2)
    if val is None:
        held_out = _every_fifth(labels, len(classes))
        training, testing = (
            Labelled(source, places, labels[places], classes)
            for places in (np.flatnonzero(~held_out), np.flatnonzero(held_out))
        )
    else:
        training = Labelled(source, np.arange(len(labels)), labels, classes)
        testing = _of_the_same_classes(val, classes)
    if len(training) < neighbours:
        raise ConfigError(
            f"{images} has {len(training)} training images, fewer than the {neighbours} neighbours that vote. "
            "Give more images, or --neighbours."
        )
    for root, found in ((images, source), (val, testing.source)):
        # One source need not be looked at twice; members of tar files cannot be without reading them.
        if root is not None and isinstance(found, FolderSource):
            _check_headers(Path(root), found.ids)
    return training, testing


def _check_headers(root: Path, names: Sequence[str]) -> None:
    with _threads() as pool, Progress("reading headers", len(names)) as progress:
        # Not all at once: a pool holds a kilobyte for each call that waits.
        for start in range(0, len(names), _HEADERS):
            part = names[start : start + _HEADERS]
            progress.advance(len(list(pool.map(lambda name: header(root / name), part))))


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))


def _labels(source: ImageSource) -> tuple[NDArray[np.int64], list[str]]:
    labels = np.array(source.labels, np.int64)
    # Tar files number their classes without names.
    return labels, source.classes or [str(number) for number in range(labels.max() + 1)]


def _check_classes(labels: NDArray[np.int64], classes: list[str], images: str, least: int) -> None:
    if len(classes) < 2:
        raise ConfigError(f"{images} has one class folder, {classes[0]}; there must be two or more to tell apart.")
    for name, count in zip(classes, np.bincount(labels, minlength=len(classes)), strict=True):
        if count < least:
            raise ConfigError(
                f"Class {name} of {images} has {count} images, and needs {least}"
                + (": one of them is held out. Give more, or held-out images with --val." if least > 1 else ".")
            )


def _every_fifth(labels: NDArray[np.int64], classes: int) -> NDArray[np.bool_]:
    """The last of every five images of a class, at least one."""
    held_out = np.zeros(len(labels), bool)
    for label in range(classes):
        places = np.flatnonzero(labels == label)
        held_out[places[_HELD_OUT - 1 :: _HELD_OUT] if len(places) >= _HELD_OUT else places[-1:]] = True
    return held_out


def _of_the_same_classes(val: str, classes: list[str]) -> Labelled:
    source = open_source(val, "val", labels=True)
    labels, names = _labels(source)
    unknown = [names[label] for label in np.unique(labels) if names[label] not in classes]
    if unknown:
        raise ConfigError(f"{val} has class {unknown[0]}, which --images has not. Both need the same class folders.")
    numbers = np.array([classes.index(name) if name in classes else -1 for name in names])
    return Labelled(source, np.arange(len(labels)), numbers[labels], classes)
