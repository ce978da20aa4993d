"""Optimiser and schedule: AdamW or another by its name, linear warm-up, then a learning rate that stays or decays."""

import importlib
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from timm.optim.muon import Muon
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler
from torch.optim.optimizer import Optimizer

from theia.errors import ConfigError

DecayRule = Literal["matrices", "authors"]
Schedule = Literal["constant", "cosine", "wsd"]

ADAMW = "torch.optim.AdamW"
BETAS = (0.9, 0.999)
WARMUP_START = 1e-2  # share of the learning rate
DECAY = 0.2  # share of all steps over which the learning rate of "wsd" falls


def parameter_groups(module: nn.Module, weight_decay: float, rule: DecayRule = "matrices") -> list[dict[str, Any]]:
    """Groups trainable parameters into those with and those without weight decay.

    Args:
        module: Model that has the parameters.
        weight_decay: Weight decay of the first group.
        rule: Rule that chooses the first group. ``"matrices"``: the weights of linear layers and convolutions, so no
            norms, biases, position embedding or tokens. ``"authors"``: every parameter with more than one dimension
            whose name does not end in ``.bias``, so also position embedding, tokens and scales of joint layer norms.

    Returns:
        Two parameter groups for an optimiser: first with weight decay, then without.

    Raises:
        ConfigError: If the rule is unknown.
    """
    if rule not in ("matrices", "authors"):
        raise ConfigError(f"No weight decay rule named {rule!r}. Choose one of: matrices, authors.")
    matrices = _matrices(module)
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter in matrices if rule == "matrices" else parameter.ndim > 1 and not name.endswith(".bias")
        (decayed if decays else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _matrices(module: nn.Module) -> set[Tensor]:
    """Weights of linear layers and convolutions."""
    return {layer.weight for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)}


def check_optimizer(name: str, options: Mapping[str, Any], betas: tuple[float, float] = BETAS) -> None:
    """Takes a step on a small layer, so that an optimiser that does not work here is known before anything is written.

    Args:
        name: Import path of the class, such as ``torch.optim.AdamW``.
        options: Arguments of the class besides parameters, learning rate and weight decay.
        betas: Decay rates of AdamW's running means.

    Raises:
        ConfigError: If there is no such optimiser, it cannot train a model, or does not take the options.
    """
    kind = _optimizer_class(name)
    for option in ("lr", "weight_decay", *(["betas"] if name == ADAMW else [])):
        if option in options:
            instead = {"lr": "learning_rate"}.get(option, option)
            raise ConfigError(f"model.optimizer_options has {option}. Give it as --model.{instead} instead.")
    if name != ADAMW and tuple(betas) != BETAS:
        raise ConfigError(
            f"--model.betas are those of {ADAMW}. For {name}, give them in model.optimizer_options, if it has them."
        )
    try:
        with torch.device("cpu"):  # also where a model is built on no device
            # Draws no random numbers, which would change the model's weights.
            layer = nn.Linear(2, 2, device="meta").to_empty(device="cpu")
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
                parameter.grad = torch.ones_like(parameter)
            build_optimizer(layer, 1e-3, fused=False, betas=betas, name=name, options=options).step()
    # Each class has its own ways to refuse.
    except Exception as error:
        instead = " timm.optim.Muon gives the other parameters to AdamW." if kind is torch.optim.Muon else ""
        raise ConfigError(
            f"{name} does not work with model.optimizer_options {dict(options)}: {error}{instead} Choose another, or "
            "correct its options."
        ) from error


def _optimizer_class(name: str) -> type[Optimizer]:
    place, _, last = name.rpartition(".")
    if not place:
        raise ConfigError(f"--model.optimizer is {name}; give an import path, such as timm.optim.Muon or {ADAMW}.")
    try:
        found = getattr(importlib.import_module(place), last)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"--model.optimizer is {name}, which cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError(
            f"--model.optimizer is {name}, which is no class of torch.optim.Optimizer. Name one, such as {ADAMW}."
        )
    return found


