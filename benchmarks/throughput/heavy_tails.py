"""Features that are hard to store, and what a student learns from them.

Histograms of oriented gradients of photographs, mixed linearly into channels of one standard deviation each. Then the
channels are scaled by log-normal factors, a few by 100, and some are offset by 100 of their standard deviations: what
the largest published teachers give is as extreme.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from theia.extraction.config import ExtractConfig
from theia.extraction.pipeline import extract
from theia.models.backbone import StudentOptions
from theia.models.distiller import Distiller
from theia.models.student import Student
from theia.store.reader import FeatureStore, Split
from theia.store.writer import SplitWriter
from theia.training.losses import FeatureLoss, cosine_loss
from theia.training.optim import build_optimizer, warmup_then_constant
from theia.types import TeacherSpec

Dtype = Literal["float16", "int8"]
Columns = dict[str, NDArray[Any]]

TEACHER = "heavy"
CHANNELS = 96
SCALED_BY_100 = 4
OFFSET_BY_100 = 8  # standard deviations

_SOURCE = "color"
_IMAGE_SIZE = 112  # pixels
_BATCH = 16
_LEARNING_RATE = 2e-3


def build(folder: Path, train: int, held_out: int) -> dict[Dtype, Path]:
    """Stores the same features as float16 and as int8.

    Args:
        folder: Folder for the stores.
        train: Number of training images.
        held_out: Number of held-out images, which are of other photographs.

    Returns:
        Folder of each store, by stored type; each has the splits train and val.
    """
    source = folder / _SOURCE
    extract(
        ExtractConfig(
            images={"train": f"sample:{train}", "val": f"sample:{held_out}"},
            teachers=_SOURCE,
            store=source,
            size=_IMAGE_SIZE,
            accelerator="cpu",
            devices=1,
        )
    )
    stores: dict[Dtype, Path] = {"float16": folder / "float16", "int8": folder / "int8"}
    columns = {split: read(FeatureStore(source).open_split(split)) for split in ("train", "val")}
    tokens = columns["train"][_SOURCE].astype(np.float32).reshape(-1, columns["train"][_SOURCE].shape[-1])
    mixing, bias = _heavy_tails(tokens)
    for split, images in FeatureStore(source).manifest.splits.items():
        features = columns[split][_SOURCE].astype(np.float32) @ mixing + bias
        for dtype, root in stores.items():
            _write(SplitWriter(root, split), SplitWriter(source, split), images.images, features, dtype)
    return stores


def train(store: Path, seed: int, steps: int) -> Distiller:
    """Trains a small student.

    Args:
        store: Folder of a store from :func:`build`.
        seed: Seed of the initial weights and of the order of the images.
        steps: Number of optimisation steps.
    """
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    split = FeatureStore(store).open_split("train")
    columns = read(split)
    spec = split.teachers[TEACHER]
    student = Student(StudentOptions(image_size=_IMAGE_SIZE, width=96, depth=3, heads=3))
    shape = {"channels": spec.channels, "grid_hw": list(spec.grid_hw), "has_cls": False}
    distiller = Distiller(student, {TEACHER: shape})
    statistics = FeatureStore(store).statistics(TEACHER)
    distiller.set_statistics(TEACHER, statistics.mean, statistics.std)
    optimizer = build_optimizer(distiller, _LEARNING_RATE)
    schedule = warmup_then_constant(optimizer, steps // 10)
    for _ in range(steps):
        rows = order.choice(len(split), min(_BATCH, len(split)), replace=False)
        _, predictions, _ = distiller(torch.from_numpy(columns["image"][rows]))
        loss = FeatureLoss()(predictions[TEACHER], targets(distiller, TEACHER, columns, rows))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return distiller


@torch.no_grad()
def score(distiller: Distiller, store: Path) -> dict[str, float]:
    """Loss and cosine on held-out images, against features of one store whatever the student was trained on.

    Args:
        distiller: Student from :func:`train`.
        store: Folder of the float16 store.
    """
    columns = read(FeatureStore(store).open_split("val"))
    statistics = FeatureStore(store).statistics(TEACHER)
    mean, std = (torch.from_numpy(values).float() for values in (statistics.mean, statistics.std))
    _, predictions, _ = distiller.eval()(torch.from_numpy(columns["image"]))
    prediction = (distiller.denormalize(TEACHER, predictions[TEACHER]) - mean) / std
    target = (torch.from_numpy(columns[TEACHER]).float() - mean) / std
    return {
        "loss": float(FeatureLoss()(prediction, target)),
        "cosine": float(1 - cosine_loss(prediction, target)),
    }


def targets(distiller: Distiller, name: str, columns: Mapping[str, NDArray[Any]], rows: Any) -> torch.Tensor:
    """Training targets: stored features of some rows, normalised."""
    scale = columns.get(f"{name}/scale")
    return distiller.normalize(
        name, torch.from_numpy(columns[name][rows]), None if scale is None else torch.from_numpy(scale[rows])
    )


def read(split: Split) -> Columns:
    """All of a split, by field."""
    columns = split.allocate(len(split))
    split.read_into(np.arange(len(split)), columns)
    return columns


def _heavy_tails(tokens: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A linear map of tokens ``(n, C)``, as matrix ``(C, CHANNELS)`` and bias ``(CHANNELS,)``."""
    random = np.random.default_rng(0)
    deviation = tokens.std(0)
    mixing = random.standard_normal((tokens.shape[1], CHANNELS)) / np.where(deviation > 0, deviation, 1)[:, None]
    mixing /= (tokens @ mixing).std(0)
    bias = -(tokens.mean(0) @ mixing)
    bias[random.choice(CHANNELS, OFFSET_BY_100, replace=False)] += 100
    scale = random.lognormal(size=CHANNELS)
    scale[random.choice(CHANNELS, SCALED_BY_100, replace=False)] = 100
    return (mixing * scale).astype(np.float32), (bias * scale).astype(np.float32)


def _write(writer: SplitWriter, source: SplitWriter, images: Any, features: NDArray[np.float32], dtype: Dtype) -> None:
    grid = round(features.shape[1] ** 0.5)
    spec = TeacherSpec(name=TEACHER, channels=CHANNELS, grid_hw=(grid, grid), licence="Apache-2.0", weights="none")
    writer.begin(images, [spec], dtype, {})
    first = 0
    for index in range(images.shard_count):
        shard = source.images(index)
        writer.write_images(index, shard.keys(), shard.read("data"), None, [])
        with writer.open_shard(TEACHER, index) as file:
            file.append(features[first : first + shard.rows], None)
        first += shard.rows
    writer.finish()
