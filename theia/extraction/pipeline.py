"""An extraction from its options to a finished store: what is to be done, whether it fits, and in which order."""

import logging
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from lightning.fabric import Fabric
from tabulate import tabulate

from theia.errors import ConfigError, StoreError
from theia.extraction.basis import choose_bases
from theia.extraction.computing import choose
from theia.extraction.config import ExtractConfig
from theia.extraction.images import RESIZE_FILTER
from theia.extraction.joined import ChosenSource
from theia.extraction.processes import Processes
from theia.extraction.sources import ImageSource, has_recordings, open_source
from theia.extraction.stages import build_teacher, check_skipped, store_features, store_images
from theia.extraction.user_files import EARLY_ENDINGS
from theia.extraction.views import ViewedSource
from theia.models.backbone import PATCHES
from theia.store.components import Basis
from theia.store.manifest import read_manifest
from theia.store.schema import IMAGE, MANIFEST, TRAIN, FeatureDtype, ImageSet, feature_fields, hash_ids, image_fields
from theia.store.writer import SplitWriter
from theia.teacher import Teacher
from theia.types import Json, Precision, TeacherSpec
from theia.utils.progress import readable_bytes
from theia.version import __version__

logger = logging.getLogger(__name__)

# Allows for keys, checksums and alignment, which the planned sizes leave out.
_OVERHEAD = 1.01


@dataclass(frozen=True)
class ExtractedSplit:
    """Result of an extraction for one split.

    Attributes:
        name: Name of the split.
        listed: Number of images in the list.
        skipped: Number of images that could not be read.
        skipped_list: CSV file with the id of each skipped image and the reason.
    """

    name: str
    listed: int
    skipped: int
    skipped_list: Path


def extract(config: ExtractConfig) -> list[ExtractedSplit] | None:
    """Runs teachers over images and stores their features.

    Continues where an earlier run with the same options stopped, in units of shards. Several processes and nodes share
    the shards; each process loads a teacher only if some of its own shards lack that teacher's features.

    Args:
        config: Options of the extraction.

    Returns:
        One record per split in the first process; ``None`` in all others.

    Raises:
        ConfigError: If options do not fit together, no student takes images of this size, or the device is not
            available.
        ImageError: If there are no images, or too many that cannot be read.
        UnknownTeacherError: If a teacher is not installed.
        PluginError: If the plugin of a teacher is broken.
        WeightsError: If the weights of a teacher cannot be loaded.
        FeatureError: If a teacher gives features of a wrong shape, or values that cannot be stored.
        StoreError: If the store disagrees with the options, or the disk is too small or full.
    """
    if all(config.size % patch for patch in PATCHES):
        usual = PATCHES[0]
        below = config.size - config.size % usual
        nearest = " or ".join(str(size) for size in (below, below + usual) if size)
        raise ConfigError(
            f"--size is {config.size}, which does not divide into patches of {usual}x{usual} pixels: no usual student "
            f"could be trained on these images. Give {nearest}."
        )
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=config.strategy,
        )
    # Lightning's MisconfigurationException is a bare Exception.
    except Exception as error:
        raise ConfigError(
            f"Lightning Fabric refuses accelerator={config.accelerator!r}, devices={config.devices!r}, "
            f"num_nodes={config.num_nodes}, strategy={config.strategy!r}: {error}"
        ) from error
    splits: list[ExtractedSplit] | None = fabric.launch(partial(_run, config=config))
    return splits


def _run(fabric: Fabric, config: ExtractConfig) -> list[ExtractedSplit] | None:
    processes = Processes(fabric)
    recorded = any(has_recordings(places) for places in config.locations.values())

    def open_split(split: str, places: str | Sequence[str]) -> ImageSource:
        # Every k-th frame is for recordings; a split without any is taken whole beside one that has some.
        every = 1 if recorded and not has_recordings(places) else config.every
        source = _as_begun(open_source(places, split, config.labels, every), split, config)
        viewed = config.views > 1 and split == TRAIN
        return ViewedSource(source, config.views, config.size, config.resize) if viewed else source

    # Listed once, so that all processes divide the same list even while somebody adds files.
    sources = processes.first(lambda: {split: open_split(split, places) for split, places in config.locations.items()})
    return run(sources, {}, config, processes)


