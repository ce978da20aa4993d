"""Behaviour cloning: a policy is fitted to demonstrations, and goes on exactly where it was interrupted."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cortexbench.policies import Policy, history
from theia.errors import CheckpointError, ConfigError, DivergenceError
from theia.probing.frame_tokens import FrameTokens
from theia.utils.files import write_whole

BATCH_SIZE = 256
_LEARNING_RATE = 1e-3
_SAVE_EVERY_S = 20.0


@dataclass(frozen=True)
class Demonstrations:
    """All demonstrations of one task, frame by frame.

    Attributes:
        tokens: Tokens of an encoder, mapped from a file; ``None`` for a control that sees no picture.
        known: What is known beside the pictures, shape ``(frames, K)``.
        actions: What was done, shape ``(frames, A)``.
        rows: Rows of the frames that each step's action depends on, shape ``(frames, 3)``.
    """

    tokens: FrameTokens | None
    known: NDArray[np.float32]
    actions: NDArray[np.float32]
    rows: NDArray[np.int64]

    @staticmethod
    def of(
        tokens: FrameTokens | None, known: NDArray[np.float32], actions: NDArray[np.float32], lengths: list[int]
    ) -> "Demonstrations":
        """Makes them of what was recorded.

        Args:
            tokens: See above.
            known: See above.
            actions: See above.
            lengths: Number of frames of each demonstration.
        """
        return Demonstrations(tokens, known, actions, history(lengths))

    def __len__(self) -> int:
        return len(self.actions)

    def batch(self, policy: Policy, places: NDArray[np.int64], device: torch.device) -> tuple[Tensor | None, Tensor]:
        """What a policy is given for some steps. The tokens of three frames are put together here, and nowhere kept."""
        known = torch.from_numpy(self.known[places]).to(device)
        if self.tokens is None:
            return None, known
        rows = self.rows[places]
        patches = torch.from_numpy(self.tokens.tokens[rows.ravel()]).to(device).float()
        maps = policy.look(patches, self.tokens.grid)
        return maps.reshape(*rows.shape, *maps.shape[1:]), known


class Training:
    """One policy in training.

    Mean squared error on actions, Adam with a learning rate of 0.001, batches of 256. Epochs are counted from 0, as the
    paper does: epoch 99 is the hundredth. The order of the steps depends on seed and epoch alone, so that a training
    that was interrupted ends with the same weights as one that was not.

    Args:
        make_policy: Builds the policy; called with torch's random numbers seeded.
        demonstrations: What it is fitted to.
        seed: Seed of initial weights and order.
        path: File that the state is kept in.
        device: Device of the policy.

    Attributes:
        policy: The policy.
        losses: Mean loss of each finished epoch.
        seconds: Time of training so far.

    Raises:
        CheckpointError: If the file is damaged.
        ConfigError: If there are fewer than two steps.
    """

    def __init__(
        self,
        make_policy: Callable[[], Policy],
        demonstrations: Demonstrations,
        seed: int,
        path: Path,
        device: torch.device,
    ) -> None:
        if len(demonstrations) < 2:
            raise ConfigError("A policy is fitted to at least two steps, and the demonstrations have fewer. Add some.")
        self._demonstrations, self._seed, self._path, self._device = demonstrations, seed, path, device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.policy = make_policy().to(device)
        if demonstrations.tokens is not None:
            self.policy.reduction.fit(demonstrations.tokens)
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=_LEARNING_RATE)
        self.losses: list[float] = []
        self.seconds = 0.0
        if path.is_file():
            self._restore()

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
        self.policy.train()
        last_saved = time.monotonic()
        while len(self.losses) <= epoch:
            started = time.monotonic()
            self.losses.append(self._epoch(len(self.losses)))
            self.seconds += time.monotonic() - started
            if len(self.losses) > epoch or time.monotonic() - last_saved > _SAVE_EVERY_S:
                self._save()
                last_saved = time.monotonic()

    def step(self, places: NDArray[np.int64]) -> float:
        """Fits the policy to some steps of the demonstrations.

        Returns:
            The loss before.
        """
        frames, known = self._demonstrations.batch(self.policy, places, self._device)
        wanted = torch.from_numpy(self._demonstrations.actions[places]).to(self._device)
        loss = F.mse_loss(self.policy(frames, known), wanted)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        return float(loss.detach())

    def _epoch(self, epoch: int) -> float:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._demonstrations))
        total = 0.0
        for places in batches(order):
            total += self.step(places) * len(places)
        loss = total / len(order)
        if not np.isfinite(loss):
            raise DivergenceError(
                f"The loss is {loss} in epoch {epoch} of {self._path.parent}. Look for extreme values in the actions."
            )
        return loss

    def _save(self) -> None:
        state = {
            "policy": self.policy.state_dict(), "optimizer": self._optimizer.state_dict(), "losses": self.losses,
            "seconds": self.seconds,
        }  # fmt: skip
        write_whole(self._path, serialized(state))

    def _restore(self) -> None:
        try:
            state = torch.load(self._path, map_location=self._device, weights_only=True)
            self.policy.load_state_dict(state["policy"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.losses, self.seconds = list(state["losses"]), float(state["seconds"])
        except Exception as error:
            # Damaged files make torch raise nearly anything.
            raise CheckpointError(
                f"{self._path} cannot be read ({type(error).__name__}: {error}). Delete it to train that policy anew."
            ) from error


def batches(order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Divides steps into batches of 256. A single one that is left over joins the last: a batch norm needs two."""
    stops = list(range(BATCH_SIZE, len(order), BATCH_SIZE))
    if stops and len(order) - stops[-1] == 1:
        stops.pop()
    return np.split(order, stops)


def save_policy(policy: Policy, path: Path, about: dict[str, Any]) -> None:
    """Writes a finished policy with what it needs to be built again.

    Args:
        policy: The policy.
        path: File to write.
        about: What else is kept with it, such as the name of the encoder.

    Raises:
        FileError: If the disk is full.
    """
    write_whole(path, serialized({"options": policy.options, "policy": policy.state_dict(), **about}))


def load_policy(path: Path) -> tuple[Policy, dict[str, Any]]:
    """Reads a policy, ready to act, and what was kept with it.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    try:
        kept = dict(torch.load(path, map_location="cpu", weights_only=True))
        policy = Policy(**kept.pop("options"))
        policy.load_state_dict(kept.pop("policy"))
    except Exception as error:
        # Damaged files make torch raise nearly anything.
        raise CheckpointError(f"{path} cannot be read as a policy ({type(error).__name__}: {error}).") from error
    return policy.eval(), kept


def serialized(state: dict[str, Any]) -> bytes:
    """A checkpoint as bytes: torch's own writer does not say that a disk is full."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
