"""Encoders to measure: a small one with a short real training, others with random weights."""

from typing import Any

import numpy as np
import torch

from theia import registry
from theia.encoder.encoder import Encoder
from theia.extraction.sources import SampleSource
from theia.models.architecture import Architecture
from theia.training.balance import teacher_weights, weighted_mean
from theia.training.losses import FeatureLoss, Objective
from theia.training.optim import build_optimizer, warmup_then_constant
from theia.types import FeatureBatch

# Teachers without weights to fetch.
_TEACHERS = ("hog", "color")
_PIXELS = 224
_LEARNING_RATE = 1e-3


def random_encoder(backbone: str, **student: Any) -> Encoder:
    """An untrained encoder, from a fixed seed.

    Args:
        backbone: Backbone of the student, as in ``theia fit``.
        student: Further options of the architecture.
    """
    torch.manual_seed(0)
    shapes = {"color": {"channels": 6, "grid_hw": [16, 16], "has_cls": False}}
    return Encoder(Architecture(teachers=shapes, backbone=backbone, translator="linear", **student))


def trained_encoder(
    backbone: str = "theia_tiny", steps: int = 100, images: int = 64, batch_size: int = 4, **student: Any
) -> tuple[Encoder, dict[str, list[float]]]:
    """An encoder trained on crops of sample photographs, from a fixed seed; about a minute on one core.

    The training is long enough for tokens that differ from place to place as a teacher's features do, and too short for
    a good model.

    Args:
        backbone: Backbone of the student, as in ``theia fit``.
        steps: Number of optimisation steps.
        images: Number of crops.
        batch_size: Number of images per step.
        student: Further options of the architecture.

    Returns:
        The encoder, and the loss of each step by teacher.
    """
    torch.manual_seed(0)
    source = SampleSource("train", images)
    crops = [np.array(source.read(index).resize((_PIXELS, _PIXELS))) for index in range(images)]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    teachers = {name: registry.create(name) for name in _TEACHERS}
    features = {name: teacher(pixels).patches.float() for name, teacher in teachers.items()}
    shapes = {
        name: {"channels": teacher.spec.channels, "grid_hw": list(teacher.spec.grid_hw), "has_cls": False}
        for name, teacher in teachers.items()
    }
    encoder = Encoder(Architecture(teachers=shapes, backbone=backbone, translator="linear", **student))
    encoder.distiller.translators.requires_grad_()
    distiller = encoder.distiller
    for name, values in features.items():
        distiller.set_statistics(name, values.mean((0, 1)), values.std((0, 1)))
    objective, weights = Objective(distiller, FeatureLoss()), teacher_weights(_TEACHERS)
    optimizer = build_optimizer(distiller, _LEARNING_RATE)
    schedule = warmup_then_constant(optimizer, steps // 10)
    losses: dict[str, list[float]] = {name: [] for name in _TEACHERS}
    for _ in range(steps):
        rows = torch.randperm(images)[:batch_size]
        batch = {name: values[rows] for name, values in features.items()}
        found, _ = objective(FeatureBatch(pixels[rows], batch, {}, {}, None, rows))
        optimizer.zero_grad()
        weighted_mean(found, weights).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        for name, loss in found.items():
            losses[name].append(float(loss.detach()))
    return encoder, losses