def run(
    sources: Mapping[str, ImageSource], built: Mapping[str, Teacher], config: ExtractConfig, processes: Processes
) -> list[ExtractedSplit] | None:
    """Stores the features of images that were opened already. See :func:`extract`.

    Args:
        sources: Images of each split, by split.
        built: Teachers that are in memory already, by name.
        config: Options of the extraction.
        processes: The processes that share the work, and their devices.
    """
    writers = {split: SplitWriter(config.store, split) for split in sources}
    image_sets = {split: image_set(source, config) for split, source in sources.items()}
    # Each teacher is built once before any work, so that a problem of the last one does not come to light after days.
    # Teachers that are to be in memory together anyway stay there.
    built = dict(built)

    def build() -> tuple[list[TeacherSpec], dict[str, Precision]]:
        specs, on_gpu, slow = [], {}, []
        for name in config.teacher_names:
            teacher = built.get(name) or build_teacher(name, config.teacher_options.get(name))
            specs.append(teacher.spec)
            on_gpu[name] = teacher.gpu_precision
            if teacher.state_dict():  # a handcrafted teacher has no weights, and no use for a GPU
                slow.append(name)
            if config.all_at_once or len(config.teacher_names) == 1:
                built[name] = teacher
        if slow and config.accelerator == "auto" and processes.device.type == "cpu":
            logger.warning("No GPU found: %s run on the CPU. Large teachers take seconds per image.", ", ".join(slow))
        return specs, on_gpu

    specs, on_gpu = processes.first(build)
    precisions = processes.first(
        lambda: _begin(processes.device, config, writers, sources, image_sets, specs, built, on_gpu)
    )

    for split, source in sources.items():
        store_images(split, source, image_sets[split], writers[split], config, processes)
    processes.wait()
    processes.first(lambda: _check_skipped(config, writers, image_sets))

    groups = [specs] if config.all_at_once else [[spec] for spec in specs]
    for group in groups:
        store_features(group, built, image_sets, writers, precisions, config, processes)
    processes.wait()
    splits = processes.first(lambda: _finish(config, writers, image_sets))
    return splits if processes.rank == 0 else None


def _begin(
    device: torch.device,
    config: ExtractConfig,
    writers: dict[str, SplitWriter],
    sources: Mapping[str, ImageSource],
    image_sets: dict[str, ImageSet],
    specs: list[TeacherSpec],
    built: Mapping[str, Teacher],
    on_gpu: dict[str, Precision],
) -> dict[str, dict[str, Precision]]:
    """Announces all splits; returns the precision of each teacher, by split and teacher."""
    precisions = {
        split: {
            name: choose(config.precision, _begun_precision(writer, name), device.type == "cuda", wish)
            for name, wish in on_gpu.items()
        }
        for split, writer in writers.items()
    }
    computed = how_computed(device, config.batch_size)
    bases = choose_bases(device, config, writers, sources, specs, built, precisions)
    for split, writer in writers.items():
        writer.begin(image_sets[split], specs, config.dtype, computed, precisions[split], bases)
    sets = plan(writers, image_sets, specs, config.dtype, config.labels, bases)
    logger.info("Plan:\n%s", describe_plan(sets, config.store))
    check_disk(sets, config.store)
    for split, chosen in precisions.items():
        if lower := [f"{name} {precision}" for name, precision in chosen.items() if precision != "32-true"]:
            logger.info("Precision of the teachers / %r: %s.", split, ", ".join(lower))
    return precisions


def _begun_precision(writer: SplitWriter, name: str) -> str | None:
    begun = writer.begun(name)
    found = None if begun is None else begun.computed.get("precision")
    return found if isinstance(found, str) else None


def _check_skipped(config: ExtractConfig, writers: dict[str, SplitWriter], image_sets: dict[str, ImageSet]) -> None:
    # Each process has seen only its own share.
    for split, writer in writers.items():
        check_skipped(split, writer.skipped(), image_sets[split], config.max_skipped)


def _finish(
    config: ExtractConfig, writers: dict[str, SplitWriter], image_sets: dict[str, ImageSet]
) -> list[ExtractedSplit]:
    for writer in writers.values():
        writer.finish()
    return [
        ExtractedSplit(split, image_sets[split].listed, len(writer.skipped()), config.store / split / "skipped.csv")
        for split, writer in writers.items()
    ]


def _as_begun(source: ImageSource, split: str, config: ExtractConfig) -> ImageSource:
    """The images that a split was begun with, if it was begun when fewer endings of files counted as images."""
    record = read_manifest(config.store).splits.get(split) if (config.store / MANIFEST).exists() else None
    if record is None or record.images.listed >= len(source.ids):
        return source
    early = [place for place, name in enumerate(source.ids) if name.lower().endswith(EARLY_ENDINGS)]
    if hash_ids([source.ids[place] for place in early]) != record.images.ids_sha256:
        return source
    logger.warning(
        "%d images of split %r are left out: their endings did not count as images when it was begun.",
        len(source.ids) - len(early), split,
    )  # fmt: skip
    return ChosenSource(source, early)


