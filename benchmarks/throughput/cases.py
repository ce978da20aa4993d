"""What the training steps of the benchmark work on: models, one batch in memory, and the steps themselves."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.throughput.measure import ParityError
from benchmarks.throughput.plain import PlainDistiller
from theia.models.backbone import StudentOptions
from theia.models.distiller import Distiller
from theia.models.student import Student
from theia.training.balance import teacher_weights, weighted_mean
from theia.training.losses import FeatureLoss, Objective
from theia.training.optim import build_optimizer
from theia.types import FeatureBatch

CDIV = {"clip": (1024, 16), "dinov2": (1024, 16), "vit": (1280, 16)}  # channels, rows of the grid
ALL_FIVE = {**CDIV, "sam": (256, 64), "depth_anything": (32, 64)}
NAMES = {len(CDIV): "C+Di+V", len(ALL_FIVE): "all five teachers"}

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One model, and a batch for it.

    Attributes:
        distiller: Student and translators, with random weights and random statistics.
        batch: Batch of random images and features.
    """

    distiller: Distiller
    batch: FeatureBatch

    @property
    def fixed(self) -> list[Tensor]:
        """What is in memory before a step: parameters, statistics and the batch."""
        return [
            *self.distiller.parameters(),
            *self.distiller.buffers(),
            self.batch.images,
            *self.batch.patches.values(),
        ]


def make_case(
    teachers: dict[str, tuple[int, int]], size: str, batch_size: int, device: str = "cpu", **student: Any
) -> Case:
    """A model and a batch, from a fixed seed.

    Args:
        teachers: Channels and rows of the grid by teacher name.
        size: Size of the student: "tiny", "small" or "base".
        batch_size: Number of images.
        device: Device of both.
        student: Further options of the student.
    """
    torch.manual_seed(0)
    shapes = {name: {"channels": c, "grid_hw": (rows, rows), "has_cls": False} for name, (c, rows) in teachers.items()}
    distiller = Distiller(Student(StudentOptions(backbone=f"theia_{size}", **student)), shapes)
    patches = {}
    for name, (channels, rows) in teachers.items():
        mean, std = torch.randn(channels), torch.rand(channels) + 0.5
        distiller.set_statistics(name, mean, std)
        patches[name] = (torch.randn(batch_size, rows * rows, channels) * std + mean).half().to(device)
    images = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8, device=device)
    empty: dict[str, Tensor] = {}
    return Case(distiller.to(device), FeatureBatch(images, patches, empty, empty, None, torch.arange(batch_size)))


class OurStep:
    """One optimisation step as in training.

    Args:
        case: Model and batch; the model is copied.
        bfloat16: Whether to run under autocast to bfloat16.
        compiled: Whether to compile the loss, as ``--model.compile`` does.
    """

    def __init__(self, case: Case, bfloat16: bool = False, compiled: bool = True) -> None:
        self.model = copy.deepcopy(case.distiller)
        self.batch = case.batch
        self.objective = Objective(self.model, FeatureLoss())
        device = case.batch.images.device
        if compiled:
            self.objective.compile(device)
        self.weights = teacher_weights(self.model.teachers)
        self.optimizer = build_optimizer(self.model, 1e-4)
        self._precision: Callable[[], AbstractContextManager[object]] = (
            partial(torch.autocast, device.type, torch.bfloat16) if bfloat16 else nullcontext
        )

    def loss(self, batch: FeatureBatch | None = None) -> Tensor:
        """The loss, from a forward pass alone."""
        with self._precision():
            losses, _ = self.objective(batch or self.batch)
        return weighted_mean(losses, self.weights)

    def __call__(self, batch: FeatureBatch | None = None) -> Tensor:
        """One step: forward, backward, optimiser."""
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


class PlainStep:
    """The same work in the published way; see :mod:`benchmarks.throughput.plain`.

    Args:
        case: Model whose weights to copy, and its batch.
    """

    def __init__(self, case: Case) -> None:
        self.model = PlainDistiller(case.distiller).to(case.batch.images.device)
        self.batch = case.batch
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def loss(self) -> Tensor:
        """The loss, from a forward pass alone."""
        return self.model.loss(self.batch.images, self.batch.patches)[0]

    def __call__(self) -> Tensor:
        """One step: forward, backward, optimiser."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


def check_parity(case: Case, compiled: bool = True) -> dict[str, float]:
    """Compares both steps on the same weights and batch.

    The loss and its gradient with respect to predictions are compared in float32, the gradients of the translators'
    parameters in float64: in float32, an activation near zero may be rounded to either side, and then passes a ReLU in
    one of the steps only.

    Returns:
        Relative difference of the losses; largest difference of a gradient, relative to the largest of its tensor.

    Raises:
        ParityError: If the losses differ by more than 1e-5, their gradients by more than 1e-4, or those of a parameter
            by more than 1e-9.
    """
    ours, plain = OurStep(case, compiled=compiled), PlainStep(case)
    with torch.no_grad():
        losses = [float(step.loss()) for step in (ours, plain)]
    difference = abs(losses[0] - losses[1]) / abs(losses[1])
    _, predictions, _ = ours.model(case.batch.images)
    predictions = {name: value.detach().requires_grad_() for name, value in predictions.items()}
    ours_loss = weighted_mean(ours.objective.compare(predictions, {}, case.batch), ours.weights)
    plain_loss, _ = plain.model.loss_of(predictions, case.batch.patches)
    of_loss = _worst(ours_loss, plain_loss, list(predictions.values()), list(predictions.values()))
    of_parameters = max(_translators_differ(case, plain.model, name) for name in ours.model.teachers)
    if not (difference < 1e-5 and of_loss < 1e-4 and of_parameters < 1e-9):
        raise ParityError(
            f"Losses {losses[0]:.8g} and {losses[1]:.8g}; gradients of the loss differ by up to {of_loss:.2g}, "
            f"those of parameters by up to {of_parameters:.2g}."
        )
    return {
        "loss_relative_difference": difference,
        "loss_gradient_relative_difference": of_loss,
        "parameter_gradient_relative_difference_float64": of_parameters,
    }


def _translators_differ(case: Case, plain: PlainDistiller, name: str) -> float:
    ours, theirs = (copy.deepcopy(module).double() for module in (case.distiller.translators[name], plain.heads[name]))
    width = case.distiller.student.width
    tokens = torch.randn(2, 14 * 14, width, dtype=torch.float64, device=case.batch.images.device)
    predictions = ours(tokens, (14, 14)), theirs(tokens.transpose(1, 2).reshape(2, width, 14, 14))
    direction = torch.randn_like(predictions[0])
    parameters, others = dict(ours.named_parameters()), dict(theirs.named_parameters())
    mine, other = ((prediction * direction).sum() for prediction in predictions)
    return _worst(mine, other, list(parameters.values()), [others[key] for key in parameters])


def _worst(ours: Tensor, theirs: Tensor, our_inputs: list[Tensor], their_inputs: list[Tensor]) -> float:
    gradients = torch.autograd.grad(ours, our_inputs)
    expected = torch.autograd.grad(theirs, their_inputs)
    pairs = zip(gradients, expected, strict=True)
    return max(float((mine - other).abs().max() / other.abs().max().clamp_min(1e-12)) for mine, other in pairs)
