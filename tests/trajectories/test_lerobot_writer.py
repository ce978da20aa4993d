"""What is written is opened by LeRobot itself, and survives a kill between any two files."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from theia.errors import TrajectoryError
from theia.probing.datasets import of_files
from theia.trajectories.lerobot import LeRobotFolder
from theia.trajectories.lerobot_writer import LeRobotWriter

CAMERA = "observation.images.top"
LENGTHS = (12, 7, 20)

needs_lerobot = pytest.mark.skipif(
    importlib.util.find_spec("lerobot") is None,
    reason="LeRobot is not installed; it holds torch and others back, so give it an environment of its own: "
    "pip install lerobot && pip install '.[dev]'",
)


def open_writer(root: Path, pictures: Literal["video", "image"] = "video", **options: Any) -> LeRobotWriter:
    values = {"action": ["x", "y"], "observation.state": ["x", "y", "z"], "reward": ["r"]}
    return LeRobotWriter(root, 10, values, {CAMERA: (48, 64)}, ["push", "pull"], pictures, **options)


def episode(index: int, length: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(index)
    frames = np.zeros((length, 48, 64, 3), np.uint8)
    frames[..., 0] = 12 * np.arange(length)[:, None, None]
    frames[..., 1] = 80 * index
    sizes = {"action": 2, "observation.state": 3, "reward": 1}
    return (
        "push" if index < 2 else "pull",
        {key: rng.normal(size=(length, n)) for key, n in sizes.items()},
        {CAMERA: frames},
    )


def record(root: Path, pictures: Literal["video", "image"] = "video") -> None:
    writer = open_writer(root, pictures)
    for index, length in enumerate(LENGTHS):
        writer.write(index, *episode(index, length), {"seed": index})
    assert writer.finish() == 3


@pytest.mark.parametrize("pictures", ["video", "image"])
def test_what_was_written_is_read_back(tmp_path: Path, pictures: Literal["video", "image"]) -> None:
    record(tmp_path / "data", pictures)
    folder = LeRobotFolder(tmp_path / "data")
    assert folder.tasks == ["push", "push", "pull"]
    for part in folder.episodes:
        _, values, frames = episode(part.index, part.length)
        for key, expected in values.items():
            rows = folder.column(key)[part.start : part.start + part.length]
            np.testing.assert_array_equal(rows, expected.astype(np.float32))
        found = np.stack([np.asarray(frame) for frame in folder.frames(part, CAMERA, range(part.length))])
        assert np.abs(found.astype(int) - frames[CAMERA]).max() <= (0 if pictures == "image" else 5)


@needs_lerobot
@pytest.mark.parametrize("pictures", ["video", "image"])
def test_lerobot_opens_it(tmp_path: Path, pictures: Literal["video", "image"]) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    record(tmp_path / "data", pictures)
    data = LeRobotDataset("x/y", root=tmp_path / "data", video_backend="pyav")
    assert (len(data), data.meta.total_episodes) == (39, 3)
    place = 0
    for index, length in enumerate(LENGTHS):
        task, values, frames = episode(index, length)
        for frame in range(length):
            item = data[place + frame]
            assert (item["task"], int(item["episode_index"]), int(item["frame_index"])) == (task, index, frame)
            np.testing.assert_array_equal(item["action"].numpy(), values["action"][frame].astype(np.float32))
            level = (item[CAMERA].numpy() * 255).transpose(1, 2, 0)
            assert np.abs(level - frames[CAMERA][frame]).max() <= 5.5
        place += length
    every = np.concatenate([episode(index, length)[1]["action"] for index, length in enumerate(LENGTHS)])
    np.testing.assert_allclose(data.meta.stats["action"]["mean"], every.mean(0), atol=1e-6)
    np.testing.assert_allclose(data.meta.stats["action"]["std"], every.std(0), atol=1e-6)


def test_a_data_set_that_is_finished_once_more_stays_the_same(tmp_path: Path) -> None:
    record(tmp_path)
    before = of_files(str(tmp_path))
    assert open_writer(tmp_path).finish() == 3
    assert of_files(str(tmp_path)) == before
    writer = open_writer(tmp_path)
    writer.write(3, *episode(3, 5))
    assert writer.finish() == 4
    assert len(LeRobotFolder(tmp_path).episodes) == 4


def test_statistics_of_the_whole_are_those_of_all_frames(tmp_path: Path) -> None:
    record(tmp_path / "data")
    statistics = json.loads((tmp_path / "data/meta/stats.json").read_text())
    every = np.concatenate([episode(index, length)[1]["action"] for index, length in enumerate(LENGTHS)])
    for name, expected in (
        ("mean", every.mean(0)),
        ("std", every.std(0)),
        ("min", every.min(0)),
        ("max", every.max(0)),
    ):
        np.testing.assert_allclose(statistics["action"][name], expected, atol=1e-9)
    assert statistics["action"]["count"] == [39]


KILLED = """
import sys
from pathlib import Path
import os, signal
sys.path[:0] = [{root!r}, {root!r} + '/tests']
import theia.trajectories.lerobot_writer as writer
from trajectories.test_lerobot_writer import episode, open_writer
whole, left = writer.replacing, [{files}]
def replacing(path, *a, **k):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return whole(path, *a, **k)
writer.replacing = replacing
def write_whole(path, content):
    with writer.replacing(path) as temporary:
        temporary.write_text(content)