def how_computed(device: torch.device, batch_size: int) -> dict[str, Json]:
    """Record of how features are computed, apart from the precision.

    Args:
        device: Device of the teachers.
        batch_size: Number of images per forward pass.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "batch_size": batch_size,
        "theia": __version__,
        "torch": torch.__version__,
    }


def image_set(source: ImageSource, config: ExtractConfig) -> ImageSet:
    """Record of the images of a split: their list, and how they are brought to their size.

    Args:
        source: All listed images.
        config: Options of the extraction.
    """
    return ImageSet(
        source={**source.description, "filter": RESIZE_FILTER, "labels": source.labels is not None},
        size=config.size,
        resize=config.resize,
        listed=len(source.ids),
        ids_sha256=hash_ids(source.ids),
        shard_size=config.shard_size,
        classes=None if source.classes is None else tuple(source.classes),
    )


@dataclass(frozen=True)
class PlannedSet:
    """Size of one set of files: the images of a split, or one teacher's features for them.

    Attributes:
        split: Name of the split.
        name: ``"image"`` or the name of the teacher.
        shape: Channels and grid, as the table shows them.
        dtype: Type of the stored values, as the table shows it.
        image_bytes: Number of stored bytes per image.
        images: Number of images in the split's list.
        missing: Number of those images whose shards are not there yet.
    """

    split: str
    name: str
    shape: str
    dtype: str
    image_bytes: int
    images: int
    missing: int

    @property
    def missing_bytes(self) -> int:
        """Number of bytes still to write."""
        return self.image_bytes * self.missing


def plan(
    writers: Mapping[str, SplitWriter],
    image_sets: Mapping[str, ImageSet],
    specs: Sequence[TeacherSpec],
    dtype: FeatureDtype,
    labels: bool,
    bases: Mapping[str, Basis] | None = None,
) -> list[PlannedSet]:
    """Computes the size of every set, and how much of it is still missing.

    Args:
        writers: Writers of the splits, by split.
        image_sets: Image sets of the splits, by split.
        specs: Specs of the teachers.
        dtype: Stored type of the features.
        labels: Whether image shards hold labels.
        bases: Bases of the teachers whose features are stored as components, by teacher.
    """
    sets = []
    for split, images in image_sets.items():
        kinds = [(IMAGE, f"3 x {images.size}x{images.size}", "uint8", image_fields(images.size, labels))]
        for spec in specs:
            shape = f"{spec.channels} x {spec.grid_hw[0]}x{spec.grid_hw[1]}" + (" + CLS" if spec.has_cls else "")
            components = bases[spec.name].record.components if bases and spec.name in bases else None
            kept = dtype if components is None else f"{dtype}, {components} components"
            kinds.append((spec.name, shape, kept, feature_fields(spec, dtype, components)))
        for name, shape, stored_as, fields in kinds:
            absent = [shard for shard in range(images.shard_count) if not writers[split].has_shard(name, shard)]
            sets.append(
                PlannedSet(
                    split=split,
                    name=name,
                    shape=shape,
                    dtype=stored_as,
                    image_bytes=sum(field.row_bytes for field in fields.values()),
                    images=images.listed,
                    missing=sum(images.listed_in(shard) for shard in absent),
                )
            )
    return sets


def describe_plan(sets: Sequence[PlannedSet], store: Path) -> str:
    """Formats the plan as a table, with totals and the free space of the disk."""
    rows = [
        (
            part.split,
            part.name,
            part.shape,
            part.dtype,
            readable_bytes(part.image_bytes),
            part.images,
            part.images - part.missing,
            readable_bytes(part.image_bytes * part.images),
        )
        for part in sets
    ]
    headers = ("split", "set", "channels x grid", "stored as", "per image", "images", "already there", "in all")
    total = sum(part.missing_bytes for part in sets)
    return (
        f"{tabulate(rows, headers)}\n"
        f"To write: {readable_bytes(total)}. Free at {store}: {readable_bytes(free_bytes(store))}."
    )


def check_disk(sets: Sequence[PlannedSet], store: Path) -> None:
    """Refuses an extraction that does not fit on the disk.

    Raises:
        StoreError: If the missing shards are larger than the free space.
    """
    needed = int(sum(part.missing_bytes for part in sets) * _OVERHEAD)
    free = free_bytes(store)
    if needed > free:
        raise StoreError(
            f"The features do not fit: {readable_bytes(needed)} are to be written and {store} has "
            f"{readable_bytes(free)} free. Free some space, give another --store, fewer --teachers, or --dtype int8."
        )


def free_bytes(path: Path) -> int:
    """Free space of the disk that holds a path, in bytes. The path need not exist yet."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free
