"""Trains a policy on demonstrations, and says how far its actions are off."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.behaviour_cloning.demonstrations import Demonstrations
from examples.behaviour_cloning.policy import Policy
from theia.errors import ConfigError, DivergenceError


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: Passes over the demonstrations.
        batch_size: Steps of one update, at least; what is left over is spread over the others.
        learning_rate: Of the head.
        encoder_learning_rate: Of the blocks of the encoder that are free: they need care more than change.
        weight_decay: Of both.
        progress: Whether to show bars.
    """

    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    encoder_learning_rate: float = 1e-5
    weight_decay: float = 0.01
    progress: bool = True


def train(policy: Policy, demonstrations: Demonstrations, options: TrainingOptions, seed: int = 0) -> list[float]:
    """Fits a policy with mean squared error on actions, each value in standard deviations.

    A frozen encoder sees every image once, before the first epoch; its features are kept in memory in half precision:
    75 kB for each image with the spatial features of Theia-Tiny at 224 pixels, 300 kB with those of Theia-Base.

    Args:
        policy: Changed in place; in evaluation mode afterwards.
        demonstrations: All steps to train on.
        options: See :class:`TrainingOptions`.
        seed: Of the order.

    Returns:
        Mean loss of each epoch.

    Raises:
        ConfigError: If there are fewer than two steps, or an option is out of range.
        DivergenceError: If the loss stops being finite.
    """
    if len(demonstrations) < 2 or options.batch_size < 2 or options.epochs < 1:
        raise ConfigError(
            f"{len(demonstrations)} steps, batch_size {options.batch_size}, epochs {options.epochs}: at least two, two "
            "and one are needed."
        )
    device = policy.action_mean.device
    policy.set_statistics(demonstrations.actions, demonstrations.proprioception)
    free = [parameter for parameter in policy.encoder.parameters() if parameter.requires_grad]
    features = None if free else compute_features(policy, demonstrations.images, options)
    heads = [*policy.reduction.parameters(), *policy.mlp.parameters()]
    groups: list[dict[str, Any]] = [{"params": heads}, {"params": free, "lr": options.encoder_learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay)
    shuffle = torch.Generator().manual_seed(seed)
    losses = []
    policy.train()
    bar = tqdm(range(options.epochs), desc="train", unit="epoch", disable=not options.progress)
    for epoch in bar:
        order = torch.randperm(len(demonstrations), generator=shuffle)
        # Not `split`: a last batch of one step has no variance for a batch norm.
        batches = order.tensor_split(max(1, len(order) // options.batch_size))
        total = torch.zeros((), device=device)
        for steps in batches:
            batch = demonstrations[steps]
            seen = policy.encode(batch.images) if features is None else features[steps].to(device).float()
            actions = policy.act(seen, _to(batch.proprioception, device))
            error = (actions - batch.actions.to(device)) / policy.action_std
            loss = error.square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.detach() * len(steps)
        losses.append(float(total) / len(order))
        if not losses[-1] < float("inf"):
            raise DivergenceError(
                f"The loss is {losses[-1]} after epoch {epoch + 1}. Lower the learning rates, or look for values in "
                "the demonstrations that are no numbers."
            )
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    policy.eval()
    return losses


@torch.no_grad()
def compute_features(policy: Policy, images: Tensor, options: TrainingOptions) -> Tensor:
    """Features of all images, half precision, on the CPU.

    Args:
        policy: Whose encoder is frozen.
        images: RGB, uint8, shape ``(T, H, W, 3)``.
        options: See :class:`TrainingOptions`.

    Returns:
        What :meth:`Policy.encode` gives, ``T`` of them.
    """
    features: Tensor | None = None
    bar = tqdm(total=len(images), desc="encode", unit="image", disable=not options.progress)
    with bar:
        for start in range(0, len(images), options.batch_size):
            batch = policy.encode(images[start : start + options.batch_size])
            if features is None:
                # Once, whole: a list of batches would need the memory twice when it is put together.
                features = torch.empty((len(images), *batch.shape[1:]), dtype=torch.float16)
            features[start : start + len(batch)] = batch
            bar.update(len(batch))
    if features is None:
        raise ConfigError("There are no images to encode.")
    return features


@torch.no_grad()
def evaluate(policy: nn.Module, demonstrations: Demonstrations, batch_size: int = 64) -> Tensor:
    """Mean absolute error of each value of the actions, in their own units.

    Args:
        policy: Takes images and proprioception; in evaluation mode.
        demonstrations: Held out.
        batch_size: Images at once.

    Returns:
        Shape ``(A,)``, on the CPU.
    """
    total = torch.zeros(demonstrations.actions.shape[1])
    device = next(policy.parameters()).device
    for start in range(0, len(demonstrations), batch_size):
        batch = demonstrations[torch.arange(start, min(start + batch_size, len(demonstrations)))]
        actions = policy(batch.images, _to(batch.proprioception, device))
        total += (actions.cpu() - batch.actions).abs().sum(0)
    return total / len(demonstrations)


def blind_error(training: Demonstrations, held_out: Demonstrations) -> Tensor:
    """The same of the best constant action: the median of the training. A policy that is not better sees nothing.

    Args:
        training: What the constant is taken from.
        held_out: What it is scored on.

    Returns:
        Shape ``(A,)``.
    """
    return (held_out.actions - training.actions.median(0).values).abs().mean(0)


def _to(values: Tensor | None, device: torch.device) -> Tensor | None:
    return None if values is None else values.to(device)
