"""One demonstration by an expert: attempted without looking, repeated with pictures if it succeeded, written."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.cortexbench.planning import PLANNING
from benchmarks.cortexbench.scenes import Factor, generator
from benchmarks.cortexbench.simulation import Environment, Quality, SimulationError, open_environment
from benchmarks.cortexbench.tasks import TASKS
from theia.trajectories.lerobot import ACTION, STATE
from theia.trajectories.lerobot_writer import LeRobotWriter, Values

CAMERAS = "observation.images."
SCENE_STATE = "observation.environment_state"
REWARD = "next.reward"
# Not "action.expert": LeRobot's policies learn every column whose name begins with "action".
EXPERT_ACTION = "expert.action"

# Seeds of one demonstration lie this far apart, so that a failed one takes no other's seed.
MOST_EPISODES = 10_000
MOST_ATTEMPTS = 20

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Plan:
    """What is recorded, except how much of it.

    Attributes:
        tasks: Full names of the tasks, all of one form.
        seed: First seed.
        vary: What is drawn anew for every episode.
        spread: Share of the whole range in which camera and light are drawn.
        noise: Standard deviation of the noise that is added to the expert's actions.
        after_success: Number of steps that are recorded after the first success.
        size: Height and width of the pictures, in pixels.
        quality: Quality of the rendering.
        pictures: How the pictures are kept.
    """

    tasks: tuple[str, ...]
    seed: int
    vary: tuple[Factor, ...]
    spread: float
    noise: float
    after_success: int
    size: int
    quality: Quality
    pictures: Literal["video", "image"]

    def index(self, task: str, number: int) -> int:
        """Number in the data set of a task's demonstration; tasks take turns, so that more can be added."""
        return number * len(self.tasks) + self.tasks.index(task)

    def open_writer(self, root: Path) -> LeRobotWriter:
        """Begins the data set, or goes on with it.

        Raises:
            TrajectoryError: If the folder holds another one.
        """
        about = TASKS[self.tasks[0]]
        values: dict[str, Sequence[str]] = {ACTION: about.actions}
        if about.states:
            values[STATE] = about.states
        values[SCENE_STATE] = [f"value_{n}" for n in range(about.observations)]
        if about.measure == "return":
            values[REWARD] = ("reward",)
        if self.noise:
            values[EXPERT_ACTION] = about.actions
        cameras = {self.camera: (self.size, self.size)}
        return LeRobotWriter(root, about.frames_per_s, values, cameras, self.tasks, self.pictures, about.robot)

    @property
    def camera(self) -> str:
        """Key of the camera in the data set."""
        return CAMERAS + TASKS[self.tasks[0]].camera


class Trial(NamedTuple):
    """An attempt that succeeded. Each row holds for the moment before its action.

    Attributes:
        actions: What the robot was told, noise included, shape ``(T, A)``.
        meant: What the expert wanted, same shape.
        observations: Everything that the simulator says about the scene, shape ``(T, S)``.
        rewards: What each action earned, shape ``(T,)``.
        success_step: Number of steps until the first success; ``None`` for a task that only has a score.
        at_end: Whether the task is still fulfilled after the last step.
    """

    actions: NDArray[np.float32]
    meant: NDArray[np.float32]
    observations: NDArray[np.float64]
    rewards: NDArray[np.float64]
    success_step: int | None
    at_end: bool

    @property
    def score(self) -> float:
        """The sum of the rewards, divided by 10 for 1000 steps."""
        return 100 * float(self.rewards.mean())


class Success(NamedTuple):
    """The first success among some attempts.

    Attributes:
        outcome: What the successful attempt gave.
        seed: Its seed.
        dropped: Number of failed attempts before it.
    """

    outcome: Any
    seed: int
    dropped: int


def first_success(attempt: Callable[[int], Outcome | None], first_seed: int, number: int, task: str) -> Success:
    """Tries one seed after another. Which ones does not depend on other demonstrations.

    Args:
        attempt: What is tried with a seed; ``None`` for a failure.
        first_seed: Seed of the first attempt at the first demonstration.
        number: Number of the demonstration among those of its task.
        task: Name of the task, for the message.

    Raises:
        SimulationError: If no attempt succeeds.
    """
    for dropped in range(MOST_ATTEMPTS):
        seed = first_seed + number + dropped * MOST_EPISODES
        outcome = attempt(seed)
        if outcome is not None:
            return Success(outcome, seed, dropped)
    raise SimulationError(
        f"The expert failed {MOST_ATTEMPTS} times in a row at demonstration {number} of {task}. Give less --noise, or "
        "leave the task out; what was recorded before is whole."
    )


