"""Data sets that LeRobot wrote are read; what is missing or damaged is named."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from trajectories.record import LENGTHS, TASKS

from theia.errors import ConfigError, TrajectoryError
from theia.trajectories.lerobot import LeRobotFolder, held_out

EVERY = ("theirs_v30_video", "theirs_v30_image", "theirs_v21_video", "theirs_v21_image")


@pytest.fixture
def copied(written_by_lerobot: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written_by_lerobot / "theirs_v30_video", tmp_path / "data"))


@pytest.mark.parametrize("name", EVERY)
def test_values_and_tasks_are_those_that_lerobot_wrote(written_by_lerobot: Path, name: str) -> None:
    folder = LeRobotFolder(written_by_lerobot / name)
    assert [episode.length for episode in folder.episodes] == list(LENGTHS)
    assert folder.tasks == list(TASKS)
    assert folder.features["action"].names == ("x", "y")
    actions, states = folder.column("action"), folder.column("observation.state")
    for episode in folder.episodes:
        rows = slice(episode.start, episode.start + episode.length)
        np.testing.assert_array_equal(actions[rows, 0], np.arange(episode.length))
        np.testing.assert_array_equal(actions[rows, 1], episode.index)
        np.testing.assert_array_equal(states[rows, 2], 1)


@pytest.mark.parametrize("name", EVERY)
def test_each_frame_is_the_one_of_its_episode_and_camera(written_by_lerobot: Path, name: str) -> None:
    folder = LeRobotFolder(written_by_lerobot / name)
    lossy = 0 if name.endswith("image") else 6  # grey levels; neighbouring frames differ by 12
    for camera, channel in (("top", 0), ("wrist", 2)):
        for episode in folder.episodes:
            frames = folder.frames(episode, folder.camera(camera), range(episode.length))
            levels = np.array([np.asarray(frame)[24, 32] for frame in frames]).astype(int)
            assert np.abs(levels[:, channel] - 12 * np.arange(episode.length)).max() < max(lossy, 1)
            if camera == "top":
                assert np.abs(levels[:, 1] - 80 * episode.index).max() < max(lossy, 1)


@pytest.mark.parametrize("name", EVERY)
def test_frames_in_any_order_from_a_pickled_reader_are_the_same(written_by_lerobot: Path, name: str) -> None:
    folder = LeRobotFolder(written_by_lerobot / name)
    camera = folder.camera("observation.images.top")
    folder.frame(folder.episodes[0], 3, camera)  # has open files now
    again = pickle.loads(pickle.dumps(folder))
    places = [(2, 19), (0, 0), (2, 1), (1, 6), (1, 5), (0, 11), (2, 1)]
    for episode, frame in places:
        one = np.asarray(folder.frame(folder.episodes[episode], frame, camera))
        np.testing.assert_array_equal(one, np.asarray(again.frame(again.episodes[episode], frame, camera)))
        assert abs(int(one[24, 32, 0]) - 12 * frame) < 6


def test_a_camera_is_found_by_the_end_of_its_key_or_listed(written_by_lerobot: Path) -> None:
    folder = LeRobotFolder(written_by_lerobot / "theirs_v30_video")
    assert folder.camera("wrist") == "observation.images.wrist"
    for wanted in (None, "left"):
        with pytest.raises(ConfigError, match=r"observation\.images\.top, observation\.images\.wrist"):
            folder.camera(wanted)


def test_a_column_that_is_not_there_is_named_with_those_that_are(written_by_lerobot: Path) -> None:
    folder = LeRobotFolder(written_by_lerobot / "theirs_v30_video")
    with pytest.raises(ConfigError, match=r"'actions'.*action, observation\.state"):
        folder.column("actions")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match=r"meta/info\.json"):
        LeRobotFolder(tmp_path)


def test_another_version_is_refused(copied: Path) -> None:
    path = copied / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"codebase_version": "v1.6"}))
    with pytest.raises(TrajectoryError, match=r"v1\.6"):
        LeRobotFolder(copied)


def test_a_recording_that_was_not_finished_is_refused(copied: Path) -> None:
    path = copied / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_episodes": 4}))
    with pytest.raises(TrajectoryError, match="3 episodes"):
        LeRobotFolder(copied)


def test_an_episode_that_is_shorter_in_the_data_is_named_with_its_file(copied: Path) -> None:
    import pyarrow.parquet as parquet

    path = copied / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(path)
    parquet.write_table(table.slice(0, len(table) - 1), path)
    with pytest.raises(TrajectoryError, match=r"Episode 2 has 19 frames in .*file-000\.parquet, but 20"):
        LeRobotFolder(copied).column("action")


def test_a_value_that_is_no_number_is_named_with_its_frame(copied: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = copied / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(path)
    values = table.column("action").to_pylist()
    values[14] = [0.0, float("nan")]
    place = table.schema.get_field_index("action")
    parquet.write_table(table.set_column(place, "action", pa.array(values, table.schema.field("action").type)), path)
    with pytest.raises(TrajectoryError, match="episode 1, frame 2"):
        LeRobotFolder(copied).column("action")


@pytest.mark.parametrize("damage", ["missing", "cut", "zeroed"])
def test_a_damaged_video_is_named_with_the_episode(copied: Path, damage: str) -> None:
    path = copied / "videos/observation.images.top/chunk-000/file-000.mp4"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes(len(content)))
    folder = LeRobotFolder(copied)
    with pytest.raises(TrajectoryError, match=r"Episode 2.*file-000\.mp4"):
        list(folder.frames(folder.episodes[2], folder.camera("top"), range(20)))


def test_a_video_that_does_not_say_where_its_episodes_begin_is_refused(copied: Path) -> None:
    import pyarrow.parquet as parquet

    path = copied / "meta/episodes/chunk-000/file-000.parquet"
    parquet.write_table(parquet.read_table(path).drop(["videos/observation.images.top/from_timestamp"]), path)
    folder = LeRobotFolder(copied)
    with pytest.raises(
        TrajectoryError, match=r"episode 1 of .* do not say where its videos/observation\.images\.top are"
    ):
        folder.frame(folder.episodes[1], 0, folder.camera("top"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fps": 0}, r"info\.json is damaged: ValueError: fps is 0"),
        ({"data_path": "data/{wrong}.parquet"}, r"info\.json is damaged: KeyError: 'wrong'"),
        (None, r"info\.json is damaged: it is no JSON object"),
    ],
)
def test_damaged_metadata_are_named(copied: Path, change: dict[str, object] | None, said: str) -> None:
    path = copied / "meta/info.json"
    path.write_text("[1]" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TrajectoryError, match=said):
        LeRobotFolder(copied)


def test_an_episode_without_a_length_and_text_in_a_column_of_numbers_are_named(copied: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    path = copied / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(path)
    place = table.schema.get_field_index("action")
    text = pyarrow.array(["left"] * len(table))
    parquet.write_table(table.set_column(place, "action", text), path)
    with pytest.raises(TrajectoryError, match=r"'action' of episode 0 in .* does not have \d numbers in each frame"):
        LeRobotFolder(copied).column("action")
    path = copied / "meta/episodes/chunk-000/file-000.parquet"
    parquet.write_table(parquet.read_table(path).drop(["length"]), path)
    with pytest.raises(TrajectoryError, match=r"have an episode without a number or length \(KeyError: 'length'\)"):
        LeRobotFolder(copied)


def test_a_damaged_table_is_named(copied: Path) -> None:
    path = copied / "data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrajectoryError, match=r"file-000\.parquet"):
        LeRobotFolder(copied).column("action")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["a"], []),
        (["a", "a"], [1]),
        (["a"] * 10, [4, 9]),
        (["a", "b"] * 5, [8, 9]),
        (["a", "b", "c"], [2]),  # each once: the last one of all
        (list("abcdefg"), [4]),
        (["a"] * 6 + ["b"], [4]),
    ],
)
def test_every_fifth_of_each_task_is_held_out(groups: list[str], expected: list[int]) -> None:
    assert sorted(held_out(groups)) == expected
