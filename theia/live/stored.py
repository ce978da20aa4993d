"""The part of a mixed run that comes from a feature store: images, and the features of those teachers that it has."""

import csv
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from theia.data.sampler import Rows, hold_out
from theia.errors import ConfigError, StoreError
from theia.extraction.sources import ImageSource
from theia.extraction.views import Augmentation
from theia.store import second_moments
from theia.store.reader import FeatureStore, Split
from theia.store.schema import IMAGE, TRAIN, VIEWS, Resize
from theia.store.statistics import ChannelStatistics
from theia.types import Json

_VAL = "val"


class StoredImages:
    """The images of a split, as a source for live teachers. See :class:`theia.extraction.sources.ImageSource`.

    Args:
        split: Split of a store.
        classes: Class names by index, or ``None``.
        description: Record of the source that the store was made of.
    """

    def __init__(self, split: Split, classes: Sequence[str] | None, description: Mapping[str, Json]) -> None:
        self.split = split
        self.ids: Sequence[str] = split.sample_ids()
        self.labels: Sequence[int] | None = None if split.labels is None else split.labels.tolist()
        self.classes = None if classes is None else list(classes)
        self.description: dict[str, Json] = dict(description)

    def read(self, index: int) -> Image.Image:
        """One image, at its stored size; RGB.

        Raises:
            StoreError: If the store cannot be read.
        """
        pixels = np.empty((1, *self.split.fields[IMAGE].shape), np.uint8)
        self.split.read_into(np.array([index]), {IMAGE: pixels})
        return Image.fromarray(pixels[0].transpose(1, 2, 0))


class StoredPart:
    """A feature store that has some of the teachers.

    Args:
        root: Folder of the store.
        names: Names of all teachers of the run.

    Attributes:
        names: Names of those teachers whose features are read.
        images: Images of the split ``train``.
        val_images: Images of the split ``val``; ``None`` if the store has no such split.

    Raises:
        StoreError: If there is no store, or a part of it is missing or damaged.
        ConfigError: If the store has none of the teachers, or all.
    """

    def __init__(self, root: str, names: Sequence[str]) -> None:
        self.store = FeatureStore(root)
        there = self.store.teachers(TRAIN)
        self.names = [name for name in names if name in there]
        if not self.names:
            raise ConfigError(
                f"The store {root} has none of the teachers {', '.join(names)}; it has {', '.join(there) or 'none'}. "
                "Leave out data.stored_features: all of them run live then."
            )
        if len(self.names) == len(names):
            raise ConfigError(
                f"The store {root} has all of the teachers {', '.join(names)}, so none would run live. Train from it: "
                "--data FeatureData --data.store."
            )
        self.specs = {name: there[name] for name in self.names}
        self.images = self._images(TRAIN)
        self.val_images = self._images(_VAL) if _VAL in self.store.splits else None

    def check(self, images: ImageSource | None, size: int, resize: Resize) -> None:
        """Refuses a store of other images.

        Args:
            images: Training images that the user names; ``None`` if none are named.
            size: Height and width of the images that the user asks for, in pixels.
            resize: Way to bring an image to that size.

        Raises:
            ConfigError: If the store's images have another size.
            StoreError: If the store has other images. The message names the first sample that differs.
        """
        record = self.store.manifest.splits[TRAIN].images
        if (record.size, record.resize) != (size, resize):
            raise ConfigError(
                f"The images of the store {self.store.root} are of {record.size} pixels ({record.resize}), not {size} "
                f"({resize}). Give --data.size {record.size} --data.resize {record.resize}."
            )
        if images is None:
            return
        with (self.store.root / TRAIN / "skipped.csv").open(
            newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            skipped = {row["id"] for row in csv.DictReader(file)}
        listed = [sample for sample in images.ids if sample not in skipped]
        pairs = enumerate(zip_longest(listed, self.images.ids))
        row, (wanted, found) = next(((row, pair) for row, pair in pairs if pair[0] != pair[1]), (0, (None, None)))
        if wanted == found:
            return
        raise StoreError(
            f"The images of data.images are not those of the store {self.store.root}: at row {row}, {wanted!r} is in "
            f"the list and {found!r} in the store. Give the images that the store was made of, or leave out "
            "data.images: they are read from the store."
        )

    def covariances(self) -> dict[str, Any]:
        """Covariances of the channels of the teachers that are read, by teacher.

        Raises:
            StoreError: If they have not been measured.
        """
        return {name: second_moments.load(self.store, name).covariance for name in self.names}

    def statistics(self) -> dict[str, ChannelStatistics]:
        """Statistics of the stored features, by teacher.

        Raises:
            StoreError: If they are missing or damaged.
        """
        return {name: self.store.statistics(name) for name in self.names}

    def features(self, name: str) -> dict[str, Any]:
        """What tells a teacher's stored features from others of the same spec."""
        record = self.store.manifest.splits[TRAIN].sets[name]
        return {"dtype": record.dtype, "basis": None if record.basis is None else record.basis.sha256}

    def _images(self, split: str) -> StoredImages:
        record = self.store.manifest.splits[split].images
        return StoredImages(self.store.open_split(split, self.names), record.classes, record.source)

    def joined(self, cached: Split, given: bool, holdout: float) -> "Joined":
        """Held-out samples with the features of all teachers.

        Args:
            cached: Images, and the features of the live teachers.
            given: Whether the store has a split of held-out images.
            holdout: Share of the training images that is held out otherwise.
        """
        source = self.val_images or self.images
        count, ids = len(source.ids), source.ids if VIEWS in source.description else None
        return Joined(cached, source.split, np.arange(count) if given else hold_out(count, holdout, ids)[1])


class Joined:
    """Held-out samples whose features lie in two places. See :class:`theia.data.ring.Samples`.

    Args:
        cached: Images, and the features of the live teachers.
        stored: Split of the store with the features of the others.
        rows: Row in ``stored`` of each row in ``cached``, int64.
    """

    def __init__(self, cached: Split, stored: Split, rows: Rows) -> None:
        self.fields = {**stored.fields, **cached.fields}
        self.teachers = [*stored.teachers, *cached.teachers]
        self.bases = stored.bases  # the cache keeps all channels
        self.labels = cached.labels
        self.folder = f"{cached.folder} and {stored.folder}"
        self._cached, self._stored, self._rows = cached, stored, rows

    def read(self, rows: Rows, arrays: Mapping[str, NDArray[Any]], _: int) -> None:
        """Reads samples into a slot.

        Raises:
            StoreError: If a file cannot be read.
        """
        self._cached.read_into(rows, {name: arrays[name] for name in self._cached.fields})
        others = self._stored.fields.keys() - self._cached.fields.keys()
        self._stored.read_into(self._rows[rows], {name: arrays[name] for name in others})


def check_mixed(augmentation: Augmentation, val_images: object) -> None:
    """Refuses what does not go together with stored features.

    Args:
        augmentation: Random views of the images.
        val_images: Place of the images for validation and test, if the user gives one.

    Raises:
        ConfigError: If there is any.
    """
    if augmentation.active:
        raise ConfigError(
            "data.stored_features and augmentation do not go together: stored features are of the images as they are. "
            "Leave out one of the two."
        )
    if val_images is not None:
        raise ConfigError(
            "data.stored_features and data.val_images do not go together: the store's split val is held out, or a "
            "share of its training images. Leave out data.val_images."
        )
