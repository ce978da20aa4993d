"""``import``: reads the demonstrations that CortexBench was made with, pickles of arrays, as data sets of LeRobot."""

import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cortexbench.demonstrations import CAMERAS, REWARD
from benchmarks.cortexbench.recordings import check_options, keep_options
from benchmarks.cortexbench.tasks import TASKS, Task, choose_tasks, folders_of
from theia.errors import ConfigError, TrajectoryError
from theia.trajectories.lerobot import ACTION, STATE
from theia.trajectories.lerobot_writer import LeRobotWriter, Values
from theia.utils.arguments import comma_list
from theia.utils.files import alone, check_folder, file_sha256

INTERNAL_STATE = "observation.internal_state"

_ENDINGS = (".pickle", ".pkl")
_STATES_OF = {"metaworld": "gripper_proprio", "adroit": "proprio"}
OTHER_PHYSICS = (
    "These are the demonstrations of the paper, but policies act on the physics of today's simulators, which are not "
    "those that they were recorded on: what is reached with them is not what the paper measured."
)


class Demonstration(NamedTuple):
    """One demonstration in a pickle.

    Attributes:
        images: RGB frames, uint8, shape ``(T, size, size, 3)``.
        actions: What was done, shape ``(T, A)``.
        rewards: What it earned, shape ``(T,)``.
        states: What the robot knew of itself, shape ``(T, K)``; ``None`` in DM Control.
        internal: MuJoCo's positions and velocities, shape ``(T, n)``, if they are there.
        begun: Where the scene began, if it is there.
        success: Whether the task was fulfilled after each step, if it is said.
    """

    images: NDArray[np.uint8]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    states: NDArray[np.float32] | None
    internal: NDArray[np.float32] | None
    begun: dict[str, list[Any]] | None
    success: NDArray[np.bool_] | None

    @property
    def score(self) -> float:
        """The sum of the rewards, divided by 10 for 1000 steps."""
        return 100 * float(self.rewards.mean())


def import_originals(original: Path, out: Path, tasks: str | None = None) -> str:
    """Reads the demonstrations that CortexBench was made with, as data set folders of LeRobot.

    There is one pickle for each task, a list of demonstrations with images, actions, rewards and env_infos. It is named
    like the task, such as dmc_walker_stand-v1.pickle or relocate-v0.pickle. Nothing but NumPy arrays and Python's own
    containers is read; a pickle that wants anything else is refused, and runs no code. A pickle is read whole and needs
    as much memory as it is large. No simulator is needed. The same command goes on where it was interrupted.

    Args:
        original: Folder with the pickles, in any folders inside.
        out: Folder for the data sets, which lie as those of the command collect do.
        tasks: Names of tasks, separated by commas; by default, all that there are pickles of.

    Returns:
        A table of what was read.

    Raises:
        ConfigError: If there are no pickles, or no task has such a name.
        TrajectoryError: If a pickle is damaged, wants more than arrays, or does not hold demonstrations.
        FileError: If the disk is full.
    """
    files = find_pickles(original)
    if tasks is not None:
        files = {task: files[task] for task in choose_tasks(comma_list(tasks), list(files), original)}
    check_folder(out, "--out")
    rows: list[tuple[Any, ...]] = []
    with alone(out):
        for place, names in folders_of(files, out).items():
            rows += _import(out / place, {name: files[name] for name in names})
    table = tabulate(rows, ("task", "episodes", "steps", "score", "success"))
    return f"{table}\n\n{OTHER_PHYSICS}"


