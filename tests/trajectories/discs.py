"""Discs that run towards the middle: recordings whose every motion is known."""

from pathlib import Path

import numpy as np

from theia.trajectories.lerobot_writer import LeRobotWriter

CAMERA = "observation.images.top"
SIDE = 64
EPISODES, FRAMES, HORIZON = 25, 10, 4


def paths(seed: int = 0, episodes: int = EPISODES, frames: int = FRAMES) -> np.ndarray:
    """Positions that run towards the middle, so that one frame tells what comes: (episodes, T, 2)."""
    starts = np.random.default_rng(seed).uniform(8, SIDE - 8, (episodes, 1, 2))
    return SIDE / 2 + (starts - SIDE / 2) * 0.93 ** np.arange(frames)[None, :, None]


def pictures(path: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    inside = (x - path[:, None, None, 0]) ** 2 + (y - path[:, None, None, 1]) ** 2 < 36
    return np.where(inside[..., None], np.uint8([230, 30, 30]), np.uint8([20, 20, 20])).astype(np.uint8)


def record(
    root: Path,
    seed: int = 0,
    shuffled: bool = False,
    absolute: bool = False,
    episodes: int = EPISODES,
    frames: int = FRAMES,
) -> Path:
    names = ["x", "y"]
    values = {"action": names if absolute else ["dx", "dy"], "observation.state": names}
    writer = LeRobotWriter(root, 10, values, {CAMERA: (SIDE, SIDE)}, ["reach"], "image")
    every = paths(seed, episodes, frames)
    shown = np.stack([pictures(path) for path in every])
    if shuffled:
        flat = shown.reshape(-1, SIDE, SIDE, 3)
        shown = flat[np.random.default_rng(1).permutation(len(flat))].reshape(shown.shape)
    for index, path in enumerate(every):
        following = np.concatenate([path[1:], path[-1:]])
        action = following if absolute else following - path
        writer.write(index, "reach", {"action": action, "observation.state": path}, {CAMERA: shown[index]})
    writer.finish()
    return root
