"""What storing features costs: ``theia extract`` against a plain loop over the same teacher, and against the bare disk.

Against a plain loop, the teacher is a transformer with random weights, three blocks of ViT-B: it computes less for a
stored byte than any of the built-in transformers, which makes the comparison harder. Both sides build the teacher and
run it over the same batches; the plain loop has its images in memory and drops what it computes.

Against the bare disk, the teachers cost nothing: they give the same numbers for every batch. The disk writes as many
bytes, in files as large, each of them synced; it neither converts nor checks anything.
"""

import importlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.throughput.measure import Cost, Measure, ParityError, Result, Settings, interleave, ratios
from theia import registry
from theia.extraction.config import ExtractConfig
from theia.extraction.pipeline import extract
from theia.store.reader import FeatureStore
from theia.types import TeacherFeatures

_TEACHER = "vit"
_BLOCKS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 3, "num_attention_heads": 12}
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

# Images, and images per shard, of each teacher that costs nothing: about 0.8 and 1 GB in four shards.
_FREE = {"free_vit": (2000, 500), "free_sam": (500, 125)}
_BLOCK_BYTES = 1 << 20

_FREE_TEACHERS = '''
import torch

from theia.teacher import Teacher
from theia.types import TeacherFeatures, TeacherSpec


class FreeViT(Teacher):
    """The shapes of ViT-B at 224 pixels, without the work."""

    spec = TeacherSpec(name="free_vit", channels=768, grid_hw=(16, 16), licence="MIT", weights="none", has_cls=True)

    def __init__(self):
        super().__init__()
        tokens = torch.randn(64, 257, 768, generator=torch.Generator().manual_seed(0))
        self.register_buffer("tokens", tokens, persistent=False)

    def forward(self, images):
        tokens = self.tokens[: len(images)]
        return TeacherFeatures(tokens[:, 1:], tokens[:, 0])


class FreeSAM(Teacher):
    """The shapes of SAM, without the work: like SAM's, the features lie in memory channel by channel."""

    spec = TeacherSpec(name="free_sam", channels=256, grid_hw=(64, 64), licence="MIT", weights="none")

    def __init__(self):
        super().__init__()
        maps = torch.randn(16, 256, 64, 64, generator=torch.Generator().manual_seed(0))
        self.register_buffer("maps", maps, persistent=False)

    def forward(self, images):
        return TeacherFeatures(self.maps[: len(images)].flatten(2).transpose(1, 2))
'''


def run(settings: Settings) -> Result:
    """Runs the suite.

    Args:
        settings: How much to measure.

    Returns:
        Images per second of the extraction in units of the plain loop's and of the bare disk's, by the clock, and the
        same for CPU time.

    Raises:
        ParityError: If the stored features are not the teacher's, rounded to float16.
    """
    against_loop, loop_details = _against_plain_loop(settings)
    against_disk, disk_details = _against_disk(settings)
    return Result(
        measures=[*against_loop, *against_disk],
        details={**loop_details, "bare_disk": disk_details},
        notes=[
            "Plain loop: both build the teacher; images are stored already. Stored features equal the plain loop's.",
            "Disk: as many bytes in files as large, written in blocks of 1 MB and synced, nothing else; into the page "
            "cache first, as the extraction.",
        ],
    )


def _against_plain_loop(settings: Settings) -> tuple[list[Measure], dict[str, Any]]:
    architecture = _SMALL if settings.small else _BLOCKS
    count, batch_size = (6, 2) if settings.small else (48, 16)
    options: dict[str, Any] = {"weights": "random", "architecture": architecture}
    store = settings.folder / "extraction"
    config = ExtractConfig(
        images=f"sample:{count}",
        teachers=_TEACHER,
        store=store,
        batch_size=batch_size,
        shard_size=2 * batch_size,
        accelerator="cpu",
        devices=1,
        teacher_options={_TEACHER: options},
    )
    extract(config)  # decodes and stores the images, which later runs find
    images = _stored(store, "image")

    def plain() -> Iterator[TeacherFeatures]:
        teacher = registry.create(_TEACHER, options)
        for start in range(0, count, batch_size):
            with torch.inference_mode():
                yield teacher(torch.from_numpy(images[start : start + batch_size]))

    def drop() -> None:
        for _ in plain():
            pass

    def again() -> None:
        # What a user does to have a teacher's features made anew.
        shutil.rmtree(store / "train" / _TEACHER)
        extract(config)

    costs = interleave({"plain loop": drop, "theia extract": again}, settings.pairs)
    _check(store, _TEACHER, list(plain()))
    measures = [
        Measure(
            "theia extract against a plain loop, images/s",
            ratios(costs, "plain loop", "theia extract", "wall_s"),
            aim=0.97,
        ),
        Measure("the same, CPU time", ratios(costs, "plain loop", "theia extract", "cpu_s")),
    ]
    return measures, {
        "images": count,
        "batch_size": batch_size,
        "architecture": architecture,
        "plain_ms_per_image": [1e3 * cost.wall_s / count for cost in costs["plain loop"]],
        "costs": _plain(costs),
    }


