"""Distillation losses in pure torch: from the terms over features to the loss of a whole batch, compiled or not."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from theia.errors import ConfigError, DivergenceError, ShapeError
from theia.models.backbone import StudentTokens
from theia.models.distiller import Distiller, SomePatches
from theia.types import FeatureBatch

ClsLoss = Literal["same", "angle"]
Options = dict[str, str | int | bool | Callable[..., Any]]  # of the compiler

PAPER = {"cosine": 0.9, "smooth_l1": 0.1}  # Theia, eq. (1)

# What is used twice is stored in between if it comes from more than 4 tensors. The difference of a prediction and int8
# features comes from 5: both, the scales of the image, and the mean and deviation of the teacher.
_FUSED: Options = {"realize_reads_threshold": 8}

_NEVER = 2**62  # stands for a loss that was always finite
_TINY = 1e-16  # a feature map with a smaller sum of squares has no direction


def cosine_loss(prediction: Tensor, target: Tensor, per_token: bool = False) -> Tensor:
    """One minus the cosine of each sample's whole flattened feature map.

    Args:
        prediction: Translated student features, shape ``(B, N, C)``, or ``(B, C)`` for CLS tokens.
        target: Normalised teacher features, same shape.
        per_token: Whether to take the cosine of every token instead, which the paper does not do.

    Returns:
        Mean over the batch (and the tokens, if per token), a float32 scalar in ``[0, 2]``.

    Raises:
        ShapeError: If the shapes differ.

    Source: Theia, eq. (1).
    """
    return 1 - _cosines(prediction, target, per_token).mean()


def smooth_l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 with beta 1: half the square of an error below 1, and its size minus one half above.

    Args:
        prediction: Translated student features, shape ``(B, N, C)``, or ``(B, C)`` for CLS tokens.
        target: Normalised teacher features, same shape.

    Returns:
        Mean over all elements, a float32 scalar.

    Raises:
        ShapeError: If the shapes differ.

    Source: Theia, eq. (1).
    """
    # The mean of each sample first: compiled code then sums over a sample in the same pass as the cosine does.
    return _smooth_l1(prediction, target).mean()


def mse_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error.

    Args:
        prediction: Translated student features, shape ``(B, N, C)``, or ``(B, C)`` for CLS tokens.
        target: Normalised teacher features, same shape.

    Returns:
        Mean over all elements, a float32 scalar.

    Raises:
        ShapeError: If the shapes differ.

    Source: Theia, Table 6 (ablation).
    """
    return _mse(prediction, target).mean()


def _cosines(prediction: Tensor, target: Tensor, per_token: bool = False) -> Tensor:
    """Cosine of each sample, shape ``(B,)``, or of each token, shape ``(B, N)``."""
    prediction, target = _matched(prediction, target)
    axes = [-1] if per_token else list(range(1, prediction.ndim))
    # Not F.cosine_similarity, which divides before it sums, so that compiled code would read both tensors twice.
    norms = [value.square().sum(axes).clamp_min(_TINY).sqrt() for value in (prediction, target)]
    return (prediction * target).sum(axes) / (norms[0] * norms[1])


def _smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean smooth L1 of each sample, shape ``(B,)``."""
    prediction, target = _matched(prediction, target)
    return F.smooth_l1_loss(prediction, target, beta=1.0, reduction="none").flatten(1).mean(1)


