"""What a policy is given: tokens of an encoder with the robot's own state, or one of the controls."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.cortexbench.demonstrations import SCENE_STATE
from benchmarks.cortexbench.presets import Features
from theia.errors import ConfigError
from theia.policies.sight import PIXELS, Sight, features_of_noise, open_sight
from theia.probing.datasets import IMAGE_SIZE, fingerprint
from theia.probing.frame_tokens import TokensOf
from theia.trajectories import lerobot
from theia.trajectories.lerobot import Episode, LeRobotFolder
from theia.utils.pictures import short_labels

BLIND, STATE = "blind", "state"
CONTROLS = {
    BLIND: "no picture, only the robot's own state",
    STATE: "no picture, but the simulator's whole state, goal included: what a policy can reach that sees everything",
    PIXELS: "16x16 mean colours",
}


@dataclass(frozen=True)
class Eyes:
    """What one row of the table sees.

    Attributes:
        name: Name as the user gave it.
        label: Short name, for tables and folders.
        tokens_of: Gives tokens for pictures; ``None`` for a control that sees none.
        channels: Number of channels of the tokens; 0 without pictures.
        grid: Rows and columns of the tokens.
        look: Fingerprint of what the encoder gives for one picture, which changes with its weights.
        of_noise: Mean of each channel over the tokens of that picture.
        proprioception: Number of values that the robot of the task at hand knows of itself; 0 before there is a task.
    """

    name: str
    label: str
    tokens_of: TokensOf | None
    channels: int
    grid: tuple[int, int]
    look: str
    of_noise: tuple[float, ...]
    proprioception: int = 0

    @property
    def sight(self) -> Sight | None:
        """The same, if it is an encoder opened by its name."""
        return self.tokens_of if isinstance(self.tokens_of, Sight) else None

    def known(self, observations: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Values that are known beside the pictures, shape ``(B, K)``, of observations ``(B, S)``."""
        seen = observations if self.name == STATE else observations[:, : self.proprioception]
        return np.asarray(seen, np.float32)


class TaskRecording:
    """Demonstrations of one task as a recording of their own.

    Args:
        folder: Data set with demonstrations of any tasks.
        task: Full name of the task.
        most: Number of demonstrations that are used; ``None`` for all.

    Attributes:
        episodes: Episodes of the task, numbered from 0 without gaps.
    """

    def __init__(self, folder: LeRobotFolder, task: str, most: int | None) -> None:
        self.folder = folder
        self.originals = [episode for episode in folder.episodes if episode.tasks == (task,)][:most]
        starts = np.cumsum([0, *(episode.length for episode in self.originals)]).tolist()
        self.episodes = tuple(
            replace(episode, index=number, start=start)
            for number, (episode, start) in enumerate(zip(self.originals, starts[:-1], strict=True))
        )
        self.frame_count = starts[-1]

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Rows of the frames in the whole data set."""
        return np.concatenate([np.arange(one.start, one.start + one.length) for one in self.originals])

    @property
    def seeds(self) -> frozenset[int]:
        """Seeds of the demonstrations, as far as they are known."""
        return frozenset(int(one.record["seed"]) for one in self.originals if "seed" in one.record)

    def identity(self, camera: str) -> str:
        """Fingerprint of the demonstrations: what is known of each, all actions and states, and the first pictures."""
        numbers = (lerobot.ACTION, lerobot.STATE, SCENE_STATE)
        columns = [self.folder.column(key)[self.rows] for key in self.folder.features if key in numbers]
        pictures = [np.asarray(self.folder.frame(one, 0, camera)) for one in self.originals]
        about = [[one.length, dict(one.record)] for one in self.originals]
        return fingerprint(about, *columns, *pictures)

    def frames(self, episode: Episode, camera: str, indices: Iterable[int]) -> Iterator[Image.Image]:
        """Decodes frames of an episode, ascending."""
        return self.folder.frames(self.originals[episode.index], camera, indices)


def open_all(names: Sequence[str], features: Features, device: torch.device) -> list[Eyes]:
    """Opens encoders and controls.

    Args:
        names: Names as the user gave them: those of controls, or encoders in the forms of
            :data:`theia.encoder.FORMS`.
        features: ``spatial`` for patch tokens; ``vector`` for the CLS token, or else the mean of the patch tokens.
        device: Device of the encoders.

    Raises:
        ConfigError: If a name is given twice or names nothing, or an encoder has no spatial features.
    """
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise ConfigError(f"--encoders names {twice[0]} twice. Name each once.")
    labels = short_labels(names)
    return [_open(name, labels[name], features, device) for name in names]


def _open(name: str, label: str, features: Features, device: torch.device) -> Eyes:
    if name in (BLIND, STATE):
        return Eyes(name, label, None, 0, (1, 1), fingerprint(name), (0.0,))
    sight = open_sight(name, features, device, {control: f"control: {what}" for control, what in CONTROLS.items()})
    tokens, of_noise = features_of_noise(sight, IMAGE_SIZE)
    if features == "spatial" and tokens.patches.shape[1] < 2:
        raise ConfigError(f"{name} gives one vector per picture, no spatial features. Take --features vector.")
    look = fingerprint(name, features, list(tokens.grid), tokens.patches.float().cpu().numpy())
    return Eyes(name, label, sight, tokens.patches.shape[2], tokens.grid, look, tuple(of_noise))
