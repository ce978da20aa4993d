"""``theia extract`` against a plain loop over the same teacher: what storing the features costs.

The teacher is a transformer with random weights, three blocks of ViT-B: it computes less for a stored byte than any of
the built-in transformers, which makes the comparison harder. Both sides build the teacher and run it over the same
batches; the plain loop has its images in memory and drops what it computes.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.throughput.measure import Measure, ParityError, Result, Settings, interleave, ratios
from theia import registry
from theia.extraction.config import ExtractConfig
from theia.extraction.pipeline import extract
from theia.store.reader import FeatureStore
from theia.types import TeacherFeatures

_TEACHER = "vit"
_BLOCKS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 3, "num_attention_heads": 12}
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def run(settings: Settings) -> Result:
    """Runs the suite.

    Args:
        settings: How much to measure.

    Returns:
        Images per second of the extraction in units of the plain loop's, by the clock, and the same for CPU time.

    Raises:
        ParityError: If the stored features are not the plain loop's, rounded to float16.
    """
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
    _check(store, list(plain()))
    return Result(
        measures=[
            Measure(
                "theia extract against a plain loop, images/s",
                ratios(costs, "plain loop", "theia extract", "wall_s"),
                aim=0.97,
            ),
            Measure("the same, CPU time", ratios(costs, "plain loop", "theia extract", "cpu_s")),
        ],
        details={
            "images": count,
            "batch_size": batch_size,
            "architecture": architecture,
            "plain_ms_per_image": [1e3 * cost.wall_s / count for cost in costs["plain loop"]],
            "costs": {name: [vars(cost) for cost in values] for name, values in costs.items()},
        },
        notes=["Both build the teacher; the images are stored already. Stored features equal the plain loop's."],
    )


def _check(store: Path, features: list[TeacherFeatures]) -> None:
    for name, expected in {
        _TEACHER: torch.cat([batch.patches for batch in features]),
        f"{_TEACHER}/cls": torch.cat([batch.cls for batch in features if batch.cls is not None]),
    }.items():
        if not np.array_equal(_stored(store, name), expected.numpy().astype(np.float16)):
            raise ParityError(f"'theia extract' stored another {name!r} than a plain loop over the teacher gives.")


def _stored(store: Path, field: str) -> np.ndarray[Any, Any]:
    split = FeatureStore(store).open_split("train")
    values = split.allocate(len(split))[field]
    split.read_into(np.arange(len(split)), {field: values})
    return values
