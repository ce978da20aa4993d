"""Trains a policy on demonstrations in memory, and says how far its actions are off."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.behaviour_cloning.demonstrations import Demonstrations
from theia.errors import ConfigError
from theia.policies import HeadKind, demonstrated
from theia.policies.action_heads import HEADS, Head, Scale
from theia.policies.cloning import RECIPES, FineTuning, Recipe, Training
from theia.policies.demonstrated import tokens_in_memory
from theia.policies.policy import About, Policy
from theia.policies.sight import Sight


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: Passes over the demonstrations.
        batch_size: Number of steps in one update; by default, what is usual for the head.
        learning_rate: Learning rate of the head; by default, what is usual for it.
        encoder_learning_rate: Learning rate of the encoder's blocks that are trained too.
        progress: Whether to show bars.
    """

    epochs: int = 100
    batch_size: int | None = None
    learning_rate: float | None = None
    encoder_learning_rate: float = 1e-5
    progress: bool = True

    def recipe(self, head: HeadKind) -> Recipe:
        """The head's own recipe, with what was chosen."""
        usual = RECIPES[head]
        batch_size = usual.batch_size if self.batch_size is None else self.batch_size
        learning_rate = usual.learning_rate if self.learning_rate is None else self.learning_rate
        return replace(usual, batch_size=batch_size, learning_rate=learning_rate)


def train(
    sight: Sight,
    image_size: int,
    demonstrations: Demonstrations,
    options: TrainingOptions,
    head: HeadKind = "mlp",
    chunk: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    unfinished: Path | None = None,
) -> tuple[Policy, list[float]]:
    """Fits a policy to demonstrations.

    A frozen encoder sees every image once, before the first epoch; its features are kept in memory in half precision:
    75 kB for each image with the spatial features of Theia-Tiny at 224 pixels, 300 kB with those of Theia-Base.

    Args:
        sight: The encoder as it shall be trained: frozen, or with some blocks free.
        image_size: Height and width that images are resized to, in pixels.
        demonstrations: All steps to train on.
        options: See :class:`TrainingOptions`.
        head: Kind of the head.
        chunk: Number of actions that it predicts at once.
        seed: Seed of weights and order.
        device: Device to train on.
        unfinished: File that the state is kept in after every epoch; a training that finds it goes on from there.

    Returns:
        The policy, and the mean loss of each epoch.

    Raises:
        ConfigError: If an option is out of range, or the grid is too small for the convolutions.
        DivergenceError: If the loss stops being finite.
    """
    recipe = options.recipe(head)
    if recipe.batch_size < 2 or options.epochs < 1 or not recipe.learning_rate > 0:
        raise ConfigError(
            f"batch_size {recipe.batch_size}, epochs {options.epochs}, learning_rate {recipe.learning_rate}: at least "
            "2, at least 1, and above 0 are needed."
        )
    place, data, size = torch.device(device), demonstrations.in_order(), image_size
    sight = sight.to(place)
    tuning: FineTuning | None = None
    if any(parameter.requires_grad for parameter in sight.parameters()):
        tuning = FineTuning(sight, options.encoder_learning_rate)
    rows = np.arange(1 if tuning is not None else len(data))
    parts = tqdm(
        np.array_split(rows, -(-len(rows) // 32)), "encode", disable=not options.progress or tuning is not None
    )
    tokens = tokens_in_memory(sight, (data.pictures(part, size) for part in parts), len(rows), place)
    state = np.zeros((len(data), 0), np.float32) if data.proprioception is None else data.proprioception.numpy()
    cloned = demonstrated.Demonstrations.of(
        tokens if tuning is None else None, state, data.actions.numpy(), data.lengths,
        None if tuning is None else lambda wanted: data.pictures(wanted, size),
    )  # fmt: skip

    def make() -> Head:
        channels, actions = tokens.tokens.shape[2], data.actions.shape[1]
        scale: Scale | None = "standard" if head == "mlp" else None  # actions of any robot, in any unit
        return HEADS[head](channels, tokens.grid, state.shape[1], actions, None, chunk, scale)

    training = Training(make, cloned, seed, unfinished, place, options.epochs, recipe, tuning)
    first = len(training.losses)
    bar = tqdm(
        range(first, options.epochs), "train", options.epochs, initial=first, unit="epoch", disable=not options.progress
    )
    for epoch in bar:
        training.advance(epoch)
        bar.set_postfix(loss=f"{training.losses[-1]:.4f}")
    about = About(size, data.frames_per_s, data.state_names, data.action_names)
    return Policy(training.head, sight, about, place), training.losses


def evaluate(policy: Policy, demonstrations: Demonstrations) -> Tensor:
    """Mean absolute error of each value of the actions, in their own units. The policy acts as on a robot.

    Args:
        policy: The policy.
        demonstrations: Held out.

    Returns:
        Shape ``(A,)``.
    """
    data, start, errors = demonstrations.in_order(), 0, []
    for length in data.lengths:
        policy.reset()
        for step in range(start, start + length):
            state = None if data.proprioception is None else data.proprioception[step]
            action = policy.act(data.images[step], state)
            errors.append((torch.from_numpy(action) - data.actions[step]).abs())
        start += length
    return torch.stack(errors).mean(0)


def blind_error(training: Demonstrations, held_out: Demonstrations) -> Tensor:
    """The same of the best constant action: the median of the training. A policy that is not better sees nothing.

    Args:
        training: What the constant is taken from.
        held_out: What it is scored on.

    Returns:
        Shape ``(A,)``.
    """
    return (held_out.actions - training.actions.median(0).values).abs().mean(0)
