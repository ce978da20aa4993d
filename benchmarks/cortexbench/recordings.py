"""Demonstrations that policies are fitted to: one data set, or a folder of several, of different robots."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cortexbench.demonstrations import SCENE_STATE
from benchmarks.cortexbench.tasks import TASKS
from theia.errors import TrajectoryError
from theia.trajectories.lerobot import ACTION, INFO, STATE, LeRobotFolder
from theia.utils.files import jsonable, read_json, write_whole

_RECORD = "meta/collection.json"
_SAME = ("size", "quality", "vary", "spread", "pictures")


@dataclass(frozen=True)
class Recordings:
    """Demonstrations of any tasks.

    Attributes:
        root: The folder that the user names.
        folders: The data set of each task, by full name.
        about: With what options they were recorded.
    """

    root: Path
    folders: dict[str, LeRobotFolder]
    about: dict[str, Any]

    @staticmethod
    def open(root: Path) -> "Recordings":
        """Opens a data set, with all that lie in its folder, or all data sets in a folder.

        Raises:
            TrajectoryError: If there are none, they were recorded with different options, or two are of one task.
        """
        # MetaWorld's tasks share the folder itself, those of other simulators have folders in it.
        found = [root] if (root / INFO).is_file() else []
        found += sorted(path.parents[1] for path in root.glob(f"*/{INFO}"))
        folders: dict[str, LeRobotFolder] = {}
        records: dict[str, dict[str, Any]] = {}
        for path in found or [root]:
            folder, record = LeRobotFolder(path), read_json(path / _RECORD)
            known = [task for episode in folder.episodes for task in episode.tasks]
            if "size" not in record or not folder.cameras or any(task not in TASKS for task in known):
                raise TrajectoryError(
                    f"{path} does not hold demonstrations of the benchmark's tasks. Record some: python -m "
                    "benchmarks.cortexbench collect --tasks metaworld --out FOLDER."
                )
            records[str(path)] = record
            for task in dict.fromkeys(known):
                if task in folders:
                    raise TrajectoryError(
                        f"{folders[task].root} and {path} both hold demonstrations of {task}. Give one of them, or "
                        "move one away."
                    )
                folders[task] = folder
        first, *others = records.items()
        for path_text, record in others:
            different = [name for name in _SAME if record.get(name) != first[1].get(name)]
            if different:
                raise TrajectoryError(
                    f"{path_text} was recorded with {different[0]} {record.get(different[0])}, and {first[0]} with "
                    f"{first[1].get(different[0])}. Run them one after the other, each with a folder of its own."
                )
        return Recordings(root, folders, first[1] | ({"data sets": records} if others else {}))

    def camera(self, task: str) -> str:
        """Key of the camera that a task was recorded with."""
        return self.folders[task].camera()

    def actions(self, task: str) -> int:
        """Number of values of an action."""
        return int(self.folders[task].features[ACTION].shape[0])

    def observed(self, task: str) -> str | None:
        """Name of the column with what is known beside the pictures; ``None`` if nothing is.

        Demonstrations that were imported hold the robot's own state at most.
        """
        return next((name for name in (SCENE_STATE, STATE) if name in self.folders[task].features), None)

    def observations(self, task: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """What is known beside the pictures in some rows, shape ``(frames, S)``; S is 0 if nothing is."""
        column = self.observed(task)
        if column is None:
            return np.zeros((len(rows), 0), np.float32)
        return self.folders[task].column(column)[rows]

    def check_state(self, task: str) -> None:
        """Refuses a policy on the simulator's whole state where demonstrations lack it.

        Raises:
            TrajectoryError: If they do.
        """
        if self.observed(task) != SCENE_STATE:
            raise TrajectoryError(
                f"The demonstrations of {task} were imported and do not hold the simulator's whole state, so that the "
                "control state cannot be fitted to them. Leave it out of --encoders."
            )


def check_options(out: Path, settings: Mapping[str, Any]) -> None:
    """Compares the options that a data set was begun with, if it was, with those of now.

    Args:
        out: Folder of the data set.
        settings: The options, and versions of what is simulated with.

    Raises:
        TrajectoryError: If they differ, or the folder holds another data set.
    """
    path = out / _RECORD
    now = jsonable(dict(settings))
    if not path.exists():
        if any((out / "meta/episodes").glob("*/*.parquet")):
            raise TrajectoryError(f"{out} holds a data set that was not recorded by this command. Give a new folder.")
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise TrajectoryError(f"{path} cannot be read: {error}. Give a new folder.") from error
    different = [name for name in now if before.get(name) != now[name]]
    if different:
        said = "; ".join(f"{name} {before.get(name)}, not {now[name]}" for name in different)
        raise TrajectoryError(
            f"{out} was begun with {said}. Go on with the same options and versions, or give a new folder."
        )


def keep_options(out: Path, settings: Mapping[str, Any]) -> None:
    """Writes down with what options a data set was begun.

    Args:
        out: Folder of the data set, which :func:`check_options` found no other options in.
        settings: The options, and versions of what is simulated with.
    """
    if not (out / _RECORD).exists():
        write_whole(out / _RECORD, json.dumps(jsonable(dict(settings)), indent=2))
