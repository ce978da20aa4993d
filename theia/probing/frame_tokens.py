"""Tokens of all frames of a recording, computed once by a frozen encoder and kept in files mapped into memory."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from theia.errors import FeatureError
from theia.extraction.images import to_square
from theia.models.backbone import StudentTokens
from theia.probing.datasets import IMAGE_SIZE
from theia.trajectories.lerobot import Episode
from theia.utils.files import allocate, replacing, sync, writing
from theia.utils.progress import Progress

logger = logging.getLogger(__name__)

COMPONENTS = 24
_SAVE_EVERY_S = 20.0

TokensOf = Callable[[Tensor], StudentTokens]


class Recording(Protocol):
    """Episodes with pictures: a whole :class:`~theia.trajectories.lerobot.LeRobotFolder`, or a part of one."""

    @property
    def episodes(self) -> Sequence[Episode]:
        """Episodes, numbered from 0, one after another."""

    @property
    def frame_count(self) -> int:
        """Number of frames of all episodes."""

    def frames(self, episode: Episode, camera: str, indices: Iterable[int]) -> Iterator[Image.Image]:
        """Decodes frames of an episode, ascending."""


@dataclass(frozen=True)
class FrameTokens:
    """Tokens of the frames of all episodes, one after another.

    Attributes:
        tokens: float16, shape ``(frames, N, C)``, mapped from a file.
        grid: Rows and columns of the tokens, ``N = H * W``.
        mean: Mean of each channel over all tokens of the training frames, before any averaging, shape ``(C,)``.
        correlation: Correlation of the channels over the same tokens, shape ``(C, C)``.
        deviation: Standard deviation of each channel, shape ``(C,)``; 1 where it is zero.
    """

    tokens: NDArray[np.float16]
    grid: tuple[int, int]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    correlation: NDArray[np.float64]

    def components(self, count: int = COMPONENTS) -> NDArray[np.float32]:
        """First principal components of the standardised channels, as columns, shape ``(C, at most count)``."""
        _, vectors = np.linalg.eigh(self.correlation)
        return np.ascontiguousarray(vectors[:, ::-1][:, :count], np.float32)

    def projected(self, places: NDArray[np.int64], components: NDArray[np.float32]) -> NDArray[np.float32]:
        """Standardised tokens of some frames in terms of components, flattened, shape ``(n, N * components)``."""
        standardised = (self.tokens[places].astype(np.float32) - self.mean.astype(np.float32)) / self.deviation.astype(
            np.float32
        )
        return np.asarray((standardised @ components).reshape(len(places), -1), np.float32)


def embed(
    tokens_of: TokensOf,
    name: str,
    recording: Recording,
    camera: str,
    training: frozenset[int],
    folder: Path,
    device: torch.device,
    batch_size: int,
    most_rows: int | None,
) -> FrameTokens:
    """Computes the tokens of every frame, or goes on where an interrupted run stopped.

    Every frame is decoded once, squashed to a square, and given to the encoder.

    Args:
        tokens_of: Gives tokens for images, uint8 of shape ``(B, 3, S, S)``.
        name: Name of the encoder, for the progress bar and messages.
        recording: The data set.
        camera: Key of the camera.
        training: Numbers of the episodes whose tokens count for mean and components.
        folder: Where the files lie; of this encoder, these data and these options alone.
        device: Device of the encoder.
        batch_size: Number of frames that are given together.
        most_rows: Number of rows and of columns that a finer grid of tokens is averaged to; ``None`` for none.

    Raises:
        TrajectoryError: If a frame cannot be read. The message names file and episode.
        FeatureError: If tokens are not finite, or too large for float16.
        FileError: If the disk is full.
    """
    state = _State.read(folder)
    file = folder / "tokens.npy"
    if state.episodes == len(recording.episodes):
        return state.result(np.load(file, mmap_mode="r"))
    ahead = _frames(recording, camera, state.episodes, batch_size)
    kept: np.memmap[Any, Any] | None = np.lib.format.open_memmap(file, "r+") if state.episodes else None
    last_saved = time.monotonic()
    done = recording.episodes[state.episodes].start
    with Progress(f"{name}: frames", recording.frame_count - done, unit="frame") as progress:
        for episode, start, pixels in ahead:
            tokens = tokens_of(torch.from_numpy(pixels).to(device))
            patches = tokens.patches.float()
            if not bool(patches.isfinite().all()) or float(patches.abs().max()) > np.finfo(np.float16).max:
                raise FeatureError(
                    f"{name} gives tokens for episode {episode.index} that are not finite, or too large for float16. "
                    "Check its weights."
                )
            if episode.index in training:
                state.add(patches)
            small, grid = _averaged(patches, tokens.grid, most_rows)
            if kept is None:
                kept = _new_file(file, (recording.frame_count, *small.shape[1:]))
            state.grid = grid
            place = episode.start + start
            kept[place : place + len(small)] = small.cpu().numpy()
            progress.advance(len(small))
            if start + len(small) == episode.length:
                state.episodes = episode.index + 1
                if time.monotonic() - last_saved > _SAVE_EVERY_S or state.episodes == len(recording.episodes):
                    kept.flush()
                    sync(file)
                    state.write(folder)
                    last_saved = time.monotonic()
    return state.result(np.load(file, mmap_mode="r"))


class _State:
    """How far an embedding is, with sums over the training tokens so far."""

    def __init__(self) -> None:
        self.episodes = 0  # finished
        self.grid = (0, 0)
        self.count = 0.0
        self.shift: NDArray[np.float64] | None = None  # near the mean: squares of large means would lose digits
        self.sums: NDArray[np.float64] | None = None
        self.squares: NDArray[np.float64] | None = None

    def add(self, patches: Tensor) -> None:
        flat = patches.flatten(0, 1)
        if self.shift is None:
            self.shift = flat.mean(0).double().cpu().numpy()
            self.sums = np.zeros(len(self.shift))
            self.squares = np.zeros((len(self.shift), len(self.shift)))
        centred = flat - torch.from_numpy(self.shift).to(flat)
        self.count += len(flat)
        self.sums = self.sums + centred.sum(0).double().cpu().numpy()
        self.squares = self.squares + (centred.T @ centred).double().cpu().numpy()

    @staticmethod
    def read(folder: Path) -> "_State":
        state, path = _State(), folder / "state.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                state.episodes, state.grid, state.count = about["episodes"], tuple(about["grid"]), about["count"]
                if state.count:
                    state.shift, state.sums, state.squares = file["shift"], file["sums"], file["squares"]
        return state

    def write(self, folder: Path) -> None:
        arrays = {} if self.shift is None else {"shift": self.shift, "sums": self.sums, "squares": self.squares}
        about = json.dumps({"episodes": self.episodes, "grid": self.grid, "count": self.count})
        with replacing(folder / "state.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, about=np.array(about), **arrays)  # type: ignore[arg-type]

    def result(self, tokens: NDArray[np.float16]) -> FrameTokens:
        channels = tokens.shape[-1]
        if self.shift is None or self.sums is None or self.squares is None:  # data that are only tested on
            return FrameTokens(tokens, self.grid, np.zeros(channels), np.ones(channels), np.eye(channels))
        mean = self.sums / self.count
        covariance = self.squares / self.count - np.outer(mean, mean)
        deviation = np.sqrt(np.clip(np.diag(covariance), 0, None))
        deviation = np.where(deviation > 0, deviation, 1)
        return FrameTokens(tokens, self.grid, self.shift + mean, deviation, covariance / np.outer(deviation, deviation))


def pixel_means(images: Tensor) -> StudentTokens:
    """The control ``pixels``: means over 16x16 places, as three channels in 0..1."""
    means = F.adaptive_avg_pool2d(images.float() / 255, 16).flatten(2).transpose(1, 2)
    return StudentTokens(None, means[:, :0], means, (16, 16))


def _new_file(file: Path, shape: tuple[int, ...]) -> "np.memmap[Any, Any]":
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            kept = np.lib.format.open_memmap(file, "w+", np.float16, shape)
            allocate(file)
        except OSError:
            file.unlink(missing_ok=True)
            raise
    return kept


def _averaged(patches: Tensor, grid: tuple[int, int], most_rows: int | None) -> tuple[Tensor, tuple[int, int]]:
    rows, columns = grid if most_rows is None else (min(grid[0], most_rows), min(grid[1], most_rows))
    if (rows, columns) == grid:
        return patches, grid
    maps = patches.transpose(1, 2).reshape(len(patches), patches.shape[2], *grid)
    return F.adaptive_avg_pool2d(maps, (rows, columns)).flatten(2).transpose(1, 2), (rows, columns)


def _frames(
    recording: Recording, camera: str, first: int, batch_size: int
) -> Iterator[tuple[Episode, int, NDArray[np.uint8]]]:
    """Episode, number of the first frame, and pixels ``(B, 3, S, S)``, decoded a batch ahead."""

    def decode(episode: Episode, start: int) -> NDArray[np.uint8]:
        stop = min(start + batch_size, episode.length)
        pictures = recording.frames(episode, camera, range(start, stop))
        return np.stack([to_square(picture, IMAGE_SIZE, "squash") for picture in pictures])

    places = [
        (episode, start) for episode in recording.episodes[first:] for start in range(0, episode.length, batch_size)
    ]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(decode, *places[0]) if places else None
        for number, (episode, start) in enumerate(places):
            assert ahead is not None
            pixels = ahead.result()
            ahead = pool.submit(decode, *places[number + 1]) if number + 1 < len(places) else None
            yield episode, start, pixels