def _against_disk(settings: Settings) -> tuple[list[Measure], dict[str, Any]]:
    measures, details = [], {}
    with _free_teachers(settings.folder / "site"):
        for name, (count, shard_size) in _FREE.items():
            if settings.small:
                count, shard_size = 6, 3
            costs, stored_bytes = _free(settings, name, count, shard_size)
            measures += [
                Measure(
                    f"theia extract of {name}, which computes nothing, against the bare disk, bytes/s",
                    ratios(costs, "disk", "theia extract", "wall_s"),
                    aim=0.8,
                ),
                Measure(
                    "CPU time of an image",
                    [1e3 * cost.cpu_s / count for cost in costs["theia extract"]],
                    unit="ms",
                ),
            ]
            details[name] = {
                "images": count,
                "shard_size": shard_size,
                "bytes": stored_bytes,
                "disk_GB_per_s": [stored_bytes / cost.wall_s / 1e9 for cost in costs["disk"]],
                "costs": _plain(costs),
            }
    return measures, details


def _free(settings: Settings, name: str, count: int, shard_size: int) -> tuple[dict[str, list[Cost]], int]:
    store, raw = settings.folder / name, settings.folder / "raw"
    config = ExtractConfig(
        images=f"sample:{count}",
        teachers=name,
        store=store,
        batch_size=min(16, shard_size),
        shard_size=shard_size,
        accelerator="cpu",
        devices=1,
    )
    extract(config)
    features = store / "train" / name
    sizes = [path.stat().st_size for path in sorted(features.glob("*.h5"))]
    block = memoryview(np.random.default_rng(0).bytes(_BLOCK_BYTES))

    def write() -> None:
        raw.mkdir()
        for number, size in enumerate(sizes):
            with (raw / str(number)).open("wb", buffering=0) as file:
                for start in range(0, size, _BLOCK_BYTES):
                    file.write(block[: size - start])
                os.fsync(file.fileno())

    def clear() -> None:
        for folder in (features, raw):
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()

    costs = interleave({"disk": write, "theia extract": lambda: extract(config)}, settings.pairs, clear)
    if not features.exists():  # the disk came last
        extract(config)
    teacher = registry.create(name, None)
    batches = [min(config.batch_size, shard_size - start) for start in range(0, shard_size, config.batch_size)]
    images = [torch.zeros(size, 3, 224, 224, dtype=torch.uint8) for size in batches * (count // shard_size)]
    _check(store, name, [teacher(batch) for batch in images])
    clear()
    return costs, sum(sizes)


@contextmanager
def _free_teachers(site: Path) -> Iterator[None]:
    """Installs the teachers that cost nothing, as anybody's plugins are, for the time of the block."""
    info = site / "free_teachers-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "theia_bench_free.py").write_text(_FREE_TEACHERS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: free-teachers\nVersion: 1.0\n")
    points = "free_vit = theia_bench_free:FreeViT\nfree_sam = theia_bench_free:FreeSAM\n"
    (info / "entry_points.txt").write_text(f"[theia.teachers]\n{points}")
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    registry.find.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        registry.find.cache_clear()


def _plain(costs: Mapping[str, list[Cost]]) -> dict[str, list[dict[str, float]]]:
    return {name: [vars(cost) for cost in values] for name, values in costs.items()}


def _check(store: Path, teacher: str, features: list[TeacherFeatures]) -> None:
    expected = {teacher: torch.cat([batch.patches.half() for batch in features])}
    if features[0].cls is not None:
        expected[f"{teacher}/cls"] = torch.cat([batch.cls.half() for batch in features if batch.cls is not None])
    for name, values in expected.items():
        if not np.array_equal(_stored(store, name), values.numpy()):
            raise ParityError(f"'theia extract' stored another {name!r} than a plain loop over the teacher gives.")


def _stored(store: Path, field: str) -> np.ndarray[Any, Any]:
    split = FeatureStore(store).open_split("train")
    values = split.allocate(len(split))[field]
    split.read_into(np.arange(len(split)), {field: values})
    return values
