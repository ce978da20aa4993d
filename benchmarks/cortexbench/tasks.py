"""All tasks by name: which simulator they run in, how long they last, and what counts as success or score."""

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from theia.errors import ConfigError
from theia.trajectories.lerobot import INFO

Simulator = Literal["metaworld", "dmc", "adroit"]

# How an episode is valued. "last" is success at the last step; "steps" is success if the task was fulfilled in more
# than so many steps; "return" is a score, the sum of the rewards divided by 10 for a whole episode of 1000 steps.
Measure = Literal["last", "steps", "return"]

# Later users of relocate ask for 5 steps; the rollouts of a run keep the number, for either.
_PEN_STEPS, _RELOCATE_STEPS = 20, 25

_VERSION = "-v3"

NO_EXPERT = (
    "There is no expert for {task}: its demonstrations are those of the paper. Read them with python -m "
    "benchmarks.cortexbench import --original FOLDER --out FOLDER."
)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Full name of the task.
        simulator: Simulator that it runs in.
        horizon: Greatest number of steps of an episode.
        frames_per_s: Steps in a second of the robot's time.
        actions: Names of the values of an action.
        states: Names of the values that the robot knows of itself. An observation begins with them.
        observations: Number of values of an observation, in which the simulator says everything about the scene.
        camera: Name of the camera, as in CortexBench.
        robot: Type of the robot.
        measure: How an episode is valued.
        fulfilled_steps: For ``steps``, the number of steps that must be exceeded.
    """

    name: str
    simulator: Simulator
    horizon: int
    frames_per_s: int
    actions: tuple[str, ...]
    states: tuple[str, ...]
    observations: int
    camera: str
    robot: str
    measure: Measure
    fulfilled_steps: int = 0

    @property
    def proprioception(self) -> int:
        """Number of values that the robot knows of itself."""
        return len(self.states)

    @property
    def unit(self) -> str:
        """What a figure of this task is, for a report."""
        return "score, return / 10" if self.measure == "return" else "success rate"

    def success(self, at_end: bool, fulfilled: int) -> bool | None:
        """Whether an episode succeeded; ``None`` for a task that only has a score.

        Args:
            at_end: Whether the task was fulfilled after the last step.
            fulfilled: Number of steps in which it was.
        """
        if self.measure == "return":
            return None
        return at_end if self.measure == "last" else fulfilled > self.fulfilled_steps

    def value(self, success: bool | None, rewards: float, steps: int) -> float:
        """Value of an episode between 0 and 1: success, or the mean reward of a step.

        A hundred times that of 1000 steps is the return divided by 10.

        Args:
            success: Whether it succeeded, see :meth:`success`.
            rewards: Sum of its rewards.
            steps: Number of its steps.
        """
        return rewards / max(1, steps) if success is None else float(success)


_METAWORLD = (
    "assembly basketball bin-picking box-close button-press button-press-topdown button-press-topdown-wall "
    "button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open "
    "door-unlock drawer-close drawer-open faucet-close faucet-open hammer hand-insert handle-press handle-press-side "
    "handle-pull handle-pull-side lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place "
    "pick-place-wall plate-slide plate-slide-back plate-slide-back-side plate-slide-side push push-back push-wall "
    "reach reach-wall shelf-place soccer stick-pull stick-push sweep sweep-into window-close window-open"
)
_WALKER = ("right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle")
_CHEETAH = ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot")
_HAND = (
    "WRJ1 WRJ0 FFJ3 FFJ2 FFJ1 FFJ0 MFJ3 MFJ2 MFJ1 MFJ0 RFJ3 RFJ2 RFJ1 RFJ0 LFJ4 LFJ3 LFJ2 LFJ1 LFJ0 THJ4 THJ3 THJ2 "
    "THJ1 THJ0"
)
_ARM = "ARTx ARTy ARTz ARRx ARRy ARRz"


def _metaworld(name: str) -> Task:
    # Actions are relative, so they must not share the names of positions.
    actions, states = ("dx", "dy", "dz", "gripper_effort"), ("x", "y", "z", "gripper_opening")
    return Task(f"{name}{_VERSION}", "metaworld", 500, 80, actions, states, 39, "top", "sawyer", "last")


def _dmc(name: str, frames_per_s: int, motors: tuple[str, ...], observations: int) -> Task:
    efforts = tuple(f"{motor}_effort" for motor in motors)
    robot = name.partition("-")[0]
    return Task(name, "dmc", 1000, frames_per_s, efforts, (), observations, "camera_0", robot, "return")


def _adroit(name: str, horizon: int, joints: str, observations: int, steps: int) -> Task:
    # Actions are aims of the joints between the ends of their range, -1 to 1; states are angles.
    states = tuple(joints.split())
    actions = tuple(f"A_{joint}" for joint in states)
    return Task(
        name, "adroit", horizon, 100, actions, states, observations, "vil_camera", "shadow_hand", "steps", steps
    )


_ALL = (
    *(_metaworld(name) for name in _METAWORLD.split()),
    _dmc("walker-stand", 40, _WALKER, 24),
    _dmc("walker-walk", 40, _WALKER, 24),
    _dmc("reacher-easy", 50, ("shoulder", "wrist"), 6),
    _dmc("cheetah-run", 100, _CHEETAH, 17),
    _dmc("finger-spin", 50, ("proximal", "distal"), 9),
    _adroit("pen", 100, _HAND, 45, _PEN_STEPS),
    _adroit("relocate", 200, f"{_ARM} {_HAND}", 39, _RELOCATE_STEPS),
)
TASKS = {task.name: task for task in _ALL}

# Names that stand for several tasks: those of CortexBench's MuJoCo subset, and those of MetaWorld that are neither done
# blind nor beyond a policy that knows the whole state, and that tell encoders apart with the preset small.
GROUPS = {
    "small": ("dial-turn-v3", "assembly-v3", "push-v3", "door-unlock-v3", "drawer-open-v3", "coffee-pull-v3"),
    "metaworld": ("assembly-v3", "bin-picking-v3", "button-press-topdown-v3", "drawer-open-v3", "hammer-v3"),
    "dmc": tuple(task.name for task in _ALL if task.simulator == "dmc"),
    "adroit": tuple(task.name for task in _ALL if task.simulator == "adroit"),
}


def find_tasks(names: Iterable[str]) -> list[str]:
    """Finds tasks by their names, which may lack MetaWorld's version, or by the name of a group.

    Args:
        names: Names as a user gives them.

    Returns:
        Full names, each once, in the given order.

    Raises:
        ConfigError: If there is no such task.
    """
    found: dict[str, None] = {}
    for name in names:
        if name in GROUPS:
            found |= dict.fromkeys(GROUPS[name])
            continue
        full = name if name in TASKS else f"{name}{_VERSION}"
        if full not in TASKS:
            short = [task.removesuffix(_VERSION) for task in TASKS]
            near = difflib.get_close_matches(name.removesuffix(_VERSION), [*short, *GROUPS], 1)
            raise ConfigError(
                f"There is no task {name!r}."
                + (f" Is it {near[0]!r}?" if near else "")
                + f" Groups: {', '.join(GROUPS)}. Tasks: {', '.join(sorted(short))}."
            )
        found[full] = None
    return list(found)


def choose_tasks(names: Sequence[str], known: Sequence[str], folder: Path) -> list[str]:
    """Finds tasks by their names among those that a folder has demonstrations of.

    Args:
        names: Names as a user gives them.
        known: Full names of the tasks that the folder has.
        folder: The folder, for the message.

    Returns:
        Full names, each once, in the given order.

    Raises:
        ConfigError: If there is no such task, or the folder has no demonstrations of it.
    """
    found = find_tasks(names)
    missing = [task for task in found if task not in known]
    if missing:
        raise ConfigError(f"{folder} has no demonstrations of {missing[0]}. It has: {', '.join(known)}.")
    return found


def check_fit(names: Iterable[str], factors: Collection[str], option: str = "--vary") -> None:
    """Refuses what cannot be varied in a task.

    Args:
        names: Full names of tasks.
        factors: What is varied.
        option: The option that they were given with.

    Raises:
        ConfigError: If there is such a factor.
    """
    for name in names:
        if TASKS[name].simulator == "dmc" and "distractor" in factors:
            raise ConfigError(
                f"{option} has 'distractor', but distractors lie on a table, and {name} has none. Vary something else, "
                "or leave the task out."
            )


def folders_of(names: Iterable[str], out: Path) -> dict[str, list[str]]:
    """Divides tasks among data sets, all of whose episodes have the same columns.

    Args:
        names: Full names of tasks.
        out: Folder that the user names.

    Returns:
        Folder of each data set, inside ``out``, and its tasks. MetaWorld's lie in that itself if there are no others,
        or if they lie there already.
    """
    folders: dict[str, list[str]] = {}
    for name in names:
        task = TASKS[name]
        folders.setdefault("metaworld" if task.simulator == "metaworld" else name, []).append(name)
    alone = list(folders) == ["metaworld"] and not (out / "metaworld" / INFO).is_file()
    if alone or (out / INFO).is_file():
        return {"." if place == "metaworld" else place: some for place, some in folders.items()}
    return folders