def find_pickles(folder: Path) -> dict[str, Path]:
    """Finds the pickle of each task.

    Args:
        folder: Folder with pickles, in any folders inside.

    Raises:
        ConfigError: If there are none, one has a name that is no task's, or two are of one task.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS and path.is_file())
    if not paths:
        raise ConfigError(
            f"{folder} holds no file that ends in {' or '.join(_ENDINGS)}. Give the folder of the pickles."
        )
    found: dict[str, Path] = {}
    for path in paths:
        stem = f"-{path.stem.lower().replace('_', '-')}-"
        names = [name for name in TASKS if f"-{name.removesuffix('-v3')}-" in stem]
        if not names:
            known = ", ".join(name.removesuffix("-v3") for name in TASKS)
            raise ConfigError(f"{path} is not named like a task. Rename it, or move it away. Tasks: {known}.")
        task = max(names, key=len)  # button-press-topdown is not button-press
        if task in found:
            raise ConfigError(f"{found[task]} and {path} are both named like {task}. Move one away.")
        found[task] = path
    return {name: found[name] for name in TASKS if name in found}


def read_pickle(path: Path) -> Any:
    """Reads a pickle of NumPy arrays and Python's own containers. Nothing else is loaded, and no code is run.

    Raises:
        TrajectoryError: If it holds anything else, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _Arrays(file, encoding="latin1").load()
    except _RefusedError as error:
        raise TrajectoryError(
            f"{path} wants {error}, and only NumPy arrays and Python's own containers are read from a pickle, since "
            "anything else could run code. Read it where you trust it, and write arrays alone."
        ) from error
    except MemoryError as error:
        size = path.stat().st_size / 2**30
        raise TrajectoryError(
            f"{path} has {size:.1f} GiB, which do not fit into memory. Take a larger machine."
        ) from error
    except Exception as error:
        # Damaged pickles raise nearly anything.
        raise TrajectoryError(
            f"{path} cannot be read ({type(error).__name__}: {error}). It is damaged: copy it again."
        ) from error


class _RefusedError(Exception):
    """What a pickle wants and does not get."""


def _latin(text: str, encoding: str) -> bytes:
    """What old pickles of arrays call to turn text into bytes; other encodings can run code of their own."""
    if encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"the encoding {encoding}")
    return text.encode("latin-1")


