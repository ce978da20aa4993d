"""Simulators in processes of their own, which load nothing but what simulating needs."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.cortexbench.scenes import Factor
from benchmarks.cortexbench.simulation import Environment, Quality, SimulationError, find_opengl, open_environment
from theia.errors import TheiaError
from theia.extraction.images import to_square

# While the pictures of one group of environments are encoded, the other group is simulated.
_GROUPS = 2
_LEAVE_S = 10.0


@dataclass(frozen=True)
class Course:
    """What all policies for one task are tested on. It is the same for every encoder.

    Attributes:
        task: Full name of the task.
        seeds: Seeds of the rollouts, on which objects, goal, camera and light depend.
        vary: What is drawn anew for every rollout.
        spread: Share of the whole range in which camera and light are drawn.
        size: Height and width of the rendered pictures, in pixels.
        quality: Quality of the rendering.
        shown: Height and width of the pictures that an encoder is given, in pixels.
        horizon: Number of steps of a rollout.
        hold: Number of steps on end that the task must be fulfilled for a rollout to end before; ``None`` for never.
    """

    task: str
    seeds: tuple[int, ...]
    vary: tuple[Factor, ...]
    spread: float
    size: int
    quality: Quality
    shown: int
    horizon: int
    hold: int | None


class Moment(NamedTuple):
    """What a simulator says after a reset or a step.

    Attributes:
        observation: Everything that the simulator says about the scene, shape ``(S,)``.
        success: Whether the task is fulfilled.
        picture: What an encoder is given, uint8, shape ``(3, shown, shown)``; ``None`` if nobody looks.
        beginning: After a reset, positions, camera and light.
        reward: What the step earned.
        over: Whether the episode cannot go on.
    """

    observation: NDArray[np.float64]
    success: bool
    picture: NDArray[np.uint8] | None
    beginning: dict[str, Any] | None
    reward: float = 0.0
    over: bool = False


class Command(NamedTuple):
    """What a simulator is told: to begin an episode, or to move.

    Attributes:
        slot: Number of the environment.
        look: Whether a picture is wanted.
        seed: Seed of the episode that begins; ``None`` for a step.
        action: What to do.
    """

    slot: int
    look: bool
    seed: int | None = None
    action: NDArray[np.float32] | None = None


class Simulators:
    """Processes with environments of one task. Every process holds one environment of each group.

    Args:
        course: What is simulated.
        workers: Number of processes.

    Attributes:
        groups: Numbers of the environments, in groups that take turns.

    Raises:
        ConfigError: If nothing can be rendered.
    """

    def __init__(self, course: Course, workers: int) -> None:
        find_opengl()  # here, since the processes take what is found
        workers = min(workers, max(1, -(-len(course.seeds) // _GROUPS)))
        self.groups = [[group * workers + worker for worker in range(workers)] for group in range(_GROUPS)]
        # A forked process would share the parent's threads and its connection to OpenGL.
        context = multiprocessing.get_context("spawn")
        self._task, self._pipes, self._processes = course.task, [], []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_simulate, args=(theirs, course), daemon=True)
            with _one_thread():
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "Simulators":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()  # which ends the process
        for process in self._processes:
            process.join(_LEAVE_S)
            if process.is_alive():
                process.kill()

    def send(self, command: Command) -> None:
        """Tells an environment what to do, and does not wait.

        Raises:
            SimulationError: If its process is gone.
        """
        with self._alive():
            self._pipe(command.slot).send(command)

    def receive(self, slot: int) -> Moment:
        """Waits for what an environment says.

        Raises:
            TheiaError: If the simulation failed, or its process is gone.
        """
        with self._alive():
            said = self._pipe(slot).recv()
        if isinstance(said, TheiaError):
            raise said
        return cast(Moment, said)

    def _pipe(self, slot: int) -> "Connection[Any, Any]":
        return self._pipes[slot % len(self._pipes)]

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            raise SimulationError(
                f"A process that simulates {self._task} is gone, perhaps for want of memory. Run the same command "
                "again, with fewer --workers; what was finished is kept."
            ) from error


def _simulate(pipe: "Connection[Any, Any]", course: Course) -> None:
    """A process: does what it is told until nobody tells it any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its processes
    environments: dict[int, Environment] = {}
    try:
        while True:
            command: Command = pipe.recv()
            said: Moment | TheiaError
            try:
                said = _obey(command, course, environments)
            except TheiaError as error:
                said = error
            except Exception as error:
                # Simulators and OpenGL raise errors of their own.
                said = SimulationError(
                    f"{course.task} cannot be simulated ({type(error).__name__}: {error}). Leave the task out; what "
                    "was finished is kept."
                )
            pipe.send(said)
    except (EOFError, OSError):
        return  # the parent has closed the pipe, or was killed
    finally:
        for environment in environments.values():
            environment.close()


def _obey(command: Command, course: Course, environments: dict[int, Environment]) -> Moment:
    if command.slot not in environments:
        environments[command.slot] = open_environment(
            course.task, course.size, course.quality, course.vary, course.spread
        )
    environment = environments[command.slot]
    beginning, reward, over = None, 0.0, False
    if command.seed is not None:
        environment.reset(command.seed)
        beginning = {"positions": environment.positions.tolist(), **environment.scene.record()}
    else:
        _, _, reward, over = environment.step(cast(Any, command.action))
    picture = None
    if command.look:
        picture = to_square(Image.fromarray(environment.render()), course.shown, "squash")
    return Moment(np.array(environment.observation), environment.success, picture, beginning, reward, over)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lets processes that are started inside compute and render with one thread each."""
    names = {"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
