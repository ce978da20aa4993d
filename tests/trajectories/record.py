"""Writes the data sets in ``lerobot.tar.xz`` with LeRobot itself, in an environment of its own.

pip install lerobot==0.4.4 && python record.py v30    # format v3.0
pip install lerobot==0.3.3 && python record.py v21    # format v2.1
"""

import sys
from pathlib import Path

import numpy as np

LENGTHS = (12, 7, 20)
TASKS = ("push", "push", "pull")


def record(version: str, kind: str, root: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    sides = {"observation.images.top": (48, 64, 3), "observation.images.wrist": (64, 64, 3)}
    features = {
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        **{key: {"dtype": kind, "shape": s, "names": ["height", "width", "channels"]} for key, s in sides.items()},
    }
    data = LeRobotDataset.create("x/y", fps=10, features=features, root=root, use_videos=kind == "video")
    for episode, (length, task) in enumerate(zip(LENGTHS, TASKS, strict=True)):
        for frame in range(length):
            top, wrist = (np.zeros(shape, np.uint8) for shape in sides.values())
            top[..., 0], top[..., 1], wrist[..., 2] = frame * 12, episode * 80, frame * 12
            values = {
                "action": np.array([frame, episode], np.float32),
                "observation.state": np.array([frame, episode, 1], np.float32),
                "observation.images.top": top,
                "observation.images.wrist": wrist,
            }
            if version == "v21":
                data.add_frame(values, task=task)
            else:
                data.add_frame({**values, "task": task})
        data.save_episode()
    if hasattr(data, "finalize"):
        data.finalize()


if __name__ == "__main__":
    for kind in ("video", "image"):
        record(sys.argv[1], kind, Path(f"theirs_{sys.argv[1]}_{kind}"))
