"""Training with live teachers against extracting a feature store and training from it.

Both decode the same JPEG files, run the same teachers and train the same student, a Theia-Tiny in float32. What comes
before the first step and one epoch are timed alone; whole trainings of one and of ten epochs are their sums.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.throughput.measure import Axis, Cost, Measure, ParityError, Result, Settings, interleave
from theia.data.datamodule import FeatureData
from theia.data.numbered import NumberedData
from theia.extraction.config import ExtractConfig
from theia.extraction.pipeline import extract
from theia.extraction.sources import open_source
from theia.live import LiveData
from theia.training.distillation import Distillation

_BATCH = 32
_EPOCHS = (1, 10)
_AXES: tuple[tuple[str, Axis], ...] = (("CPU time", "cpu_s"), ("wall-clock", "wall_s"))
# Handcrafted teachers, and a transformer of ViT-S's shape with random weights.
_VIT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
_TEACHERS: dict[str, dict[str, dict[str, Any]]] = {
    "HOG and color": {"hog": {}, "color": {}},
    "a ViT-S": {"vit": {"weights": "random", "architecture": _VIT}},
}
_STAGES = ("extraction", "epoch from the store", "live passes", "live epoch")


def run(settings: Settings) -> Result:
    """Runs the suite.

    Args:
        settings: How much to measure.

    Returns:
        Cost of extraction and training in units of that of live training, for one epoch and for ten.

    Raises:
        ParityError: If live features are not those that were stored.
    """
    images = (2 if settings.small else 4) * _BATCH
    held_out = images // 16
    for split, count in (("train", images), ("val", held_out)):
        _write_photographs(settings.folder / split, split, count)
    measures, notes, details = [], [], {}
    for name, teachers in _TEACHERS.items():
        if settings.small and "vit" in teachers:
            continue
        costs = interleave(_work(settings, teachers), settings.pairs)
        details[name] = {stage: [vars(cost) for cost in found] for stage, found in costs.items()}
        measures += [
            Measure(f"{name}: store / live, {epochs} epoch{'s' * (epochs > 1)}, {what}", _ratios(costs, epochs, axis))
            for epochs in _EPOCHS
            for what, axis in _AXES
        ]
        for stage in _STAGES[1::2]:
            speeds = [images / cost.wall_s for cost in costs[stage]]
            measures.append(Measure(f"{name}: {stage}", speeds, unit="img/s"))
    notes.append(
        f"{images} training images of 500x375 pixels, {held_out} held out, {held_out} for live statistics; batches of "
        f"{_BATCH}, one worker. A ratio above 1 means that live training costs less."
    )
    return Result(measures, {"images": images, "held_out": held_out, "costs": details}, notes)


def _work(settings: Settings, teachers: dict[str, dict[str, Any]]) -> dict[str, Callable[[], object]]:
    folder = settings.folder
    store, cache = folder / "store", folder / "cache"
    config = ExtractConfig(
        images={split: str(folder / split) for split in ("train", "val")}, teachers=list(teachers), store=store,
        workers=1, all_at_once=True, accelerator="cpu", devices=1, teacher_options=teachers,
    )  # fmt: skip

    def live() -> LiveData:
        return LiveData(
            images=str(folder / "train"), val_images=str(folder / "val"), teachers=list(teachers),
            teacher_options=teachers, batch_size=_BATCH, workers=1, cache=str(cache),
            statistics_images=len(list((folder / "val").iterdir())),
        )  # fmt: skip

    def stored() -> FeatureData:
        return FeatureData(str(store), list(teachers), batch_size=_BATCH, workers=1)

    def extraction() -> None:
        shutil.rmtree(store, ignore_errors=True)
        extract(config)

    def passes() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        live().prepare_data()

    extraction()
    passes()
    _check(stored(), live())
    work = (extraction, partial(_train, stored, settings.small), passes, partial(_train, live, settings.small))
    return dict(zip(_STAGES, work, strict=True))


def _train(make: Callable[[], NumberedData], small: bool) -> None:
    """One epoch of training without validation."""
    data = make()
    if isinstance(data, LiveData):
        data.prepare_data()  # finds everything there
    student = {"width": 16, "depth": 1, "heads": 2} if small else {"backbone": "theia_tiny"}
    model = Distillation(data.teacher_shapes, image_size=data.image_size, compile=False, **student)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, data)


def _check(stored: FeatureData, live: LiveData) -> None:
    live.prepare_data()
    for data in (stored, live):
        data.workers = 0
    for theirs, ours in zip(stored.train_dataloader(), live.train_dataloader(), strict=True):
        if not torch.equal(theirs.images, ours.images):
            raise ParityError("Live images are not those of the store.")
        for name, features in theirs.patches.items():
            # Half a unit in the last place of float16, and what other batches change in float32.
            if not torch.allclose(ours.patches[name], features.float(), rtol=2**-11, atol=1e-4):
                raise ParityError(f"Live features of {name!r} are not those of the store.")


def _ratios(costs: dict[str, list[Cost]], epochs: int, axis: Axis) -> list[float]:
    rounds = zip(*(costs[stage] for stage in _STAGES), strict=True)
    found = [[float(getattr(cost, axis)) for cost in stages] for stages in rounds]
    return [(before + epochs * epoch) / (passes + epochs * live) for before, epoch, passes, live in found]


def _write_photographs(folder: Path, split: str, count: int) -> None:
    """Files of the size that images of ImageNet usually have."""
    folder.mkdir()
    source = open_source(f"sample:{count}", split)
    for index in range(count):
        source.read(index).resize((500, 375)).save(folder / f"{index:05d}.jpg", quality=90)