# NumPy has moved these from numpy.core to numpy._core.
_NUMPY = {
    ("multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
    ("multiarray", "scalar"): np.float64(0).__reduce__()[0],
    ("numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
}
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin,
    ("collections", "OrderedDict"): OrderedDict,
    **{
        (f"numpy.{core}.{module}", name): value
        for (module, name), value in _NUMPY.items()
        for core in ("core", "_core")
    },
    **{
        (module, kind.__name__): kind
        for kind in (bytearray, complex, dict, frozenset, list, set, slice, tuple)
        for module in ("builtins", "__builtin__")
    },
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None


def _import(folder: Path, files: Mapping[str, Path]) -> list[tuple[Any, ...]]:
    """Writes one data set; gives a row of the table for each task."""
    rows: list[tuple[Any, ...]] = []
    writer: LeRobotWriter | None = None
    index = 0
    for name, file in files.items():
        tqdm.write(f"{file} ({file.stat().st_size / 2**20:.0f} MiB)", file=sys.stderr)
        task, content = TASKS[name], read_pickle(file)
        if not isinstance(content, list | tuple) or not content:
            raise TrajectoryError(f"{file} is not a list of demonstrations. Give the pickles of CortexBench.")
        paths, lengths, scores, successes = list(content), [], [], []
        del content
        for number in tqdm(range(len(paths)), desc=name, unit="episode"):
            path, paths[number] = _path(paths[number], task, f"demonstration {number} of {file}"), None
            if writer is None:
                writer = _open(folder, files, task, path)
            if not writer.has(index):
                try:
                    _write(writer, index, task, path, file.name, number)
                except TrajectoryError as error:
                    raise TrajectoryError(f"Demonstration {number} of {file}: {error}") from error
            index += 1
            lengths.append(len(path.actions))
            scores.append(path.score)
            if path.success is not None:
                fulfilled = int(path.success.sum())
                successes.append(bool(task.success(bool(path.success[-1]), fulfilled)))
        score = f"{np.mean(scores):.1f}" if task.measure == "return" else ""
        success = f"{np.mean(successes):.0%}" if successes and task.measure != "return" else ""
        rows.append((name, len(lengths), f"{np.mean(lengths):.0f}", score, success))
    assert writer is not None
    writer.finish()
    return rows


def _open(folder: Path, files: Mapping[str, Path], task: Task, path: Demonstration) -> LeRobotWriter:
    size = path.images.shape[1]
    values: dict[str, Sequence[str]] = {ACTION: task.actions, REWARD: ("reward",)}
    if task.states:
        values[STATE] = task.states
    if path.internal is not None:
        values[INTERNAL_STATE] = [f"value_{n}" for n in range(path.internal.shape[1])]
    cameras = {CAMERAS + task.camera: (size, size)}
    settings = {
        "tasks": list(files), "vary": [],
        "imported": {name: f"{file.name}, sha256 {file_sha256(file)}" for name, file in files.items()},
        "size": size, "pictures": "image",
        "quality": "full",  # the paper's
    }  # fmt: skip
    check_options(folder, settings)
    writer = LeRobotWriter(folder, task.frames_per_s, values, cameras, list(files), "image", task.robot)
    keep_options(folder, settings)
    return writer


def _write(writer: LeRobotWriter, index: int, task: Task, path: Demonstration, file: str, number: int) -> None:
    values: dict[str, Values] = {ACTION: path.actions, REWARD: path.rewards[:, None]}
    if path.states is not None:
        values[STATE] = path.states
    if path.internal is not None:
        values[INTERNAL_STATE] = path.internal
    about: dict[str, str | int | float] = {"original": file, "original_number": number, "dropped": 0}
    if path.begun is not None:
        about["initial_state"] = json.dumps(path.begun)
    if task.measure == "return":
        about["score"] = path.score
    elif path.success is not None:
        about["success_at_end"] = int(path.success[-1])
    writer.write(index, task.name, values, {CAMERAS + task.camera: path.images}, about)


def _path(content: Any, task: Task, where: str) -> Demonstration:
    """Checks one demonstration."""
    if not isinstance(content, Mapping):
        raise TrajectoryError(f"{where[0].upper()}{where[1:]} is a {type(content).__name__}, not a dict.")
    infos = _stacked(content.get("env_infos", {}))
    images = np.asarray(_entry(content, "images", where))
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3 or images.dtype != np.uint8:
        raise TrajectoryError(
            f"'images' of {where} is {images.dtype} of shape {images.shape}; it must be uint8 of shape (T, size, size, "
            "3)."
        )
    actions = _table(_entry(content, "actions", where), "actions", len(images), len(task.actions), where)
    rewards = _table(_entry(content, "rewards", where), "rewards", len(images), 1, where)[:, 0]
    states = internal = success = None
    if task.states:
        key = _STATES_OF[task.simulator]
        states = _table(_entry(infos, key, where), key, len(images), task.proprioception, where)
    elif "internal_state" in infos:
        internal = _table(infos["internal_state"], "internal_state", len(images), None, where)
    begun = _begun(content, infos, where)
    for key in ("success", "goal_achieved"):
        if key in infos and np.size(infos[key]) == len(images):
            success = np.asarray(infos[key]).reshape(-1).astype(bool)
    return Demonstration(images, actions, rewards, states, internal, begun, success)


def _begun(content: Mapping[str, Any], infos: Mapping[str, Any], where: str) -> dict[str, list[Any]] | None:
    """Where the scene began: recorded once, or with every step."""
    first = content.get("init_state_dict")
    if first is None:
        first = infos.get("init_state_dict")
        if isinstance(first, Mapping):
            first = {name: part[0] for name, part in first.items()}
        elif isinstance(first, list | np.ndarray) and len(first):
            first = first[0]
    if not isinstance(first, Mapping):
        return None
    try:
        return {str(name): np.asarray(part, np.float64).tolist() for name, part in first.items()}
    except (TypeError, ValueError) as error:
        raise TrajectoryError(f"'init_state_dict' of {where} is not of numbers: {error}.") from error


def _stacked(infos: Any) -> Mapping[str, Any]:
    """What a simulator says, as arrays over the steps; some record a dict for each step."""
    if isinstance(infos, Mapping):
        return infos
    if isinstance(infos, list | tuple | np.ndarray) and len(infos) and all(isinstance(one, Mapping) for one in infos):
        return {name: [one.get(name) for one in infos] for name in infos[0]}
    return {}


def _entry(content: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in content:
        there = ", ".join(map(str, content)) or "nothing"
        raise TrajectoryError(f"{where[0].upper()}{where[1:]} has no {name!r}, but {there}. Is it of another task?")
    return content[name]


def _table(value: Any, name: str, length: int, size: int | None, where: str) -> NDArray[np.float32]:
    """An array of shape ``(T, size)`` of finite numbers."""
    try:
        array = np.asarray(value, np.float32)
        array = array.reshape(len(array), -1)
    except (TypeError, ValueError) as error:
        raise TrajectoryError(f"{name!r} of {where} is not an array of numbers: {error}.") from error
    if len(array) != length or array.shape[1] != (size or array.shape[1]):
        wanted = f"({length}, {size or 'any'})"
        raise TrajectoryError(f"{name!r} of {where} has the shape {np.shape(value)}; it must be {wanted}.")
    return array
