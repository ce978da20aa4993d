"""Optimiser and schedule: AdamW, linear warm-up, then a constant learning rate."""

from typing import Any, Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from torch.optim.optimizer import Optimizer

from theia.errors import ConfigError

DecayRule = Literal["matrices", "authors"]

BETAS = (0.9, 0.999)
WARMUP_START = 1e-2  # share of the learning rate


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
    matrices = {
        layer.weight for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter in matrices if rule == "matrices" else parameter.ndim > 1 and not name.endswith(".bias")
        (decayed if decays else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_optimizer(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.01,
    rule: DecayRule = "matrices",
    fused: bool = True,
) -> AdamW:
    """AdamW over a model's trainable parameters.

    Args:
        module: Model that has the parameters.
        learning_rate: Learning rate of all parameters after the warm-up.
        weight_decay: Weight decay of the parameters that decay.
        rule: Rule for the parameters that decay, as for :func:`parameter_groups`.
        fused: Whether to update all parameters in one pass, which Lightning refuses if it clips gradients under mixed
            precision.

    Raises:
        ConfigError: If the rule is unknown.

    Source: Theia, appendix: betas 0.9 and 0.999, weight decay 0.01.
    """
    return AdamW(parameter_groups(module, weight_decay, rule), lr=learning_rate, betas=BETAS, fused=fused)


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


def scale_learning_rate(learning_rate: float, global_batch: int, reference: int = 128) -> float:
    """Scales a learning rate linearly to another batch size.

    Args:
        learning_rate: Learning rate for the reference batch.
        global_batch: Samples per optimisation step over all processes.
        reference: Global batch for which the learning rate was chosen.
    """
    return learning_rate * global_batch / reference