def _mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, shape ``(B,)``."""
    prediction, target = _matched(prediction, target)
    return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)


def angle(prediction: Tensor, target: Tensor) -> Tensor:
    """The angle between two vectors, ``2 asin(|a - b| / 2)`` of the unit vectors ``a`` and ``b``.

    It is computed as ``2 atan2(|a - b|, |a + b|)``, the same number, whose gradient is finite at every angle; that of
    an arc cosine is not at 0 and at pi.

    Args:
        prediction: Vectors, shape ``(..., C)``.
        target: Vectors of the same shape.

    Returns:
        Angles in radians, from 0 to pi, float32, shape ``(...)``; pi / 2 if one vector is zero.

    Raises:
        ShapeError: If the shapes differ.

    Source: Kahan, "How futile are mindless assessments of roundoff in floating-point computation?", 2006.
    """
    first, second = (F.normalize(value, dim=-1) for value in _matched(prediction, target))
    apart, together = (torch.linalg.vector_norm(value, dim=-1) for value in (first - second, first + second))
    return 2 * torch.atan2(apart, together)


class RunningMean(nn.Module):
    """The mean of all numbers so far, in a buffer, so that a checkpoint holds it."""

    mean: Tensor  # ()
    steps: Tensor  # (), int64

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("steps", torch.tensor(0))

    @torch.no_grad()
    def update(self, value: Tensor) -> Tensor:
        """Adds a number, and gives the mean of all of them; both are scalars."""
        self.steps += 1
        self.mean += (value - self.mean) / self.steps
        return self.mean.clone()


Term = Callable[[Tensor, Tensor], Tensor]

TERMS: dict[str, Term] = {
    "cosine": lambda prediction, target: 1 - _cosines(prediction, target),
    # One cosine of each image's CLS token, or one of each of its patch tokens.
    "cosine_per_token": lambda prediction, target: (
        1 - _cosines(prediction, target, per_token=True).reshape(len(prediction), -1).mean(1)
    ),
    "smooth_l1": _smooth_l1,
    "mse": _mse,
}
"""Loss terms by name: ``(prediction, target)`` to the loss of each sample, ``(B,)``. A new term needs a line here."""


class FeatureLoss:
    """The loss of one teacher: a weighted sum of terms.

    Args:
        weights: Weight of each term, by its name in :data:`TERMS`; cosine 0.9 and smooth L1 0.1 by default, as in the
            paper.

    Raises:
        ConfigError: If a term is unknown, a weight is negative or not finite, or all are 0.

    Source: Theia, eq. (1).
    """

    def __init__(self, weights: Mapping[str, float] = PAPER) -> None:
        self.weights = {name: float(weight) for name, weight in weights.items()}
        unknown = sorted(self.weights.keys() - TERMS.keys())
        if unknown:
            raise ConfigError(f"No loss term named {', '.join(unknown)}. Choose from: {', '.join(TERMS)}.")
        wrong = {name: weight for name, weight in self.weights.items() if not (math.isfinite(weight) and weight >= 0)}
        for name, weight in wrong.items():
            raise ConfigError(f"The weight of the loss term {name} is {weight}; it must be 0 or a positive number.")
        if not any(self.weights.values()):
            raise ConfigError("There is nothing to learn: no loss term has a weight above 0. Set model.loss.")
        self._terms = [(weight, TERMS[name]) for name, weight in self.weights.items() if weight]

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Computes the loss of a batch.

        Args:
            prediction: Translated student features, shape ``(B, N, C)``, or ``(B, C)`` for CLS tokens.
            target: Normalised teacher features, same shape.

        Returns:
            A float32 scalar.

        Raises:
            ShapeError: If the shapes differ.
        """
        return self.of_images(prediction, target).mean()

    def of_images(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each image, shape ``(B,)``; arguments and errors are those of a call."""
        (weight, term), *others = self._terms
        total = weight * term(prediction, target)
        for weight, term in others:
            total = total + weight * term(prediction, target)
        return total


class Objective:
    """The part of a training step that is compiled: translates images and compares the results with stored features.

    Args:
        distiller: Model with the student, the translators and the normalisation of the features.
        loss: Function ``(prediction, target) -> scalar`` of normalised features ``(B, N, C)``, or ``(B, C)`` for CLS.
            If it gives the loss of each image instead, shape ``(B,)``, so does the objective.
    """

    def __init__(self, distiller: Distiller, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.distiller = distiller
        self.loss = loss
        self._translate: Callable[..., Any] = distiller
        self._compare: Callable[..., dict[str, Tensor]] = self._losses
        self._graphs = False
        self._held_out_size: int | None = None  # images in a full batch of held-out data

    def compile(self, device: torch.device, graphs: bool = False) -> None:
        """Has the first batch compile what gains speed from it: everything on a GPU, only the loss on a CPU.

        All batches should have one size, because each new size is compiled again.

        Args:
            device: Device of the batches.
            graphs: Whether a GPU replays forward and backward pass as CUDA graphs, which spares the host the launch of
                each kernel. The results of a call, gradients included, then last until the next call only.

        Raises:
            ConfigError: If torch.compile does not work here; the message says what is missing.
        """
        _check_compiler(device)
        self._graphs = graphs
        # What mode="reduce-overhead" stands for, which does not go together with other options.
        replayed: Options = {"triton.cudagraphs": True} if graphs else {}
        # Over the raw features directly, which are never stored normalised.
        self._compare = torch.compile(self._losses, dynamic=False, options={**_FUSED, **replayed})
        # On a CPU nearly all of the rest is matrix products, which do not get faster when compiled.
        if device.type == "cuda":
            self._translate = torch.compile(self.distiller.forward, dynamic=False, options=replayed)

    def __call__(
        self,
        batch: FeatureBatch,
        some: SomePatches | None = None,
        dispersions: Mapping[str, Tensor] | None = None,
        overlaps: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Computes losses and translations of a batch.

        Args:
            batch: Images and stored features, of all teachers or of some.
            some: Patches that the student is given; all by default.
            dispersions: As for :meth:`compare`.
            overlaps: Likewise.

        Returns:
            The loss of each teacher that the batch has features of, by name, a scalar (if its CLS token is distilled,
            the mean of the patch and the CLS loss); the predicted normalised patch tokens ``(B, N, C)`` by teacher
            name.
        """
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        there = tuple(name for name in self.distiller.teachers if name in batch.patches)
        teachers = None if len(there) == len(self.distiller.teachers) else there
        _, predictions, cls_predictions = self._translate(batch.images, some, teachers)
        return self.compare(predictions, cls_predictions, batch, dispersions, overlaps), predictions

    def translate(self, images: Tensor) -> tuple[StudentTokens, dict[str, Tensor], dict[str, Tensor]]:
        """Student tokens and translations of held-out images, as the distiller gives them.

        If the training step is compiled, so is this, for batches as large as the first: the last, smaller one is not
        worth another compilation. With CUDA graphs it is not compiled, as it would be replayed over the step's results.

        Args:
            images: RGB images, uint8, shape ``(B, 3, H, W)``.
        """
        if self._held_out_size is None:
            self._held_out_size = len(images)
        compiled = len(images) == self._held_out_size and not self._graphs
        translated: tuple[StudentTokens, dict[str, Tensor], dict[str, Tensor]]
        translated = (self._translate if compiled else self.distiller)(images)
        return translated

    def compare(
        self,
        predictions: dict[str, Tensor],
        cls_predictions: dict[str, Tensor],
        batch: FeatureBatch,
        dispersions: Mapping[str, Tensor] | None = None,
        overlaps: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Computes the losses from predictions that are there already.

        Args:
            predictions: Predicted normalised patch tokens ``(B, N, C)`` by teacher name.
            cls_predictions: Predicted normalised CLS tokens ``(B, C)`` by teacher name, if they are distilled.
            batch: Batch that holds the stored features.
            dispersions: Mean squared angles, scalars, by teacher name. The loss of CLS tokens is then the squared angle
                between the predicted and the stored one, divided by this. By default it is that of patch tokens.
            overlaps: Numbers of the predicted and of the stored patch tokens to compare, int64, shape ``(n,)``, by
                teacher name; all by default.
        """
        return self._compare(
            predictions, cls_predictions, batch.patches, batch.scales, batch.cls, dict(dispersions or {}),
            dict(overlaps or {}),
        )  # fmt: skip

    def _losses(
        self,
        predictions: dict[str, Tensor],
        cls_predictions: dict[str, Tensor],
        patches: dict[str, Tensor],
        scales: dict[str, Tensor],
        cls: dict[str, Tensor],
        dispersions: dict[str, Tensor],
        overlaps: dict[str, tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        losses = {}
        for name, prediction in predictions.items():
            stored = patches[name]
            if name in overlaps:
                seen, there = overlaps[name]
                prediction, stored = prediction[:, seen], stored[:, there]
            losses[name] = self.loss(prediction, self.distiller.target(name, stored, scales.get(name)))
            if name in cls_predictions:
                if name in dispersions:
                    predicted = self.distiller.denormalize_cls(name, cls_predictions[name])
                    square = angle(predicted, cls[name]).square() / dispersions[name]
                    cls_loss = square if losses[name].ndim else square.mean()
                else:
                    cls_loss = self.loss(cls_predictions[name], self.distiller.normalize_cls(name, cls[name]))
                losses[name] = (losses[name] + cls_loss) / 2
        return losses


class BadSteps:
    """Remembers on the device from which step on each teacher's loss was not finite.

    A check on the host would make it wait for the device in every step.

    Args:
        teachers: Names of the teachers.
    """

    def __init__(self, teachers: Sequence[str]) -> None:
        self._teachers = teachers
        self._first: Tensor | None = None  # (T,), int64

    def forget(self) -> None:
        """Forgets earlier steps, as a training begins."""
        self._first = None

    def note(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Adds a step.

        Args:
            losses: Losses of the teachers that the step has, by name, of any shape.
            step: Number of the step.
        """
        absent = next(iter(losses.values())).new_zeros(())
        every = torch.stack([losses.get(name, absent).mean() for name in self._teachers])
        bad = ~torch.isfinite(every.detach())
        if self._first is None:
            self._first = torch.full(bad.shape, _NEVER, dtype=torch.int64, device=bad.device)
        self._first = torch.where(bad & (self._first == _NEVER), step, self._first)

    def stop(self, least: Callable[[Tensor], Any]) -> None:
        """Stops if there was such a step.

        Args:
            least: Function that gives the least of a tensor over all processes: one that stopped alone would leave the
                others waiting.

        Raises:
            DivergenceError: If a loss was not finite in any process.
        """
        if self._first is None:
            return
        first = least(self._first.clone()).tolist()
        step = min(first)
        if step < _NEVER:
            names = ", ".join(repr(name) for name, at in zip(self._teachers, first, strict=True) if at == step)
            raise DivergenceError(
                f"The loss of teacher {names} is not finite since step {step}. The last checkpoint is from before it. "
                "Lower model.learning_rate or check the features with 'theia store verify'."
            )


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(torch.cos)(torch.zeros(8, device=device))
    # The type of the error depends on what is missing: a compiler, headers, Triton or room for the cache.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"torch.compile does not work here: {reason} Install a C++ compiler (on a GPU, Triton too), or train "
            "without it: --model.compile false."
        ) from error


def _matched(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in float32: under autocast, predictions are bfloat16, too coarse for sums over a feature map."""
    if prediction.shape != target.shape or prediction.ndim < 2:
        raise ShapeError(
            f"A prediction of shape {tuple(prediction.shape)} cannot be compared with a target of shape "
            f"{tuple(target.shape)}; both must be (B, N, C), or (B, C) for CLS tokens. Does the store hold "
            "the features of the teacher that the model was built for?"
        )
    return prediction.float(), target.float()
