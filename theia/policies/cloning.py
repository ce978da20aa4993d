"""Behaviour cloning: a policy is fitted to demonstrations, and goes on exactly where it was interrupted."""

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theia.errors import CheckpointError, ConfigError, DivergenceError
from theia.policies import HeadKind
from theia.policies.action_heads import HEADS, Head
from theia.policies.demonstrated import Demonstrations, PicturesOf, batches, updates_per_epoch
from theia.policies.sight import Sight
from theia.utils.files import write_whole

_SAVE_EVERY_S = 20.0
_AT_ONCE = 16  # pictures that a trained encoder keeps its activations of


@dataclass(frozen=True)
class Recipe:
    """How a head is trained.

    Attributes:
        batch_size: Number of steps of the demonstrations in one update.
        learning_rate: Learning rate of the head, for Adam, or for AdamW where there is a weight decay.
        weight_decay: Weight decay of the head.
        cosine: Whether the learning rates go down to zero along a cosine.
        updates: Usual number of updates; ``None`` where the length of a training is usually said in epochs.
    """

    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    cosine: bool = False
    updates: int | None = None


# Source: Theia, appendices on CortexBench, on the WidowX arm, and on Spot.
RECIPES: Mapping[HeadKind, Recipe] = {
    "mlp": Recipe(256, 1e-3),
    "chunk": Recipe(16, 1e-4, weight_decay=0.01),
    "diffusion": Recipe(32, 3e-4, cosine=True, updates=3000),
}


@dataclass(frozen=True)
class FineTuning:
    """An encoder that is trained with the policy.

    Its parameters that are not frozen are trained. It stays in evaluation mode, since the statistics of a
    batch norm would follow the few pictures that are encoded at once.

    Attributes:
        sight: The encoder, which is changed in place.
        learning_rate: Its learning rate.
    """

    sight: Sight
    learning_rate: float


