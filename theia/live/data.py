"""Training data without a feature store: images are decoded, and teachers run on them, while the student learns."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn

from theia.data.loader import FeatureLoader, Read
from theia.data.numbered import NumberedData, Part
from theia.data.ring import Samples
from theia.data.sampler import EvaluationSampler, Rows, TrainingSampler, fixed_fraction
from theia.errors import ConfigError, StoreError
from theia.extraction.joined import ChosenSource
from theia.extraction.sources import ImageSource, open_source
from theia.extraction.views import Augmentation
from theia.live.cache import Cache, digest
from theia.live.images import (
    LiveImages,
    ReadableImages,
    check_random_access,
    images_facts,
    pixels_sha256,
)
from theia.live.keeping import Kept
from theia.live.stored import StoredPart, check_mixed
from theia.live.teachers import LiveLoader, LiveTeachers, as_device
from theia.store.reader import Split
from theia.store.schema import Resize, hash_ids, to_plain
from theia.store.statistics import ChannelStatistics
from theia.types import Json, Precision
from theia.utils.arguments import MOST_PIXELS, check_number, comma_list
from theia.utils.files import check_folder
from theia.utils.progress import readable_bytes

logger = logging.getLogger(__name__)

_MOST_WORKERS = 32


class LiveData(NumberedData):
    """Runs the teachers on the images of each training batch, instead of reading features from a store.

    Args:
        images: Where the training images are: a folder, tar files, a list, hf:OWNER/NAME or sample:COUNT, as theia
            extract takes them; a YAML list of several places joins them.
        teachers: Teachers to run, comma-separated or a YAML list.
        teacher_options: Arguments of the teachers' constructors, by teacher: {clip: {weights: random}}. See the options
            of theia extract.
        val_images: Where the images for validation and test are; by default, a share of the training images.
        stored_features: Folder of a feature store that has some of the teachers. They are read from it, as are all
            images; the other teachers run live.
        labels: Whether to read class labels, for the scorer classification.
        size: Height and width of the images that student and teachers see, in pixels.
        resize: Squash the whole image to a square, or cut out its centre.
        batch_size: Samples per training batch over all processes. With accumulated gradients, a step takes several.
        val_batch_size: Samples per batch and process in validation and test.
        workers: Decoding processes per training process; 0 decodes in the training process. By default one for every
            core per training process, up to 32.
        fraction: Share of the training images to use, in (0, 1]; the same images for every seed.
        weights: Number of times that the images of one of several places are drawn in an epoch, by the name that its
            sample ids begin with, such as {robot: 3, imagenet: 0.5}; 1 for the places that are left out.
        seed: Seed for the order of the training images, their augmentation, and what is drawn in a step.
        holdout: Share of the training images to hold out if there are no val_images.
        cache: Folder for what is computed once: features of the held-out images, statistics, images that cannot be
            decoded.
        image_sizes: Heights and widths, comma-separated, of which each training step draws one for the student. The
            teachers see the same views at data.size.
        teachers_per_step: Number of teachers that each training step runs, or reads, and learns from, such as 1; all by
            default. All are drawn equally often.
        statistics_images: Number of training images, chosen at random but always the same, that means and standard
            deviations of the features come from.
        keep: Folder of a feature store that the first epoch fills with what the teachers compute. Later epochs read it.
        check_images: Decode every image once before the first training, and leave out those that cannot be decoded.
        teacher_batch_size: Images per forward pass of a teacher.
        teacher_device: Device of the teachers, such as cuda:1; by default that of the training.
        teacher_precision: Arithmetic of the teachers, as in theia extract.
        augment_crop: Smallest share of the image's area in a random crop; none by default.
        augment_flip: Probability of a horizontal flip.
        augment_jitter: Strength of random changes of colour, from 0 to 1.

    Raises:
        ImageError: If there are no images, or they can only be read in order.
        UnknownTeacherError: If a teacher is not installed.
        WeightsError: If the weights of a teacher cannot be loaded.
    """

    def __init__(
        self,
        images: str | list[str] | None = None,
        teachers: str | list[str] | None = None,
        teacher_options: dict[str, dict[str, Any]] | None = None,
        val_images: str | list[str] | None = None,
        stored_features: str | None = None,
        labels: bool = False,
        size: int = 224,
        resize: Resize = "squash",
        batch_size: int = 128,
        val_batch_size: int = 64,
        workers: int | None = None,
        fraction: float = 1.0,
        weights: dict[str, float] | None = None,
        seed: int = 0,
        holdout: float = 0.01,
        image_sizes: str | list[int] | None = None,
        teachers_per_step: int | None = None,
        cache: str = "stores/live",
        statistics_images: int = 10000,
        keep: str | None = None,
        check_images: bool = True,
        teacher_batch_size: int = 32,
        teacher_device: str | None = None,
        teacher_precision: Precision | Literal["auto"] = "auto",
        augment_crop: float | None = None,
        augment_flip: float = 0.0,
        augment_jitter: float = 0.0,
    ) -> None:
        super().__init__(
            batch_size, val_batch_size, workers, fraction, weights, seed, holdout, image_sizes, teachers_per_step
        )
        check_number("data.size", size, 1, MOST_PIXELS)
        check_number("data.statistics_images", statistics_images, 1)
        check_number("data.teacher_batch_size", teacher_batch_size, 1)
        self.prepare_data_per_node = False  # the cache is on a disk that all nodes share, like the run folder
        self.augmentation = Augmentation(augment_crop, augment_flip, augment_jitter, seed)
        names = comma_list(teachers)
        if not names:
            raise ConfigError("LiveData needs teachers: --data.teachers NAMES. 'theia teachers' lists those installed.")
        self._device = None if teacher_device is None else as_device(teacher_device)
        self._size, self._resize = size, resize
        self._keep = None if keep is None else Path(keep)
        self._kept: Kept | None = None
        unkept = self.augmentation.active or stored_features or fraction < 1 or weights or teachers_per_step
        if keep is not None and unkept:
            raise ConfigError(
                "data.keep stores what all teachers give for each training image once, as it is. Leave out "
                "data.stored_features, data.fraction, data.weights, data.teachers_per_step and augmentation, or leave "
                "out data.keep."
            )
        self._store = None if stored_features is None else StoredPart(stored_features, names)
        if self._store is not None:
            check_mixed(self.augmentation, val_images)
            self._store.check(None if not images else open_source(images, "train"), size, resize)
            self._place = f"the store {stored_features}"
            listed: ImageSource = self._store.images
            self._val_images: ImageSource | None = self._store.val_images
            check_images = False  # they were decoded when they were stored
        elif images:
            self._place = images if isinstance(images, str) else ", ".join(images)
            listed = open_source(images, "train", labels)
            check_random_access(listed.description, self._place)
            self._val_images = None if val_images is None else open_source(val_images, "val", labels)
        else:
            raise ConfigError("LiveData needs images: --data.images PLACE, as theia extract --images takes it.")
        self._statistics_images = statistics_images
        self._cache_folder = Path(cache)
        # Names alone would not tell these images from others that were made anew, or lie elsewhere.
        self._pixels = [pixels_sha256(one) for one in (listed, self._val_images) if one is not None]
        facts = {**images_facts(listed), "pixels": self._pixels[0]}
        record = self._cache_folder / f"images-{digest(facts)[:16]}.json"
        self._images = ReadableImages(listed, self._place, record, check_images)
        self._cache: Cache | None = None
        self._identity: dict[str, Any] | None = None
        self._stored: Split | None = None
        # Teachers are built before any work, as their options may change the shape of their features.
        stored = {} if self._store is None else self._store.specs
        run = [name for name in names if name not in stored]
        self.teachers = LiveTeachers(run, teacher_options or {}, teacher_batch_size, teacher_precision)
        specs = stored | self.teachers.specs
        self.teacher_specs = {name: specs[name] for name in names}

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self._size

    @property
    def origin(self) -> str:
        """The place of the images."""
        return f"the live data of {self._place}"

    @property
    def source(self) -> ImageSource:
        """Training images and, if there are no others, held-out images: all, or those that the check has found good."""
        return self._images.source

    def prepare_data(self) -> None:
        """Checks the images and computes what the cache lacks. Lightning calls it in the first process only.

        Raises:
            ImageError: If too many images cannot be decoded.
            ConfigError: If a teacher does not fit into the memory of its device.
            FeatureError: If a teacher gives features of a wrong shape, or values that cannot be stored.
            StoreError: If the cache cannot be written.
        """
        self._images.check(self._decoding_workers())
        device = self.teacher_device
        logger.info(
            "Teachers run live on %s: %s, %s of weights. Held-out features and statistics: %s",
            device, ", ".join(self.teachers.built), readable_bytes(self.teachers.bytes), self.cache.root,
        )  # fmt: skip
        fitting = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        sample = ChosenSource(self.source, self._sampled().tolist()) if fitting else None
        if kept := self.kept if fitting else None:
            kept.begin(0 if self._val_images is None else len(self._val_images.ids))
        self.cache.fill(
            self._held_out_source(), sample, self.teachers, device, self._size, self._resize, self._decoding_workers()
        )
        if kept:
            kept.take(self.cache, inside=self._val_images is None)

    def setup(self, stage: str) -> None:
        """Checks in every process that the first one has filled the cache.

        Raises:
            StoreError: If this process does not find it.
        """
        if not self.cache.has_held_out:
            raise StoreError(
                f"Process {self.processes()[0]} does not find {self.cache.root}, which process 0 fills before the "
                "others start. If that one has stopped, it says why; otherwise let data.cache be on a disk that all "
                "nodes share, and the images be the same everywhere."
            )
        if stage == "fit" and self.kept is not None:
            self.kept.open()

    @property
    def kept(self) -> Kept | None:
        """What the run keeps of its teachers' features, if it does. It is known once the images were checked."""
        if self._keep is not None and self._kept is None:
            several = self.trainer if self.trainer and self.trainer.world_size > 1 else None
            self._kept = Kept(
                self._keep, self._images, self.teachers, self._size, self._resize, self.teacher_device,
                several, min(self.default_workers(), self._decoding_workers()),
            )  # fmt: skip
        return self._kept

    @property
    def cache(self) -> Cache:
        """The cache of these images and teachers. Where images are checked, it is known once they were."""
        if self._cache is None or not self._images.known:
            facts = {
                "pixels": self._pixels,
                "held_out": images_facts(self._held_out_source()),
                "statistics": images_facts(ChosenSource(self.source, self._sampled().tolist())),
                "size": self._size,
                "resize": self._resize,
                "teachers": {name: self._features(name) for name in self.teachers.built},
            }
            self._cache = Cache(self._cache_folder, facts, list(self.teachers.built))
        return self._cache

    @property
    def teacher_device(self) -> torch.device:
        """Device of the teachers."""
        if self._device is not None:
            return self._device
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def statistics(self) -> dict[str, ChannelStatistics]:
        """Mean and standard deviation of each channel over some training images, without augmentation, by teacher."""
        return self.cache.statistics() | ({} if self._store is None else self._store.statistics())

    def covariances(self) -> dict[str, Any]:
        """Covariances of each teacher's channels over the images that the statistics come from, by teacher."""
        return self.cache.covariances() | ({} if self._store is None else self._store.covariances())

    def check_covariances(self) -> None:
        """See :meth:`NumberedData.check_covariances`. Those of live teachers are measured before the first step."""
        if self._store is not None:
            self._store.covariances()

    def labels_agree(self) -> bool:
        """Whether classes have the same numbers in both parts; logs a warning if not."""
        held_out = self._held_out_source().classes
        if held_out is None or self.source.classes is None or held_out == self.source.classes:
            return True
        logger.warning(
            "Scorers get no labels: data.images and data.val_images number their classes differently (%d and %d "
            "classes). Give both the same folders.", len(self.source.classes), len(held_out),
        )  # fmt: skip
        return False

    def provenance(self) -> dict[str, Any]:
        """The images and the weights of each teacher; builtin types only."""
        return {
            "images": {**self.source.description, "ids_sha256": hash_ids(self.source.ids)},
            **({} if self._store is None else {"stored_features": self._store.store.manifest_sha256}),
            "teachers": self.teacher_origins,
        }

    def check_training(self, world_size: int) -> None:
        """See :meth:`NumberedData.check_training`.

        Raises:
            ConfigError: Also if the cache cannot be written.
        """
        for folder, option in ((self._cache_folder, "--data.cache"), (self._keep, "--data.keep")):
            if folder is not None:
                check_folder(folder, option)
        super().check_training(world_size)

    def check_state(self, state: dict[str, Any]) -> None:
        """See :meth:`NumberedData.check_state`. Where images are yet to be checked, it waits until they are."""
        if self._images.known:
            super().check_state(state)

    def identity(self) -> dict[str, Any]:
        """Digests of the training images, of each teacher's features, and of what is held out; no path."""
        if self._identity is None or not self._images.known:  # a digest of a million ids takes a second
            rounded = {} if self._keep is None else {"dtype": "float16"}  # as a store has them
            features = {name: digest({**self._features(name), **rounded}) for name in self.teacher_specs}
            seen = {"pixels": self._pixels, "size": self._size, "resize": self._resize}
            held_out = None if self._val_images is not None else self.holdout
            self._identity = {
                "images_sha256": digest(
                    {"ids": hash_ids(self.source.ids), "pixels": self._pixels[0], **seen, "held out": held_out}
                ),
                "features": features,
                "held_out": digest(
                    {"ids": hash_ids(self._held_out_source().ids), "pixels": self._pixels, **seen, "features": features}
                ),
            }
        return self._identity

    def all_training_rows(self) -> Rows:
        """All rows, or those that are not held out."""
        rows = len(self.source.ids)
        return np.arange(rows) if self._val_images is not None else self.divided(rows)[0]

    @property
    def training_source(self) -> Mapping[str, Json]:
        """Record of the source of the images."""
        return self.source.description

    def training_ids(self) -> Sequence[str]:
        """Ids of the images."""
        return self.source.ids

    def held_out_rows(self) -> Rows:
        """All rows of the held-out images, or of those that could be decoded once the cache has their features."""
        return np.arange(len(self._held_out() if self.cache.has_held_out else self._held_out_source().ids))

    def loader(
        self,
        part: Part,
        sampler: TrainingSampler | EvaluationSampler,
        device: torch.device | None = None,
        features: bool = True,
    ) -> FeatureLoader:
        """See :meth:`NumberedData.loader`. Training images get features; held-out ones have them in the cache."""
        target = self.copied_to(device)
        if part == "held_out":
            workers = min(self.default_workers(), self._decoding_workers())
            split = self._held_out()
            if self._store is None or not features:
                return self.keep(FeatureLoader(split if features else split.images_only(), sampler, workers, target))
            joined = self._store.joined(split, self._val_images is not None, self.holdout)
            return self.keep(FeatureLoader(joined, sampler, workers, target, joined.read))
        # Only training sees other views: scorers fit to the images as they are.
        augmentation = self.augmentation if isinstance(sampler, TrainingSampler) else None
        workers = self._decoding_workers()
        samples: Samples
        read: Read | None
        if self._store is not None:
            split = self._store.images.split
            samples, read = split if features else split.images_only(), None
        else:
            largest = max(self.image_sizes, default=0) if augmentation and self._keep is None else 0
            samples = images = LiveImages(
                self.source, self._place, self._size, self._resize, augmentation, self._images.record,
                largest,
            )  # fmt: skip
            read = images.read
        if not features:
            return self.keep(FeatureLoader(samples, sampler, workers, target, read))
        teacher_device = device if device is not None and self._device is None else self.teacher_device
        kept = self.kept if isinstance(sampler, TrainingSampler) else None
        loader = LiveLoader(samples, sampler, workers, target, read, self.teachers, teacher_device, kept)
        if self.processes()[0] == 0:
            logger.info(
                "Memory: %s for batches, which %s; teachers' weights take %s on %s.",
                readable_bytes(loader.bytes),
                f"{workers} processes decode into" if workers else "this process decodes into",
                readable_bytes(self.teachers.bytes), teacher_device,
            )  # fmt: skip
        self.keep(loader)
        return loader

    def _close(self) -> None:
        super()._close()
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _features(self, name: str) -> Mapping[str, Any]:
        """What decides a teacher's features."""
        facts = {**to_plain(self.teacher_specs[name]), "licence": None}
        if self._store is not None and name in self._store.names:
            return facts | self._store.features(name)
        return facts | {"precision": self.teachers.wanted}

    def _held_out_source(self) -> ImageSource:
        if self._val_images is not None:
            return self._val_images
        return ChosenSource(self.source, self.divided(len(self.source.ids))[1].tolist())

    def _held_out(self) -> Split:
        if self._stored is None:
            self._stored = self.cache.held_out()
        return self._stored

    def _sampled(self) -> Rows:
        rows = self.all_training_rows()
        return fixed_fraction(rows, min(1.0, self._statistics_images / len(rows)))

    def _decoding_workers(self) -> int:
        return min(self.cores(), _MOST_WORKERS) if self.workers is None else self.workers
