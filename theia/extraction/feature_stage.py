"""The second stage of an extraction: what the teachers see in the stored images."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor

from theia import registry
from theia.errors import ConfigError, PluginError
from theia.extraction.config import ExtractConfig
from theia.extraction.handover import Handover
from theia.extraction.processes import Processes
from theia.extraction.progress import Progress
from theia.store.features import ShardWriter
from theia.store.schema import ImageSet, feature_fields
from theia.store.writer import SplitWriter
from theia.teacher import Teacher, check_features
from theia.types import TeacherFeatures, TeacherSpec


class _HostFeatures(NamedTuple):
    features: TeacherFeatures
    copied: torch.cuda.Event | None  # they are there when it has happened


def store_features(
    specs: Sequence[TeacherSpec],
    built: Mapping[str, Teacher],
    image_sets: Mapping[str, ImageSet],
    writers: Mapping[str, SplitWriter],
    config: ExtractConfig,
    processes: Processes,
    fabric: Fabric,
) -> None:
    """Runs some teachers, held in memory together, over this process's shards that lack them.

    While a teacher computes the features of one batch, those of the one before are stored; there are never more.

    Args:
        specs: What process 0 found these teachers to give.
        built: Those of them that this process has in memory, by name.
        image_sets: By split.
        writers: By split; every image shard is there.
        config: Options.
        processes: The processes that share the work.
        fabric: Device and precision.
    """
    missing: dict[str, dict[int, list[str]]] = {}
    for split, images in image_sets.items():
        lacking = {
            shard: [spec.name for spec in specs if not writers[split].has_shard(spec.name, shard)]
            for shard in processes.mine(images.shard_count)
        }
        missing[split] = {shard: names for shard, names in lacking.items() if names}
    needed = {name for shards in missing.values() for names in shards.values() for name in names}
    teachers = {
        spec.name: (built.get(spec.name) or _load(spec, config, processes)).to(fabric.device)
        for spec in specs
        if spec.name in needed
    }
    for split, shards in missing.items():
        if not shards:
            continue
        total = sum(image_sets[split].listed_in(shard) for shard in shards)
        label = f"{split}: {', '.join(name for name in teachers if any(name in names for names in shards.values()))}"
        with Progress(label, total, shown=processes.rank == 0) as progress, Handover() as storing:
            for shard, names in shards.items():
                chosen = {name: teachers[name] for name in names}
                rows = _store_shard(shard, chosen, writers[split], config, fabric, progress, storing)
                # Images that could not be read are done, too.
                progress.advance(image_sets[split].listed_in(shard) - rows, 0)


def build_teacher(name: str, config: ExtractConfig) -> Teacher:
    """One teacher, with the options that the configuration gives it.

    Raises:
        UnknownTeacherError: If it is not installed.
        PluginError: If its plugin is broken.
        WeightsError: If its weights cannot be had.
    """
    # A plugin that draws weights must draw the same ones in every process and on every resume.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return registry.create(name, config.teacher_options.get(name))


def _load(spec: TeacherSpec, config: ExtractConfig, processes: Processes) -> Teacher:
    teacher = build_teacher(spec.name, config)
    if teacher.spec != spec:
        raise PluginError(
            f"Teacher {spec.name!r} is {teacher.spec} in process {processes.rank}, but {spec} in process 0. "
            "Give all nodes the same weights and the same version of its plugin."
        )
    return teacher


@torch.inference_mode()
def _store_shard(
    shard: int,
    teachers: Mapping[str, Teacher],
    writer: SplitWriter,
    config: ExtractConfig,
    fabric: Fabric,
    progress: Progress,
    storing: Handover,
) -> int:
    images = writer.images(shard)
    rows = images.rows
    row_bytes = sum(
        part.row_bytes for teacher in teachers.values() for part in feature_fields(teacher.spec, config.dtype).values()
    )
    with ExitStack() as opened:
        files = {name: opened.enter_context(writer.open_shard(name, shard)) for name in teachers}
        with storing.done():
            # Batches are cut at the same rows in every run: a batch of another size may round differently.
            for start in range(0, rows, config.batch_size):
                stop = min(start + config.batch_size, rows)
                batch = torch.from_numpy(images.read("data", start, stop)).to(fabric.device)
                for name, teacher in teachers.items():
                    features = _forward(teacher, batch, config, fabric)
                    storing.give(_append, files[name], _to_host(features, fabric.device))
                progress.advance(stop - start, row_bytes * (stop - start))
        # A slow disk takes long to bring a whole shard to rest: the next one's first batch need not wait for it.
        storing.give(opened.pop_all().close)
    return rows


def _forward(teacher: Teacher, images: Tensor, config: ExtractConfig, fabric: Fabric) -> TeacherFeatures:
    try:
        with fabric.autocast():
            features: TeacherFeatures = teacher(images)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"Teacher {teacher.spec.name!r} does not fit into the memory of {fabric.device} with --batch_size "
            f"{config.batch_size}. Give a smaller one; whole shards are kept."
        ) from error
    check_features(teacher.spec, features, len(images))
    return features


def _to_host(features: TeacherFeatures, device: torch.device) -> _HostFeatures:
    # In the type that the teacher gave, which may be narrower: the thread that stores it makes float32 of it.
    cuda = device.type == "cuda"
    patches = features.patches.to("cpu", non_blocking=cuda)
    cls = None if features.cls is None else features.cls.to("cpu", non_blocking=cuda)
    copied = torch.cuda.current_stream(device).record_event() if cuda else None
    return _HostFeatures(TeacherFeatures(patches, cls), copied)


def _append(file: ShardWriter, host: _HostFeatures) -> None:
    if host.copied is not None:
        host.copied.synchronize()
    patches, cls = host.features.patches, host.features.cls
    # Image by image: what the conversions need is small then, and stays in the processor's cache.
    for row in range(len(patches)):
        one = slice(row, row + 1)
        file.append(patches[one].float().numpy(), None if cls is None else cls[one].float().numpy())