class Training:
    """One policy in training.

    Loss, optimiser and batch size are those of the head's recipe. Epochs are counted from 0, as the paper does: epoch
    99 is the hundredth. The order of the steps depends on seed and epoch alone, so that a training that was interrupted
    ends with the same weights as one that was not.

    Args:
        make_head: Builds the head; called with torch's random numbers seeded.
        demonstrations: What it is fitted to.
        seed: Seed of initial weights and order.
        path: File that the state is kept in, for a training that may be interrupted.
        device: Device of the head.
        epochs: Number of epochs of the whole training, along which a cosine goes.
        recipe: How to train; by default, as is usual for the head.
        tuning: An encoder to train too, on the same device; the demonstrations then give pictures.

    Attributes:
        head: The head.
        losses: Mean loss of each finished epoch.
        seconds: Time of training so far.

    Raises:
        CheckpointError: If the file is damaged.
        ConfigError: If there are fewer than two steps.
    """

    def __init__(
        self,
        make_head: Callable[[], Head],
        demonstrations: Demonstrations,
        seed: int,
        path: Path | None,
        device: torch.device,
        epochs: int = 100,
        recipe: Recipe | None = None,
        tuning: FineTuning | None = None,
    ) -> None:
        if len(demonstrations) < 2:
            raise ConfigError("A policy is fitted to at least two steps, and the demonstrations have fewer. Add some.")
        self._demonstrations, self._seed, self._path, self._device = demonstrations, seed, path, device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.head = make_head().to(device)
        if demonstrations.tokens is not None:
            self.head.reduction.fit(demonstrations.tokens)
        self.head.fit_scale(torch.from_numpy(demonstrations.actions), torch.from_numpy(demonstrations.known))
        self._recipe, self._tuning = recipe or RECIPES[self.head.kind], tuning
        self._updates = epochs * updates_per_epoch(len(demonstrations), self._recipe.batch_size)
        free = [] if tuning is None else [one for one in tuning.sight.parameters() if one.requires_grad]
        # AdamW without a weight decay is Adam; states of either can be restored.
        adam = torch.optim.AdamW if self._recipe.weight_decay else torch.optim.Adam
        groups: list[dict[str, Any]] = [{"params": list(self.head.parameters()), "lr": self._recipe.learning_rate}]
        if tuning is not None:
            groups.append({"params": free, "lr": tuning.learning_rate})
        self._optimizer = adam(groups, weight_decay=self._recipe.weight_decay)
        self._rates = [float(group["lr"]) for group in groups]
        self.losses: list[float] = []
        self.seconds = 0.0
        if path is not None and path.is_file():
            self._restore(path)

    def advance(self, epoch: int) -> None:
        """Trains until an epoch is finished, and keeps the state.

        Args:
            epoch: Number of the last epoch to train.

        Raises:
            DivergenceError: If the loss is not finite.
            FileError: If the disk is full.
        """
        if len(self.losses) > epoch:
            return
        self.head.train()
        last_saved = time.monotonic()
        while len(self.losses) <= epoch:
            started = time.monotonic()
            self.losses.append(self._epoch(len(self.losses)))
            self.seconds += time.monotonic() - started
            if self._path is not None and (len(self.losses) > epoch or time.monotonic() - last_saved > _SAVE_EVERY_S):
                self._save(self._path)
                last_saved = time.monotonic()

    def step(self, places: NDArray[np.int64], generator: torch.Generator | None = None) -> float:
        """Fits the head, and an encoder that is trained too, to some steps of the demonstrations.

        Args:
            places: Numbers of the steps.
            generator: Random numbers on the CPU, for a head that needs some.

        Returns:
            The loss before.
        """
        self._optimizer.zero_grad()
        pictures, known = self._demonstrations.pictures, None
        if self._tuning is not None and pictures is not None:
            known = torch.from_numpy(self._demonstrations.known[places]).to(self._device)
            loss = self._through_encoder(self._tuning.sight, pictures, places, known, generator)
        else:
            frames, known = self._demonstrations.batch(self.head, places, self._device)
            loss = self._loss(frames, known, places, generator)
            torch.autograd.backward(loss)
        self._optimizer.step()
        return float(loss.detach())

    def _loss(
        self, frames: Tensor | None, known: Tensor, places: NDArray[np.int64], generator: torch.Generator | None
    ) -> Tensor:
        wanted, counted = self._demonstrations.wanted(self.head, places, self._device)
        return self.head.loss(frames, known, wanted, counted, generator)

    def _through_encoder(
        self, sight: Sight, pictures_of: PicturesOf, places: NDArray[np.int64], known: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:  # fmt: skip
        """The loss, whose gradients are left in head and encoder.

        The encoder's activations for a whole batch would not fit into memory. So all pictures are encoded without
        keeping them; once the gradient of the tokens is known, the pictures are encoded again, a few at a time.
        """
        rows = self._demonstrations.rows[places]
        needed, inverse = np.unique(rows, return_inverse=True)
        parts = torch.split(torch.from_numpy(pictures_of(needed)), _AT_ONCE)
        with torch.no_grad():
            every = [sight(part.to(self._device)) for part in parts]
        patches = torch.cat([tokens.patches for tokens in every]).float()
        patches.requires_grad_(any(one.requires_grad for one in sight.parameters()))
        maps = self.head.look(patches, every[0].grid)
        frames = maps[torch.from_numpy(inverse.ravel()).to(self._device)].reshape(*rows.shape, *maps.shape[1:])
        loss = self._loss(frames, known, places, generator)
        torch.autograd.backward(loss)
        if patches.grad is not None:
            for part, gradient in zip(parts, torch.split(patches.grad, _AT_ONCE), strict=True):
                torch.autograd.backward(sight(part.to(self._device)).patches, gradient)
        return loss

    def _epoch(self, epoch: int) -> float:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._demonstrations))
        generator = torch.Generator().manual_seed(int(np.random.default_rng([self._seed, epoch, 1]).integers(2**62)))
        parts = batches(order, self._recipe.batch_size)
        total = 0.0
        for number, places in enumerate(parts):
            self._set_rates(epoch * len(parts) + number)
            total += self.step(places, generator) * len(places)
        loss = total / len(order)
        if not np.isfinite(loss):
            of = "" if self._path is None else f" of {self._path.parent}"
            raise DivergenceError(
                f"The loss is {loss} in epoch {epoch}{of}. Look for extreme values in the actions, "
                "or lower the learning rate."
            )
        return loss

    def _set_rates(self, update: int) -> None:
        if self._recipe.cosine:
            left = (1 + math.cos(math.pi * min(1.0, update / self._updates))) / 2
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = left * rate

    def _save(self, path: Path) -> None:
        state = {
            "policy": self.head.state_dict(), "optimizer": self._optimizer.state_dict(), "losses": self.losses,
            "seconds": self.seconds,
        }  # fmt: skip
        if self._tuning is not None:
            state["encoder"] = self._tuning.sight.state_dict()
        write_whole(path, serialized(state))

    def _restore(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
            _load_head(self.head, state["policy"])
            self._optimizer.load_state_dict(state["optimizer"])
            if self._tuning is not None:
                self._tuning.sight.load_state_dict(state["encoder"])
            self.losses, self.seconds = list(state["losses"]), float(state["seconds"])
        except Exception as error:
            # Damaged files make torch raise nearly anything.
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}: {error}). Delete it to train that policy anew."
            ) from error


def save_head(head: Head, path: Path, about: dict[str, Any]) -> None:
    """Writes a finished head with what it needs to be built again.

    Args:
        head: The head.
        path: File to write.
        about: What else is kept with it, such as the name of the encoder.

    Raises:
        FileError: If the disk is full.
    """
    state = {"head": head.kind, "options": head.options, "policy": head.state_dict(), **about}
    write_whole(path, serialized(state))


def load_head(path: Path) -> tuple[Head, dict[str, Any]]:
    """Reads a head, ready to act, and what was kept with it.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    try:
        kept = dict(torch.load(path, map_location="cpu", weights_only=True))
        # Until there were other heads, their names were not written.
        head = HEADS[kept.pop("head", "mlp")](**kept.pop("options"))
        _load_head(head, kept.pop("policy"))
    except Exception as error:
        # Damaged files make torch raise nearly anything.
        raise CheckpointError(f"{path} cannot be read as a policy ({type(error).__name__}: {error}).") from error
    return head.eval(), kept


def _load_head(head: Head, state: Mapping[str, Tensor]) -> None:
    # Until there was a scale, none was written, and there was none.
    scales = {name: tensor for name, tensor in head.state_dict().items() if name.endswith(("_offset", "_factor"))}
    head.load_state_dict({**(scales if head.scale == "none" else {}), **state})


def serialized(state: dict[str, Any]) -> bytes:
    """A checkpoint as bytes: torch's own writer does not say that a disk is full."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
