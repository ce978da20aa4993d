"""What every simulator has in common: episodes from seeds, steps, success or reward, pictures through one camera.

The simulators are the extra ``theia[simulation]``. MuJoCo binds to OpenGL when it is imported, so that is chosen
before.
"""

import importlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from functools import cache
from types import ModuleType, TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cortexbench.scenes import Distractor, Factor, Scene, View, draw_pattern, draw_scene
from benchmarks.cortexbench.tasks import TASKS, Simulator, Task, find_tasks
from theia.errors import ConfigError, TheiaError

Quality = Literal["fast", "full"]
Expert = Callable[[NDArray[np.float64]], NDArray[np.float32]]

# Modules and distributions that the tasks of a simulator need, besides MuJoCo.
_NEEDS: dict[Simulator, tuple[str, str]] = {
    "metaworld": ("metaworld", "MetaWorld"),
    "dmc": ("dm_control", "dm-control"),
    "adroit": ("gymnasium_robotics", "gymnasium-robotics"),
}

DISTRIBUTIONS: dict[Simulator, str] = {simulator: package.lower() for simulator, (_, package) in _NEEDS.items()}

_BACKENDS = ("egl", "osmesa")
_PACKAGES = "libegl1 libgl1 libgl1-mesa-dri libgles2 libglx-mesa0 libosmesa6"
_TRY = """
import mujoco
context = mujoco.GLContext(16, 16)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
print("works", flush=True)
"""
_PATIENCE_S = 120


class SimulationError(TheiaError):
    """A simulated robot cannot do what it is told, or does not do what it should."""


class Step(NamedTuple):
    """What one step of the simulation leads to.

    Attributes:
        observation: Everything that the simulator says about the scene, the goal included.
        success: Whether the task is fulfilled in this moment; never for a task that only has a score.
        reward: The simulator's own reward.
        over: Whether the episode cannot go on, such as after a pen was dropped.
    """

    observation: NDArray[np.float64]
    success: bool
    reward: float = 0.0
    over: bool = False


