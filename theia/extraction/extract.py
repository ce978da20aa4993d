"""Images + teachers -> feature store: whole shards are kept, whatever happens."""

import logging
import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from lightning.fabric import Fabric

from theia.errors import ConfigError
from theia.extraction.config import ExtractConfig
from theia.extraction.decode import RESIZE_FILTER
from theia.extraction.feature_stage import build_teacher, store_features
from theia.extraction.image_stage import check_skipped, store_images
from theia.extraction.images import ImageSource, open_source
from theia.extraction.plan import check_disk, describe_plan, plan
from theia.extraction.processes import Processes
from theia.models.student import PATCH
from theia.store.schema import ImageSet, hash_ids
from theia.store.writer import SplitWriter
from theia.teacher import Teacher
from theia.types import Json, TeacherSpec
from theia.version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractedSplit:
    """What one split holds after an extraction.

    Attributes:
        name: Name of the split.
        listed: Images in the list.
        skipped: Those that could not be read.
        skipped_list: CSV file with the id and reason of each of them.
    """

    name: str
    listed: int
    skipped: int
    skipped_list: Path


def extract(config: ExtractConfig) -> list[ExtractedSplit] | None:
    """Runs teachers over images and stores what they give.

    Continues where an earlier run with the same options stopped, in units of shards. Several processes and nodes
    share the shards; each loads a teacher only if shards of its own lack that teacher's features.

    Args:
        config: Options.

    Returns:
        One record per split; ``None`` in all processes but the first, which speaks for them.

    Raises:
        ConfigError: If options do not fit together, no student takes images of the size, or the device is not there.
        ImageError: If there are no images, or too many that cannot be read.
        UnknownTeacherError: If a teacher is not installed.
        PluginError: If its plugin is broken.
        WeightsError: If its weights cannot be had.
        FeatureError: If it gives features of a wrong shape, or values that cannot be stored.
        StoreError: If the store disagrees with the options, or the disk is too small or full.
    """
    if config.size % PATCH:
        below = config.size - config.size % PATCH
        nearest = " or ".join(str(size) for size in (below, below + PATCH) if size)
        raise ConfigError(
            f"--size is {config.size}, which does not divide into the student's patches of {PATCH}x{PATCH} pixels: no "
            f"student could be trained on these images. Give {nearest}."
        )
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=config.strategy,
            precision=config.precision,
        )
    # Lightning's MisconfigurationException is a bare Exception.
    except Exception as error:
        raise ConfigError(
            f"Lightning Fabric refuses accelerator={config.accelerator!r}, devices={config.devices!r}, "
            f"num_nodes={config.num_nodes}, strategy={config.strategy!r}, precision={config.precision!r}: {error}"
        ) from error
    splits: list[ExtractedSplit] | None = fabric.launch(partial(_run, config=config))
    return splits


def _run(fabric: Fabric, config: ExtractConfig) -> list[ExtractedSplit] | None:
    processes = Processes(fabric)
    if processes.rank == 0 and config.accelerator == "auto" and fabric.device.type == "cpu":
        logger.warning("No GPU found: the teachers run on the CPU. Large ones take seconds per image there.")
    writers = {split: SplitWriter(config.store, split) for split in config.locations}
    # Listed once, so that all processes divide the same list even while somebody adds files.
    sources = processes.first(
        lambda: {split: open_source(place, split, labels=config.labels) for split, place in config.locations.items()}
    )
    image_sets = {split: _image_set(source, config) for split, source in sources.items()}
    # Built once each before any work: what the last teacher lacks must not come to light after days. Those that are to
    # be in memory together anyway stay there.
    built: dict[str, Teacher] = {}

    def build() -> list[TeacherSpec]:
        specs = []
        for name in config.teacher_names:
            teacher = build_teacher(name, config)
            specs.append(teacher.spec)
            if config.all_at_once or len(config.teacher_names) == 1:
                built[name] = teacher
        return specs

    specs = processes.first(build)
    processes.first(lambda: _begin(fabric, config, writers, image_sets, specs))

    for split, source in sources.items():
        store_images(split, source, image_sets[split], writers[split], config, processes)
    processes.wait()
    processes.first(lambda: _check_skipped(config, writers, image_sets))

    groups = [specs] if config.all_at_once else [[spec] for spec in specs]
    for group in groups:
        store_features(group, built, image_sets, writers, config, processes, fabric)
    processes.wait()
    splits = processes.first(lambda: _finish(config, writers, image_sets))
    return splits if processes.rank == 0 else None


def _begin(
    fabric: Fabric,
    config: ExtractConfig,
    writers: dict[str, SplitWriter],
    image_sets: dict[str, ImageSet],
    specs: list[TeacherSpec],
) -> None:
    cuda = fabric.device.type == "cuda"
    computed: dict[str, Json] = {
        "device": torch.cuda.get_device_name(fabric.device) if cuda else f"cpu ({platform.machine()})",
        "precision": config.precision,
        "batch_size": config.batch_size,
        "theia": __version__,
        "torch": torch.__version__,
    }
    for split, writer in writers.items():
        writer.begin(image_sets[split], specs, config.dtype, computed)
    sets = plan(writers, image_sets, specs, config.dtype, config.labels)
    logger.info("Plan:\n%s", describe_plan(sets, config.store))
    check_disk(sets, config.store)


def _check_skipped(config: ExtractConfig, writers: dict[str, SplitWriter], image_sets: dict[str, ImageSet]) -> None:
    # Each process has seen its own share only.
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


def _image_set(source: ImageSource, config: ExtractConfig) -> ImageSet:
    return ImageSet(
        source={**source.description, "filter": RESIZE_FILTER, "labels": source.labels is not None},
        size=config.size,
        resize=config.resize,
        listed=len(source.ids),
        ids_sha256=hash_ids(source.ids),
        shard_size=config.shard_size,
        classes=None if source.classes is None else tuple(source.classes),
    )