if {beginning}:
    writer.write_whole = write_whole
data = open_writer(Path({data!r}))
for index in range(2):
    data.write(index, *episode(index, 7))
data.finish()
"""


@pytest.mark.parametrize(("files", "beginning"), [(n, False) for n in (0, 1, 2, 4, 6, 7)] + [(0, True), (1, True)])
def test_a_killed_recording_goes_on(tmp_path: Path, files: int, beginning: bool) -> None:
    data, root = tmp_path / "data", Path(__file__).parents[2]
    code = KILLED.format(root=str(root), data=str(data), files=files, beginning=beginning)
    killed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    writer = open_writer(data)
    for index in range(2):
        if not writer.has(index):
            writer.write(index, *episode(index, 7))
    writer.finish()
    whole = tmp_path / "whole"
    other = open_writer(whole)
    for index in range(2):
        other.write(index, *episode(index, 7))
    other.finish()
    one, two = LeRobotFolder(data), LeRobotFolder(whole)
    np.testing.assert_array_equal(one.column("action"), two.column("action"))
    for part in one.episodes:
        for a, b in zip(one.frames(part, CAMERA, range(7)), two.frames(part, CAMERA, range(7)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_missing_episode_is_named_and_other_columns_are_refused(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "data")
    with pytest.raises(TrajectoryError, match="No episode"):
        writer.finish()
    writer.write(1, *episode(1, 7))
    with pytest.raises(TrajectoryError, match="Episode 0"):
        writer.finish()
    with pytest.raises(TrajectoryError, match="tasks"):
        LeRobotWriter(tmp_path / "data", 10, {"action": ["x"]}, {}, ["push"])


@pytest.mark.parametrize("fault", ["length", "nan", "size", "task", "column"])
def test_an_episode_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, fault: str) -> None:
    writer = open_writer(tmp_path / "data")
    task, values, pictures = episode(0, 7)
    if fault == "length":
        values["action"] = values["action"][:-1]
    elif fault == "nan":
        values["action"][3] = np.nan
    elif fault == "size":
        pictures[CAMERA] = pictures[CAMERA][:, :-2]
    elif fault == "task":
        task = "fly"
    else:
        del values["reward"]
    with pytest.raises(TrajectoryError):
        writer.write(0, task, values, pictures)
    assert not writer.has(0)
    assert not list((tmp_path / "data").rglob("*.parquet"))
