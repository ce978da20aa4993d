"""Demonstrations: from a file, or a small task made up here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from theia.errors import ConfigError, FeatureError, ShapeError
from theia.extraction.images import to_square
from theia.trajectories.lerobot import ACTION, STATE, LeRobotFolder

SQUARE = (230, 30, 40)  # RGB


@dataclass(frozen=True)
class Demonstrations:
    """Steps of all episodes, one after another.

    Attributes:
        images: RGB, uint8, shape ``(T, H, W, 3)``.
        actions: What was done, float32, shape ``(T, A)``.
        episodes: Which episode each step belongs to, int64, shape ``(T,)``.
        proprioception: State of the robot, float32, shape ``(T, P)``, or ``None``.
        frames_per_s: Rate of the steps, if it is known.
        action_names: Names of the values of an action, as far as they are known.
        state_names: Names of the values of the state, as far as they are known.
    """

    images: Tensor
    actions: Tensor
    episodes: Tensor
    proprioception: Tensor | None = None
    frames_per_s: float | None = None
    action_names: tuple[str, ...] = ()
    state_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, steps: Tensor) -> "Demonstrations":
        """The same with some of the steps; ``steps`` holds indices or a mask."""
        state = None if self.proprioception is None else self.proprioception[steps]
        images, actions, episodes = self.images[steps], self.actions[steps], self.episodes[steps]
        return replace(self, images=images, actions=actions, episodes=episodes, proprioception=state)

    def split(self, held_out: float, seed: int) -> tuple["Demonstrations", "Demonstrations"]:
        """Holds out whole episodes: neighbouring steps look alike, so a split by steps would hide overfitting.

        Args:
            held_out: Share of the episodes; at least one is held out, and one is left.
            seed: Seed of the choice.

        Returns:
            Those to train on, and those held out.

        Raises:
            ConfigError: If there are fewer than two episodes, or the share is not between 0 and 1.
        """
        names = torch.unique(self.episodes)
        if len(names) < 2:
            raise ConfigError(f"{len(names)} episode; one to train on and one to hold out are needed. Record more.")
        if not 0 < held_out < 1:
            raise ConfigError(f"held_out is {held_out}; it is a share of the episodes, above 0 and below 1.")
        count = min(max(1, round(held_out * len(names))), len(names) - 1)
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        mask = torch.isin(self.episodes, names[order[:count]])
        return self[~mask], self[mask]

    def in_order(self) -> "Demonstrations":
        """The same with each episode in one piece, its steps in their order."""
        return self[torch.argsort(self.episodes, stable=True)]

    @property
    def lengths(self) -> list[int]:
        """Number of steps of each episode, where each is in one piece."""
        return [len(part) for part in np.split(self.episodes, np.flatnonzero(np.diff(self.episodes)) + 1)]

    def pictures(self, rows: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
        """Images as an encoder is given them, uint8, shape ``(n, 3, size, size)``."""
        images = self.images.numpy()
        return np.stack([to_square(Image.fromarray(images[row]), size, "squash") for row in rows])


def read_demonstrations(path: Path) -> Demonstrations:
    """Reads ``.npz`` or HDF5 into memory.

    Args:
        path: Holds the arrays of :class:`Demonstrations`, by their names.

    Raises:
        ConfigError: If the file is missing or of another kind, or an array is missing.
        ShapeError: If an array has another shape or type than it must have.
        FeatureError: If actions or proprioception hold values that are no numbers.
    """
    if not path.is_file():
        raise ConfigError(
            f"There is no file {path}. Give an .npz or HDF5 file, a folder of LeRobot, or none for "
            "the task made up here."
        )
    try:
        if path.suffix == ".npz":
            with np.load(path) as archive:
                arrays = {name: archive[name] for name in archive.files}
        else:
            with h5py.File(path) as file:
                arrays = {name: item[()] for name, item in file.items() if isinstance(item, h5py.Dataset)}
    except Exception as error:
        # Damaged files make both libraries raise nearly anything.
        raise ConfigError(f"{path} cannot be read as .npz or HDF5 ({error}). Write it again.") from error
    return _checked(arrays, path)


def read_recording(folder: LeRobotFolder, camera: str | None, size: int) -> Demonstrations:
    """Reads a data set of LeRobot into memory, 150 kB for each frame of 224 pixels.

    Args:
        folder: The data set, whose columns ``action`` and, if there is one, ``observation.state`` are taken.
        camera: Name of the camera; by default, the only one.
        size: Height and width that frames are squashed to, in pixels.

    Raises:
        ConfigError: If there is no such camera or no action.
        TrajectoryError: If a file is damaged.
    """
    key, actions = folder.camera(camera), folder.column(ACTION)
    images = np.empty((folder.frame_count, size, size, 3), np.uint8)
    for episode in tqdm(folder.episodes, "decode", unit="episode", disable=None):
        for step, frame in enumerate(folder.frames(episode, key, range(episode.length)), episode.start):
            images[step] = to_square(frame, size, "squash").transpose(1, 2, 0)
    return Demonstrations(
        torch.from_numpy(images),
        torch.from_numpy(actions),
        torch.from_numpy(np.repeat([one.index for one in folder.episodes], [one.length for one in folder.episodes])),
        torch.from_numpy(folder.column(STATE)) if STATE in folder.features else None,
        folder.frames_per_s,
        folder.features[ACTION].names or (),
        folder.features[STATE].names or () if STATE in folder.features else (),
    )


def colored_square(
    episodes: int = 200, steps: int = 4, image_size: int = 96, seed: int = 0, side: int | None = None
) -> Demonstrations:
    """A task that needs sight: a red square glides over a background, and the action is where it is.

    The background of each episode is coloured noise with the spectrum of photographs (amplitude inverse to the
    frequency), and the camera shakes. Neither says anything about the square, nor does the number of the step.

    Args:
        episodes: Number of episodes.
        steps: Number of steps of each episode.
        image_size: Height and width of an image, in pixels.
        seed: Seed of everything that is drawn.
        side: Height and width of the square, in pixels; a sixth of the image by default.

    Returns:
        Actions are centres of the square, x and y from -1 (left, top) to 1.
    """
    rng = np.random.default_rng(seed)
    side = side or image_size // 6
    images = np.empty((episodes * steps, image_size, image_size, 3), np.uint8)
    actions = np.empty((episodes * steps, 2), np.float32)
    for episode in range(episodes):
        background = _photo_like(rng, image_size)
        ends = rng.uniform(0, image_size - side, (2, 2))
        for step, share in enumerate(np.linspace(0, 1, steps)):
            left, top = (int(value) for value in (1 - share) * ends[0] + share * ends[1])
            row = episode * steps + step
            images[row] = np.roll(background, rng.integers(image_size, size=2), (0, 1))  # the noise has no edges
            images[row, top : top + side, left : left + side] = SQUARE
            actions[row] = (2 * left / (image_size - side) - 1, 2 * top / (image_size - side) - 1)
    numbers = torch.arange(episodes).repeat_interleave(steps)
    return Demonstrations(torch.from_numpy(images), torch.from_numpy(actions), numbers)


def _photo_like(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf  # no mean: it is set below
    spectrum = np.fft.rfft2(rng.normal(size=(4, size, size))) / frequency
    noise = np.fft.irfft2(spectrum, (size, size))
    noise /= noise.std((1, 2), keepdims=True)
    # Colours of a photograph go together: one part is common to all.
    pixels = 0.95 * noise[:1] + 0.3 * noise[1:]
    return np.asarray((128 + 45 * pixels).clip(0, 255).transpose(1, 2, 0), np.uint8)


def _checked(arrays: Mapping[str, NDArray[Any]], path: Path) -> Demonstrations:
    missing = [name for name in ("images", "actions", "episodes") if name not in arrays]
    if missing:
        raise ConfigError(
            f"{path} has no array {missing[0]!r}; it has: {', '.join(arrays) or 'none'}. Needed are images "
            "(T, H, W, 3) uint8, actions (T, A) and episodes (T,); proprioception (T, P) is optional."
        )
    images, actions, episodes = arrays["images"], arrays["actions"], arrays["episodes"]
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ShapeError(f"images in {path}: {images.dtype} {images.shape}; needed is uint8 (T, H, W, 3), RGB.")
    dimensions = {"actions": 2, "episodes": 1, "proprioception": 2}
    for name, count in dimensions.items():
        if name in arrays and (arrays[name].ndim != count or len(arrays[name]) != len(images)):
            raise ShapeError(
                f"{name} in {path} has shape {arrays[name].shape}; needed are {count} dimensions, the first with one "
                f"entry for each of the {len(images)} images."
            )
        if name != "episodes" and name in arrays and not np.isfinite(arrays[name]).all():
            raise FeatureError(f"{name} in {path} has values that are no numbers. Leave those steps out.")
    # Names of episodes may be numbers or text.
    _, numbers = np.unique(episodes, return_inverse=True)
    state = arrays.get("proprioception")
    return Demonstrations(
        torch.from_numpy(images),
        torch.from_numpy(actions.astype(np.float32)),
        torch.from_numpy(numbers.astype(np.int64)),
        None if state is None else torch.from_numpy(state.astype(np.float32)),
    )