def build_optimizer(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.01,
    rule: DecayRule = "matrices",
    fused: bool = True,
    betas: tuple[float, float] = BETAS,
    name: str = ADAMW,
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """An optimiser over a model's trainable parameters; AdamW by default.

    timm's Muon is given the weights of linear layers and convolutions, and leaves all others to the AdamW within it.

    Args:
        module: Model that has the parameters.
        learning_rate: Learning rate of all parameters after the warm-up.
        weight_decay: Weight decay of the parameters that decay.
        rule: Rule for the parameters that decay, as for :func:`parameter_groups`.
        fused: Whether AdamW updates all parameters in one pass, which Lightning refuses if it clips gradients under
            mixed precision.
        betas: Decay rates of AdamW's running means of the gradient and of its square.
        name: Import path of the class.
        options: Other arguments of the class.

    Raises:
        ConfigError: If the rule or the optimiser is unknown.

    Source: Theia, appendix: betas 0.9 and 0.999, weight decay 0.01. Muon: Jordan et al., 2024.
    """
    given = dict(options or {})
    kind = _optimizer_class(name)
    groups = parameter_groups(module, weight_decay, rule)
    if kind is Muon:
        matrices = _matrices(module)
        groups = [
            {**group, "params": [one for one in group["params"] if (one in matrices) == muon], "use_muon": muon}
            for group in groups
            for muon in (True, False)
        ]
    if name == ADAMW:
        given = {"fused": fused, "betas": betas, **given}
    return kind([group for group in groups if group["params"]], lr=learning_rate, **given)  # type: ignore[call-arg]


def warmup_then_constant(optimizer: Optimizer, warmup_steps: int) -> LinearLR:
    """A linear warm-up, then a constant learning rate; stepped after every optimisation step.

    Args:
        optimizer: Optimiser with the learning rates to reach after the warm-up.
        warmup_steps: Number of steps in which the learning rate rises linearly from a hundredth to its full value; 0
            for no warm-up.

    Raises:
        ConfigError: If the number of steps is negative.
    """
    if warmup_steps < 0:
        raise ConfigError(f"Warm-up is {warmup_steps} steps; it must be 0 or more.")
    # Without warm-up steps, torch would leave the learning rate at its start for ever.
    start = WARMUP_START if warmup_steps else 1.0
    return LinearLR(optimizer, start_factor=start, total_iters=max(warmup_steps, 1))


class Course(NamedTuple):
    """The learning rate over a whole training, as a share of its full value.

    Attributes:
        schedule: Rule for the steps after the warm-up. ``"constant"``: the full rate. ``"cosine"``: half a period of a
            cosine, from the full rate to zero. ``"wsd"``, warmup-stable-decay: the full rate, then linearly to zero
            over the last fifth of all steps.
        steps: Number of all steps ``T``.
        warmup_steps: Number of steps ``w`` in which the rate rises linearly from a hundredth to its full value.

    Source: the cosine of SGDR (Loshchilov & Hutter, 2017), without restarts; warmup-stable-decay of MiniCPM (Hu et al.,
    2024), here with a linear decay.
    """

    schedule: Schedule
    steps: int
    warmup_steps: int

    @property
    def decay_from(self) -> int:
        """The first step ``d`` after which the rate falls; for a constant rate, the last of all."""
        if self.schedule == "cosine":
            return self.warmup_steps
        return self.steps - (round(DECAY * self.steps) if self.schedule == "wsd" else 0)

    def share(self, step: int) -> float:
        """The share of the full learning rate that a step uses.

        For the steps ``t`` of the warm-up it is ``0.01 + 0.99 t / w``. Later, with ``x = (t - d) / (T - d)``, it is
        ``(1 + cos(pi x)) / 2`` for a cosine, and ``min(1, 1 - x)`` for wsd.

        Args:
            step: Number of steps taken before. From ``T`` on, a rate that decays stays zero.
        """
        if step < self.warmup_steps:
            return WARMUP_START + (1 - WARMUP_START) * step / self.warmup_steps
        if self.schedule == "constant" or step <= self.decay_from:
            return 1.0
        if step >= self.steps:
            return 0.0
        done = (step - self.decay_from) / (self.steps - self.decay_from)
        return (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done


def learning_rate_schedule(optimizer: Optimizer, course: Course) -> LRScheduler:
    """A scheduler that sets the learning rate of a course, stepped after every optimisation step.

    Args:
        optimizer: Optimiser with the learning rates to reach after the warm-up.
        course: Learning rate over the training.

    Raises:
        ConfigError: If the number of warm-up steps is negative.
    """
    if course.schedule == "constant":
        return warmup_then_constant(optimizer, course.warmup_steps)
    return LambdaLR(optimizer, course.share)


def scale_learning_rate(learning_rate: float, global_batch: int, reference: int = 128) -> float:
    """Scales a learning rate linearly to another batch size.

    Args:
        learning_rate: Learning rate for the reference batch.
        global_batch: Samples per optimisation step over all processes.
        reference: Global batch for which the learning rate was chosen.
    """
    return learning_rate * global_batch / reference