class Environment(ABC):
    """One task in its simulator; :func:`open_environment` chooses the class.

    An episode is a function of the seed that it is reset with, whatever was simulated before.

    Args:
        task: The task.
        model: MuJoCo's model of it.
        data: MuJoCo's data, which the simulator moves.
        size: Height and width of the pictures, in pixels.
        quality: ``full`` for MuJoCo's own; ``fast`` without antialiasing, shadows and reflections.
        vary: What is drawn anew with every reset.

    Attributes:
        task: The task.
        scene: What the episode looks like.
        own_view: The task's own camera at the beginning of the episode.
        threads: Number of threads that an expert may plan with. What it does is independent of it.
        spread: Share of the whole range in which camera and light are drawn.
    """

    own_view: View
    scene: Scene

    def __init__(
        self, task: Task, model: Any, data: Any, size: int, quality: Quality, vary: Collection[Factor]
    ) -> None:
        self.task, self.threads, self.spread = task, 1, 1.0
        self._model, self._data, self._size, self._quality, self._vary = model, data, size, quality, tuple(vary)
        self._lights = [
            (array, array.copy())
            for array in (
                model.light_ambient, model.light_diffuse, model.light_specular,
                *(getattr(model.vis.headlight, part) for part in ("ambient", "diffuse", "specular")),
            )
        ]  # fmt: skip
        self._own_pixels = self._model.tex_data.copy()
        self._renderer: Any = None
        self._now = Step(np.zeros(0), False)
        self._seed = 0

    def __enter__(self) -> "Environment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def observation(self) -> NDArray[np.float64]:
        """Everything that the simulator says about the scene, the goal included."""
        return self._now.observation

    @property
    def success(self) -> bool:
        """Whether the task is fulfilled in this moment."""
        return self._now.success

    @property
    def positions(self) -> NDArray[np.float64]:
        """Positions of all joints and free objects in MuJoCo's order."""
        return np.array(self._data.qpos)

    @abstractmethod
    def expert(self) -> Expert:
        """An expert for this task, at the beginning of an episode: from observations to actions.

        Raises:
            ConfigError: If there is none.
        """

    @abstractmethod
    def _begin(self, seed: int) -> NDArray[np.float64]:
        """Begins an episode and gives the first observation."""

    @abstractmethod
    def _move(self, action: NDArray[np.float32]) -> Step:
        """Moves the robot by an action in ``[-1, 1]``."""

    @abstractmethod
    def _find_view(self) -> View:
        """The task's own camera at the beginning of an episode."""

    def _camera(self, view: View) -> Any:
        """MuJoCo's camera for a view of this moment."""
        mujoco = load_mujoco()
        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        camera.azimuth, camera.elevation, camera.distance = view.azimuth_deg, view.elevation_deg, view.distance_m
        camera.lookat = view.look_at_m
        return camera

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Begins an episode.

        Args:
            seed: Seed of objects, goal, camera and light.

        Returns:
            The first observation.
        """
        self._seed = seed
        self._now = Step(self._begin(seed), False)
        self.own_view = self._find_view()
        self.scene = draw_scene(self.own_view, self._vary, self.task.name, seed, self.spread)
        for array, own in self._lights:
            array[...] = own * self.scene.light
        self._set_textures()
        return self.observation

    def step(self, action: NDArray[np.floating[Any]]) -> Step:
        """Moves the robot.

        Args:
            action: Values in ``[-1, 1]``; what is outside is clipped.

        Raises:
            SimulationError: If the action has another shape, or is not finite.
        """
        names = self.task.actions
        if np.shape(action) != (len(names),) or not np.isfinite(action).all():
            raise SimulationError(
                f"{self.task.name} was given the action {np.array2string(np.asarray(action), precision=3)}. It takes "
                f"{len(names)} finite numbers: {', '.join(names)}."
            )
        self._now = self._move(np.clip(action, -1, 1).astype(np.float32))
        return self._now

    def render(self) -> NDArray[np.uint8]:
        """Picture of this moment, RGB, shape ``(size, size, 3)``.

        Raises:
            ConfigError: If OpenGL does not work.
        """
        if self._renderer is None:
            self._renderer = self._open_renderer()
        self._renderer.update_scene(self._data, self._camera(self.scene.view))
        for distractor in self.scene.distractors:
            self._show(distractor)
        picture: NDArray[np.uint8] = self._renderer.render()
        return picture

    def close(self) -> None:
        """Frees what rendering holds."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _set_textures(self) -> None:
        """Gives every picture of the model (table, floor, walls, things) its own pixels or a drawn pattern."""
        model, rng = self._model, None
        if self.scene.texture is None:
            if np.array_equal(model.tex_data, self._own_pixels):
                return
            model.tex_data[:] = self._own_pixels
        else:
            rng = np.random.default_rng(self.scene.texture)
        for number in range(model.ntex):
            height, width, channels = (
                int(getattr(model, f"tex_{what}")[number]) for what in ("height", "width", "nchannel")
            )
            if rng is not None and channels == len("rgb"):
                start = int(model.tex_adr[number])
                model.tex_data[start : start + height * width * channels] = draw_pattern(height, width, rng).ravel()
            if self._renderer is not None:
                # The pixels lie with OpenGL; MuJoCo's renderer has no public way to send them anew.
                self._renderer._gl_context.make_current()
                load_mujoco().mjr_uploadTexture(model, self._renderer._mjr_context, number)

    def _show(self, distractor: Distractor) -> None:
        """Adds a thing to what is about to be rendered; the simulation knows nothing of it."""
        mujoco, scene = load_mujoco(), self._renderer.scene
        kinds = {
            "box": mujoco.mjtGeom.mjGEOM_BOX,
            "ball": mujoco.mjtGeom.mjGEOM_SPHERE,
            "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER,
        }
        x, y = np.add(self.own_view.look_at_m[:2], distractor.from_middle_m)
        size = distractor.size_m
        mujoco.mjv_initGeom(
            scene.geoms[scene.ngeom], kinds[distractor.shape], np.full(3, size), np.array([x, y, size]),
            np.eye(3).ravel(), np.array([*distractor.colour, 1], np.float32),
        )  # fmt: skip
        scene.ngeom += 1

    def _open_renderer(self) -> Any:
        mujoco = load_mujoco()
        self._model.vis.global_.offwidth = self._model.vis.global_.offheight = self._size
        if self._quality == "fast":
            self._model.vis.quality.offsamples = 0
        try:
            renderer = mujoco.Renderer(self._model, self._size, self._size)
        except Exception as error:
            # Every backend has errors of its own.
            raise ConfigError(_no_opengl(f"{type(error).__name__}: {error}")) from error
        if self._quality == "fast":
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                renderer.scene.flags[flag] = 0
        return renderer