def attempt(environment: Environment, seed: int, noise: float, after_success: int) -> Trial | None:
    """Has the expert try a task, without looking, which takes far longer than to move.

    Args:
        environment: The task.
        seed: Seed of the episode, and of the noise.
        noise: Standard deviation of the noise that is added to the expert's actions.
        after_success: Number of steps to go on after the first success. A task that only has a score goes on to its
            horizon.

    Returns:
        The trial; ``None`` if it failed within the task's horizon, or its score is below that of a fair demonstration.
    """
    task = environment.task
    observation, expert = environment.reset(seed), environment.expert()
    rng = generator(task.name, seed, "noise")
    observations: list[NDArray[np.float64]] = []
    meant: list[NDArray[np.float32]] = []
    actions: list[NDArray[np.float32]] = []
    rewards: list[float] = []
    success_step: int | None = None
    while len(actions) < task.horizon and (success_step is None or len(actions) < success_step + after_success):
        wanted = expert(observation)
        action = np.clip(wanted + noise * rng.normal(size=len(task.actions)), -1, 1).astype(np.float32)
        observations.append(observation)
        meant.append(wanted)
        actions.append(action)
        observation, success, reward, _ = environment.step(action)
        rewards.append(reward)
        if success and success_step is None:
            success_step = len(actions)
    trial = Trial(
        np.array(actions), np.array(meant), np.array(observations), np.array(rewards), success_step,
        environment.success,
    )  # fmt: skip
    if task.measure == "return":
        return trial if trial.score >= PLANNING[task.name].least_score else None
    return trial if success_step is not None else None


def look(environment: Environment, seed: int, actions: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Repeats an episode and takes a picture before every action; uint8, shape ``(T, size, size, 3)``."""
    environment.reset(seed)
    pictures = []
    for action in actions:
        pictures.append(environment.render())
        environment.step(action)
    return np.stack(pictures)


def demonstrate(plan: Plan, root: Path, task: str, number: int, threads: int = 1) -> int:
    """Records one demonstration.

    Args:
        plan: What is recorded.
        root: Folder of the data set.
        task: One of the plan's tasks.
        number: Number of the demonstration among those of its task.
        threads: Number of threads that an expert may plan with.

    Returns:
        Number of its frames.

    Raises:
        SimulationError: If the expert fails again and again.
        FileError: If the disk is full.
    """
    environment = _environment(task, plan.size, plan.quality, plan.vary, plan.spread)
    environment.threads = threads
    started = time.perf_counter()
    trial: Trial
    trial, seed, dropped = first_success(
        lambda seed: attempt(environment, seed, plan.noise, plan.after_success), plan.seed, number, task
    )
    environment.reset(seed)
    beginning = environment.positions.tolist()
    pictures = look(environment, seed, trial.actions)
    values: dict[str, Values] = {ACTION: trial.actions, SCENE_STATE: trial.observations}
    if environment.task.states:
        values[STATE] = trial.observations[:, : environment.task.proprioception]
    if plan.noise:
        values[EXPERT_ACTION] = trial.meant
    about: dict[str, str | int | float] = {
        "seed": seed, "dropped": dropped, "seconds": time.perf_counter() - started,
        "initial_positions": json.dumps(beginning),
    }  # fmt: skip
    if trial.success_step is not None:
        about |= {"success_step": trial.success_step, "success_at_end": int(trial.at_end)}
    else:
        values[REWARD] = trial.rewards[:, None]
        about["score"] = trial.score
    writer = plan.open_writer(root)
    pictures_of = {plan.camera: pictures}
    writer.write(plan.index(task, number), task, values, pictures_of, {**about, **environment.scene.record()})
    return len(pictures)


@lru_cache(maxsize=1)
def _environment(task: str, size: int, quality: Quality, vary: tuple[Factor, ...], spread: float) -> Environment:
    return open_environment(task, size, quality, vary, spread)
