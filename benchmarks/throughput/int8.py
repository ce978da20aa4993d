"""Features stored as int8 against float16: bytes, time, and what a student learns from them."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.throughput import heavy_tails
from benchmarks.throughput.heavy_tails import Columns, Dtype, targets
from benchmarks.throughput.measure import Measure, ParityError, Result, Settings, interleave, ratios
from theia import registry
from theia.models.backbone import StudentOptions
from theia.models.distiller import Distiller
from theia.models.student import Student
from theia.store.reader import FeatureStore, Split
from theia.store.schema import IMAGE, ImageSet, hash_ids
from theia.store.writer import SplitWriter
from theia.types import TeacherSpec

_DTYPES: tuple[Dtype, ...] = ("float16", "int8")
_TEACHERS = ("clip", "dinov2", "vit")
_BATCH = 16
_SEEDS = (0, 1, 2)


def run(settings: Settings) -> Result:
    """Runs the suite.

    Args:
        settings: How much to measure.

    Returns:
        int8 in units of float16: bytes, CPU time of reading and writing, and the distance of what is learned in units
        of the spread over seeds.

    Raises:
        ParityError: If an int8 store does not give back what was stored to within half a step.
    """
    cost, details = _cost(settings)
    learned, losses, note = _learning(settings)
    return Result(measures=[*cost, learned], details={**details, **losses}, notes=[note])


def _cost(settings: Settings) -> tuple[list[Measure], dict[str, Any]]:
    specs = [registry.find(name).spec for name in _TEACHERS]
    rows = _BATCH if settings.small else 4 * _BATCH
    random = np.random.default_rng(0)
    features = {
        spec.name: random.standard_normal((rows, spec.grid_hw[0] * spec.grid_hw[1], spec.channels), np.float32)
        for spec in specs
    }
    roots = {dtype: settings.folder / f"cost-{dtype}" for dtype in _DTYPES}

    def write(dtype: Dtype) -> None:
        shutil.rmtree(roots[dtype], ignore_errors=True)
        _write(roots[dtype], specs, features, dtype)

    written = interleave({dtype: partial(write, dtype) for dtype in _DTYPES}, settings.pairs)
    splits = {dtype: FeatureStore(root).open_split("train") for dtype, root in roots.items()}
    buffers = {dtype: split.allocate(_BATCH) for dtype, split in splits.items()}
    distillers = {dtype: _untrained(root) for dtype, root in roots.items()}

    def decode(dtype: Dtype) -> None:
        for batch in np.array_split(random.permutation(rows), rows // _BATCH):
            _decode(splits[dtype], distillers[dtype], batch, buffers[dtype])

    _check(splits, distillers, buffers)
    read = interleave({dtype: partial(decode, dtype) for dtype in _DTYPES}, settings.pairs)
    sizes = {dtype: _bytes_per_image(root) for dtype, root in roots.items()}
    measures = [
        Measure("int8 / float16: bytes per image, C+Di+V", [sizes["int8"] / sizes["float16"]], aim=0.52, at_most=True),
        Measure("int8 / float16: read and normalise a batch of 16, CPU time", ratios(read, "int8", "float16", "cpu_s")),
        Measure("int8 / float16: convert and write, CPU time", ratios(written, "int8", "float16", "cpu_s")),
    ]
    per_image = {
        f"{what}_cpu_ms_per_image": {
            dtype: [1e3 * cost.cpu_s / rows for cost in values] for dtype, values in costs.items()
        }
        for what, costs in {"decode": read, "write": written}.items()
    }
    return measures, {"teachers": list(_TEACHERS), "rows": rows, "bytes_per_image": sizes, **per_image}


def _learning(settings: Settings) -> tuple[Measure, dict[str, Any], str]:
    train, held_out, steps = (32, 8, 4) if settings.small else (256, 64, 200)
    stores = heavy_tails.build(settings.folder, train, held_out)
    scores: dict[Dtype, list[dict[str, float]]] = {
        dtype: [heavy_tails.score(heavy_tails.train(stores[dtype], seed, steps), stores["float16"]) for seed in _SEEDS]
        for dtype in _DTYPES
    }
    losses = {dtype: [score["loss"] for score in values] for dtype, values in scores.items()}
    spread = max(losses["float16"]) - min(losses["float16"])
    distance = abs(float(np.mean(losses["int8"]) - np.mean(losses["float16"])))
    shown = {dtype: ", ".join(f"{loss:.4f}" for loss in values) for dtype, values in losses.items()}
    return (
        Measure(
            "int8 against float16: |mean loss - mean loss| / (max - min)", [distance / spread], aim=1, at_most=True
        ),
        {"train": train, "held_out": held_out, "steps": steps, "seeds": list(_SEEDS), "scores": scores},
        f"Heavy-tailed channels, held-out loss after {steps} steps, three seeds, both against float16 features. "
        f"Trained on float16: {shown['float16']}; on int8: {shown['int8']}.",
    )


def _write(root: Path, specs: list[TeacherSpec], features: Columns, dtype: Dtype) -> None:
    rows = len(next(iter(features.values())))
    ids = [f"{row:06d}" for row in range(rows)]
    images = ImageSet(
        source={"kind": "random"}, size=16, resize="squash", listed=rows, ids_sha256=hash_ids(ids), shard_size=rows
    )
    writer = SplitWriter(root, "train")
    writer.begin(images, specs, dtype, {})
    writer.write_images(0, ids, np.zeros((rows, 3, 16, 16), np.uint8), None, [])
    for spec in specs:
        with writer.open_shard(spec.name, 0) as shard:
            for row in range(rows):
                patches = features[spec.name][row : row + 1]
                shard.append(patches, patches[:, 0] if spec.has_cls else None)
    writer.finish()


def _untrained(root: Path) -> Distiller:
    store = FeatureStore(root)
    specs = store.teachers("train")
    shapes = {
        name: {"channels": spec.channels, "grid_hw": spec.grid_hw, "has_cls": False} for name, spec in specs.items()
    }
    distiller = Distiller(Student(StudentOptions(width=3, depth=1, heads=1)), shapes)
    for name in specs:
        statistics = store.statistics(name)
        distiller.set_statistics(name, statistics.mean, statistics.std)
    return distiller


def _decode(split: Split, distiller: Distiller, rows: Any, buffers: Columns) -> dict[str, torch.Tensor]:
    split.read_into(rows, buffers)
    return {name: targets(distiller, name, buffers, slice(len(rows))) for name in split.teachers}


def _check(splits: dict[Dtype, Split], distillers: dict[Dtype, Distiller], buffers: dict[Dtype, Columns]) -> None:
    rows = np.arange(_BATCH)
    decoded = {dtype: _decode(splits[dtype], distillers[dtype], rows, buffers[dtype]) for dtype in _DTYPES}
    for name, expected in decoded["float16"].items():
        # Normal numbers: the range of a channel is below 12, so that half a step is below 6 / 127 / 2.
        worst = float((decoded["int8"][name] - expected).abs().max())
        if worst > 6 / 127 / 2 + 0.01:
            raise ParityError(f"Features of {name!r} stored as int8 are {worst:.3f} standard deviations off.")


def _bytes_per_image(root: Path) -> float:
    sets = FeatureStore(root).manifest.splits["train"].sets
    shards = [shard for name, record in sets.items() if name != IMAGE for shard in record.shards]
    return sum(shard.bytes for shard in shards) / shards[0].rows