def open_environment(
    task: str, size: int = 256, quality: Quality = "fast", vary: Collection[Factor] = (), spread: float = 1.0
) -> Environment:
    """Opens a task in its simulator.

    Args:
        task: Name of the task.
        size: Height and width of the pictures, in pixels.
        quality: ``full`` for MuJoCo's own; ``fast`` without antialiasing, shadows and reflections.
        vary: What is drawn anew with every reset.
        spread: Share of the whole range in which camera and light are drawn.

    Raises:
        ConfigError: If the simulator is not installed, there is no such task, or nothing can be rendered.
    """
    (name,) = find_tasks([task])
    found = TASKS[name]
    check_installed([found.simulator])
    load_mujoco()
    # A simulator that is not needed need not be there.
    module, of = {
        "metaworld": ("metaworld", "MetaWorld"),
        "dmc": ("control_suite", "ControlSuite"),
        "adroit": ("adroit", "Adroit"),
    }[found.simulator]
    environment: Environment = getattr(importlib.import_module(f"benchmarks.cortexbench.{module}"), of)(
        found, size, quality, vary
    )
    environment.spread = spread
    return environment


def find_opengl() -> str:
    """Finds a way to render without a screen, and has MuJoCo use it in this process and those that it starts.

    Returns:
        What it found: what ``MUJOCO_GL`` says, if it is set.

    Raises:
        ConfigError: If there is none, or that one does not work. The message names the system's packages.
    """
    chosen = os.environ.get("MUJOCO_GL")
    if chosen and multiprocessing.parent_process() is not None:
        return chosen  # tried by the process that started this one
    said = ""
    for backend in (chosen,) if chosen else _BACKENDS:
        # In another process: a failed attempt leaves this one unfit for the next.
        tried = subprocess.run(
            [sys.executable, "-c", _TRY], env={**os.environ, "MUJOCO_GL": backend}, capture_output=True, text=True,
            timeout=_PATIENCE_S,
        )  # fmt: skip
        if "works" in tried.stdout:
            os.environ["MUJOCO_GL"] = backend
            return backend
        said += f" {backend}: {(tried.stderr.strip().splitlines() or ['no message'])[-1]}"
    raise ConfigError(_no_opengl(said.strip()))


@cache
def load_mujoco() -> ModuleType:
    """Imports MuJoCo, once there is a way to render.

    Raises:
        ConfigError: If the simulator is not installed, or nothing can be rendered.
    """
    check_installed()
    find_opengl()
    try:
        return importlib.import_module("mujoco")
    except Exception as error:
        # A library that is missing makes OpenGL's bindings raise nearly anything.
        raise ConfigError(_no_opengl(f"{type(error).__name__}: {error}")) from error


def check_installed(simulators: Iterable[Simulator] = ()) -> None:
    """Checks that there are MuJoCo and the simulators that are needed.

    Args:
        simulators: Simulators that are needed.

    Raises:
        ConfigError: If one is not installed.
    """
    needed = [("mujoco", "MuJoCo"), *(_NEEDS[name] for name in dict.fromkeys(simulators))]
    missing = [package for module, package in needed if importlib.util.find_spec(module) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"The tasks run in simulators on MuJoCo, and {' and '.join(missing)} {are} not installed: pip "
            "install 'theia[simulation]'. It holds MuJoCo at the version that MetaWorld wants; if other programs want "
            "another, install it in an environment of its own."
        )


def _no_opengl(said: str) -> str:
    chosen = os.environ.get("MUJOCO_GL")
    return (
        f"Nothing can be rendered{f' with MUJOCO_GL={chosen}' if chosen else ''} ({said}). On Debian and Ubuntu: "
        f"apt-get install {_PACKAGES}. Then leave MUJOCO_GL unset, or set it to egl or osmesa."
    )
