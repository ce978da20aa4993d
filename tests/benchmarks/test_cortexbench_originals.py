"""The command import, on pickles that are written here."""

import json
import pickle
import pickletools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cortexbench import __main__ as command
from benchmarks.cortexbench.originals import INTERNAL_STATE, find_pickles, read_pickle
from benchmarks.cortexbench.recordings import Recordings
from theia.errors import ConfigError, TrajectoryError
from theia.trajectories.lerobot import LeRobotFolder

SIZE = 8


def demonstration(steps: int, actions: int, infos: dict[str, int], **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(steps)
    return {
        "images": rng.integers(0, 256, (steps, SIZE, SIZE, 3), np.uint8),
        "actions": rng.uniform(-1, 1, (steps, actions)),
        "rewards": rng.uniform(size=steps),
        "env_infos": {name: rng.normal(size=(steps, size)) for name, size in infos.items()},
        **more,
    }


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def bring(original: Path, out: Path, *options: str) -> int:
    return command.main(["import", f"--original={original}", f"--out={out}", *options])


def test_what_was_recorded_is_what_is_read(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    pen = [demonstration(5 + n, 24, {"proprio": 24}, init_state_dict={"qpos": np.arange(3.0) + n}) for n in range(2)]
    reacher = [demonstration(4, 2, {"internal_state": 4})]
    hammer = [demonstration(6, 4, {"gripper_proprio": 4, "success": 1})]
    assembly = [demonstration(3 + n, 4, {"gripper_proprio": 4}) for n in range(3)]
    hammer[0]["env_infos"]["success"] = np.array([0, 0, 1, 0, 1, 1.0])
    write(tmp_path / "in/adroit-expert-v1.0/pen-v0.pickle", pen)
    write(tmp_path / "in/dmc-expert-v1.0/dmc_reacher_easy-v1.pickle", reacher)
    write(tmp_path / "in/hammer-v2-goal-observable.pickle", hammer)
    write(tmp_path / "in/assembly-v2-goal-observable.pickle", assembly)
    assert bring(tmp_path / "in", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"reacher-easy{1:>14}{4:>9}{100 * reacher[0]['rewards'].mean():>9.1f}".split() in [
        line.split() for line in said.splitlines()
    ]
    assert "not what the paper measured" in said
    folder = LeRobotFolder(tmp_path / "out/pen")
    assert [episode.length for episode in folder.episodes] == [5, 6]
    for name, column in (("actions", "action"), ("rewards", "next.reward")):
        expected = np.concatenate([one[name] for one in pen]).astype(np.float32)
        np.testing.assert_array_equal(folder.column(column).reshape(expected.shape), expected)
    states = np.concatenate([one["env_infos"]["proprio"] for one in pen]).astype(np.float32)
    np.testing.assert_array_equal(folder.column("observation.state"), states)
    picture = np.asarray(folder.frame(folder.episodes[1], 3, folder.camera()))
    np.testing.assert_array_equal(picture, pen[1]["images"][3])
    assert json.loads(folder.episodes[1].record["initial_state"]) == {"qpos": [1.0, 2.0, 3.0]}
    folder = LeRobotFolder(tmp_path / "out/reacher-easy")
    internal = reacher[0]["env_infos"]["internal_state"].astype(np.float32)
    np.testing.assert_array_equal(folder.column(INTERNAL_STATE), internal)
    assert "observation.state" not in folder.features
    folder = LeRobotFolder(tmp_path / "out/metaworld")
    assert [episode.tasks for episode in folder.episodes] == [("assembly-v3",)] * 3 + [("hammer-v3",)]
    assert folder.episodes[-1].record["success_at_end"] == 1


@pytest.mark.parametrize("form", ["whole", "stacked", "each"])
def test_what_a_simulator_says_may_be_stacked_or_a_dict_for_each_step(tmp_path, form):
    pytest.importorskip("pyarrow")
    one = demonstration(4, 24, {"proprio": 24})
    states, infos = one["env_infos"]["proprio"], one["env_infos"]
    if form == "whole":
        one["init_state_dict"] = {"qpos": np.arange(2.0)}
    elif form == "stacked":
        infos["init_state_dict"] = {"qpos": np.arange(8.0).reshape(4, 2)}
    else:
        one["env_infos"] = [{"proprio": row, "init_state_dict": {"qpos": np.arange(2.0)}} for row in states]
    write(tmp_path / "in/pen-v0.pickle", [one])
    assert bring(tmp_path / "in", tmp_path / "out") == 0
    folder = LeRobotFolder(tmp_path / "out/pen")
    np.testing.assert_array_equal(folder.column("observation.state"), states.astype(np.float32))
    assert json.loads(folder.episodes[0].record["initial_state"]) == {"qpos": [0.0, 1.0]}


def test_another_pickle_of_the_same_name_and_values_that_are_no_numbers_are_said(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    write(tmp_path / "in/pen-v0.pickle", [demonstration(5, 24, {"proprio": 24})])
    assert bring(tmp_path / "in", tmp_path / "out") == 0
    write(tmp_path / "in/pen-v0.pickle", [demonstration(6, 24, {"proprio": 24})])
    assert bring(tmp_path / "in", tmp_path / "out") == 1
    assert "was begun with imported" in capsys.readouterr().err
    assert [episode.length for episode in LeRobotFolder(tmp_path / "out/pen").episodes] == [5]
    wrong = demonstration(5, 24, {"proprio": 24})
    wrong["actions"][2, 3] = np.nan
    write(tmp_path / "in/pen-v0.pickle", [wrong])
    assert bring(tmp_path / "in", tmp_path / "other") == 1
    assert f"Demonstration 0 of {tmp_path / 'in/pen-v0.pickle'}: 'action' of episode 0" in capsys.readouterr().err


def test_tasks_stay_where_they_were_imported_first(tmp_path):
    pytest.importorskip("pyarrow")
    write(tmp_path / "in/assembly-v2.pickle", [demonstration(5, 4, {"gripper_proprio": 4})])
    write(tmp_path / "in/pen-v0.pickle", [demonstration(5, 24, {"proprio": 24})])
    assert bring(tmp_path / "in", tmp_path / "out", "--tasks=assembly") == 0
    assert bring(tmp_path / "in", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["data", "meta", "pen"]
    assert set(Recordings.open(tmp_path / "out").folders) == {"assembly-v3", "pen"}


def test_policies_find_what_was_imported(tmp_path):
    pytest.importorskip("pyarrow")
    write(tmp_path / "in/pen-v0.pickle", [demonstration(5, 24, {"proprio": 24})])
    write(tmp_path / "in/dmc_walker_walk-v1.pickle", [demonstration(4, 6, {})])
    assert bring(tmp_path / "in", tmp_path / "out") == 0
    found = Recordings.open(tmp_path / "out")
    assert set(found.folders) == {"pen", "walker-walk"}
    assert (found.about["size"], found.about["quality"], found.about["vary"]) == (SIZE, "full", [])
    assert found.observations("pen", np.arange(5)).shape == (5, 24)
    assert found.observations("walker-walk", np.arange(4)).shape == (4, 0)
    assert (found.actions("pen"), found.actions("walker-walk")) == (24, 6)
    with pytest.raises(TrajectoryError, match="of pen were imported and do not hold the simulator's whole state"):
        found.check_state("pen")


def test_data_sets_inside_one_of_metaworld_are_found_too(tmp_path):
    pytest.importorskip("pyarrow")
    write(tmp_path / "in/pen-v0.pickle", [demonstration(5, 24, {"proprio": 24})])
    write(tmp_path / "in/dmc_walker_walk-v1.pickle", [demonstration(4, 6, {})])
    assert bring(tmp_path / "in", tmp_path / "out") == 0
    shutil.copytree(tmp_path / "out/pen", tmp_path / "out", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out/pen")
    assert set(Recordings.open(tmp_path / "out").folders) == {"pen", "walker-walk"}


def test_two_data_sets_of_one_task_are_refused(tmp_path):
    pytest.importorskip("pyarrow")
    write(tmp_path / "in/pen-v0.pickle", [demonstration(5, 24, {"proprio": 24})])
    assert bring(tmp_path / "in", tmp_path / "out") == 0
    shutil.copytree(tmp_path / "out/pen", tmp_path / "out/pen_with_noise")
    with pytest.raises(TrajectoryError, match=r"out/pen and .*out/pen_with_noise both hold demonstrations of pen"):
        Recordings.open(tmp_path / "out")


def test_an_interrupted_import_goes_on(tmp_path):
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "in/relocate-v0.pickle", [demonstration(5, 30, {"proprio": 30}) for _ in range(3)])
    assert bring(tmp_path / "in", tmp_path / "out") == 0
    (tmp_path / "out/relocate/meta/episodes/chunk-000/file-002.parquet").unlink()
    first = tmp_path / "out/relocate/data/chunk-000/file-000.parquet"
    written = first.stat().st_mtime_ns
    assert bring(tmp_path / "in", tmp_path / "out") == 0
    assert len(LeRobotFolder(tmp_path / "out/relocate").episodes) == 3
    assert first.stat().st_mtime_ns == written
    assert path.is_file()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int64", "bool", ">f4", "S3", "O"])
def test_arrays_and_containers_of_every_protocol_are_read(tmp_path, protocol, dtype):
    array = np.array([[0, 1], [2, 3]]).astype(dtype)
    content = [{"a": array, "b": (1, 2.5, None, True, "text"), "c": {"d": [array[0, 0], {3}, b"raw"]}}]
    path = write(tmp_path / "x.pickle", content, protocol)
    found = read_pickle(path)
    np.testing.assert_array_equal(found[0]["a"], array)
    assert found[0]["a"].dtype == pickle.loads(path.read_bytes())[0]["a"].dtype
    assert found[0]["b"] == content[0]["b"]
    assert found[0]["c"]["d"] == content[0]["c"]["d"]


class Runs:
    """What runs code when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.state = (call, arguments)

    def __reduce__(self) -> Any:
        return self.state


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [{"images": one}], lambda one: np.array([one], object)])
def test_code_in_a_pickle_is_not_run(tmp_path, wrap):
    marker = tmp_path / "ran"
    path = write(tmp_path / "x.pickle", wrap(Runs(Path.touch, marker)))
    with pytest.raises(TrajectoryError, match=r"x.pickle wants .*, and only NumPy arrays"):
        read_pickle(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # which runs it
    assert marker.exists()


@pytest.mark.parametrize(
    ("call", "arguments"),
    [(eval, ("1",)), (getattr, ("", "join")), (__import__, ("os",)), (np.load, ("x",)), (np.memmap, ("x",)),
     (pickle.loads, (b"N.",)), (print, ("x",))],
)  # fmt: skip
def test_nothing_but_arrays_can_be_called(tmp_path, call, arguments):
    path = write(tmp_path / "x.pickle", Runs(call, *arguments))
    assert any(code.name in ("STACK_GLOBAL", "GLOBAL") for code, _, _ in pickletools.genops(path.read_bytes()))
    with pytest.raises(TrajectoryError, match="only NumPy arrays"):
        read_pickle(path)


def test_codecs_other_than_latin_are_refused(tmp_path):
    path = tmp_path / "x.pickle"
    path.write_bytes(b"c_codecs\nencode\n(Vabc\nVrot13\ntR.")
    with pytest.raises(TrajectoryError, match="wants the encoding rot13"):
        read_pickle(path)


def test_a_damaged_pickle_is_named(tmp_path):
    path = write(tmp_path / "pen-v0.pickle", [demonstration(5, 24, {"proprio": 24})])
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TrajectoryError, match=r"pen-v0\.pickle cannot be read .* copy it again"):
        read_pickle(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "is not a list of demonstrations"),
        ([], "is not a list of demonstrations"),
        ([3], "Demonstration 0 of .* is a int, not a dict"),
        ([demonstration(5, 23, {"proprio": 24})], r"'actions' of demonstration 0 .* \(5, 23\); it must be \(5, 24\)"),
        ([demonstration(5, 24, {"gripper_proprio": 4})], "has no 'proprio', but gripper_proprio"),
        ([{**demonstration(5, 24, {"proprio": 24}), "images": np.zeros((5, 8, 8, 3))}], "is float64 of shape"),
        ([{**demonstration(5, 24, {"proprio": 24}), "rewards": np.zeros(4)}], r"'rewards' .* \(4,\); it must be"),
        ([{**demonstration(5, 24, {"proprio": 24}), "actions": [["a"] * 24] * 5}], "is not an array of numbers"),
        ([{**demonstration(5, 24, {"proprio": 24}), "actions": np.full((5, 24), np.nan)}], "not finite"),
    ],
)
def test_what_is_no_demonstration_is_refused(content, said, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    write(tmp_path / "in/pen-v0.pickle", content)
    assert bring(tmp_path / "in", tmp_path / "out") == 1
    assert re.search(said, capsys.readouterr().err)


def test_files_are_found_by_the_names_of_tasks(tmp_path):
    for name in ("button-press-topdown-v2-goal-observable.pickle", "dmc_finger_spin-v1.pkl", "relocate-v0.pickle"):
        write(tmp_path / name, [])
    assert list(find_pickles(tmp_path)) == ["button-press-topdown-v3", "finger-spin", "relocate"]
    write(tmp_path / "more/dmc_finger_spin-v0.pickle", [])
    with pytest.raises(ConfigError, match="both named like finger-spin"):
        find_pickles(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no file that ends in \.pickle or \.pkl"):
        find_pickles(tmp_path / "none")
    write(tmp_path / "other/humanoid.pickle", [])
    with pytest.raises(ConfigError, match=r"humanoid\.pickle is not named like a task.*walker-walk"):
        find_pickles(tmp_path / "other")


def test_a_task_without_a_pickle_is_refused(tmp_path, capsys):
    write(tmp_path / "pen-v0.pickle", [])
    assert bring(tmp_path, tmp_path / "out", "--tasks=adroit") == 1
    assert "has no demonstrations of relocate. It has: pen" in capsys.readouterr().err
    assert bring(tmp_path, tmp_path / "out", "--tasks=hammer") == 1
    assert "has no demonstrations of hammer-v3. It has: pen" in capsys.readouterr().err
    assert bring(tmp_path, tmp_path / "out", "--tasks=pencil") == 1
    assert "Is it 'pen'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
