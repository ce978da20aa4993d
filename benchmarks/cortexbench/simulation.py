"""MetaWorld's tasks: reset from a seed, step, success, and pictures through one movable camera.

The simulator is the extra ``theia[simulation]``. MuJoCo binds to OpenGL when it is imported, so that is chosen before.
"""

import difflib
import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from types import ModuleType, TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cortexbench.scenes import Distractor, Factor, Scene, draw_pattern, draw_scene, view_from
from theia.errors import ConfigError, TheiaError

Quality = Literal["fast", "full"]
Expert = Callable[[NDArray[np.float64]], NDArray[np.float32]]

HORIZON = 500
# Actions are relative, so they must not share the names of positions.
ACTIONS = ("dx", "dy", "dz", "gripper_effort")
STATES = ("x", "y", "z", "gripper_opening")

# Names that stand for several tasks. The five are those of CortexBench.
GROUPS = {
    "metaworld": ("assembly-v3", "bin-picking-v3", "button-press-topdown-v3", "drawer-open-v3", "hammer-v3"),
}

# CortexBench looks through a camera "top_cap2", which MetaWorld has lost since.
_CAMERA_M, _TARGET = (0.0, 0.9, 0.6), "tablelink"

_VERSION = "-v3"
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
        observation: Everything that MetaWorld says about the scene, the goal included, shape ``(39,)``.
        success: Whether the task is fulfilled in this moment.
    """

    observation: NDArray[np.float64]
    success: bool


class Environment:
    """One task.

    An episode is a function of the seed that it is reset with, whatever was simulated before.

    Args:
        task: Name of a task of MetaWorld, such as ``drawer-open-v3``.
        size: Height and width of the pictures, in pixels.
        quality: ``full`` for MuJoCo's own; ``fast`` without antialiasing, shadows and reflections.
        vary: What is drawn anew with every reset.

    Attributes:
        task: Name of the task.
        scene: What the episode looks like.

    Raises:
        ConfigError: If the simulator is not installed, there is no such task, or nothing can be rendered.
    """

    def __init__(self, task: str, size: int = 256, quality: Quality = "fast", vary: Collection[Factor] = ()) -> None:
        (self.task,) = find_tasks([task])
        self._vary, self._size, self._quality = tuple(vary), size, quality
        self._environment: Any = _metaworld("env_dict").ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[
            f"{self.task}-goal-observable"
        ]()
        # Without these two, every episode begins in the same state, whatever the seed.
        self._environment._freeze_rand_vec = False
        self._environment.seeded_rand_vec = True
        self._model = self._environment.model
        target = self._environment.data.body(_TARGET).xpos
        self.own_view = view_from(_CAMERA_M, target)
        self.scene = Scene(self.own_view)
        self._lights = [
            (array, array.copy())
            for array in (
                self._model.light_ambient, self._model.light_diffuse, self._model.light_specular,
                *(getattr(self._model.vis.headlight, part) for part in ("ambient", "diffuse", "specular")),
            )
        ]  # fmt: skip
        self._own_pixels = self._model.tex_data.copy()
        self._renderer: Any = None
        self._observation: NDArray[np.float64] = np.zeros(0)
        self._success = False

    def __enter__(self) -> "Environment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def frames_per_s(self) -> int:
        """Steps in a second of the robot's time."""
        return round(1 / float(self._environment.dt))

    @property
    def observation(self) -> NDArray[np.float64]:
        """Everything that MetaWorld says about the scene, the goal included, shape ``(39,)``."""
        return self._observation

    @property
    def state(self) -> NDArray[np.float64]:
        """What the robot knows of itself: position of the hand in metres, opening of the gripper; shape ``(4,)``."""
        return self._observation[: len(STATES)]

    @property
    def positions(self) -> NDArray[np.float64]:
        """Positions of all joints and free objects in MuJoCo's order."""
        return np.array(self._environment.data.qpos)

    @property
    def success(self) -> bool:
        """Whether the task is fulfilled in this moment."""
        return self._success

    def reset(self, seed: int) -> NDArray[np.float64]:
        """Begins an episode.

        Args:
            seed: Seed of objects, goal, camera and light.

        Returns:
            The first observation.
        """
        self._environment.seed(seed)
        self._observation = self._environment.reset()[0]
        self._success = False
        self.scene = draw_scene(self.own_view, self._vary, self.task, seed)
        for array, own in self._lights:
            array[...] = own * self.scene.light
        self._set_textures()
        return self._observation

    def step(self, action: NDArray[np.floating[Any]]) -> Step:
        """Moves the robot.

        Args:
            action: Motion of the hand along x, y and z, and of the gripper, each in ``[-1, 1]``; what is outside is
                clipped.

        Raises:
            SimulationError: If the action has another shape, or is not finite.
        """
        if np.shape(action) != (len(ACTIONS),) or not np.isfinite(action).all():
            raise SimulationError(
                f"{self.task} was given the action {np.array2string(np.asarray(action), precision=3)}. It takes "
                f"{len(ACTIONS)} finite numbers: {', '.join(ACTIONS)}."
            )
        self._observation, _, _, _, more = self._environment.step(np.clip(action, -1, 1).astype(np.float32))
        self._success = bool(more["success"])
        return Step(self._observation, self._success)

    def render(self) -> NDArray[np.uint8]:
        """Picture of this moment, RGB, shape ``(size, size, 3)``.

        Raises:
            ConfigError: If OpenGL does not work.
        """
        mujoco = load_mujoco()
        if self._renderer is None:
            self._renderer = self._open_renderer()
        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        view = self.scene.view
        camera.azimuth, camera.elevation, camera.distance = view.azimuth_deg, view.elevation_deg, view.distance_m
        camera.lookat = view.look_at_m
        self._renderer.update_scene(self._environment.data, camera)
        for distractor in self.scene.distractors:
            self._show(distractor)
        picture: NDArray[np.uint8] = self._renderer.render()
        return picture

    def expert(self) -> Expert:
        """MetaWorld's scripted policy for this task, at the beginning of an episode: from observations to actions."""
        policy = _metaworld("policies").ENV_POLICY_MAP[self.task]()

        def act(observation: NDArray[np.float64]) -> NDArray[np.float32]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that its actions will be clipped
                action: NDArray[np.float32] = np.clip(policy.get_action(observation), -1, 1).astype(np.float32)
            return action

        return act

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


def find_tasks(names: Iterable[str], known: Sequence[str] | None = None) -> list[str]:
    """Finds tasks by their names, which may lack their version, or by the name of a group.

    Args:
        names: Names as a user gives them.
        known: All tasks that there are; by default, those of MetaWorld.

    Returns:
        Full names, each once, in the given order.

    Raises:
        ConfigError: If there is no such task, or the simulator is not installed.
    """
    known = list(_metaworld("env_dict").ENV_CLS_MAP) if known is None else known
    found: dict[str, None] = {}
    for name in names:
        if name in GROUPS:
            found |= dict.fromkeys(GROUPS[name])
            continue
        full = name if name in known else f"{name}{_VERSION}"
        if full not in known:
            near = difflib.get_close_matches(full, [*known, *GROUPS], 1)
            there = ", ".join(task.removesuffix(_VERSION) for task in sorted(known))
            raise ConfigError(
                f"There is no task {name!r}."
                + (f" Is it {near[0].removesuffix(_VERSION)!r}?" if near else "")
                + f" Groups: {', '.join(GROUPS)}. Tasks: {there}."
            )
        found[full] = None
    return list(found)


def find_opengl() -> str:
    """Finds a way to render without a screen, and has MuJoCo use it in this process and those that it starts.

    Returns:
        What it found, or what ``MUJOCO_GL`` says.

    Raises:
        ConfigError: If there is none. The message names the system's packages.
    """
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    said = ""
    for backend in _BACKENDS:
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


def check_installed() -> None:
    """Checks that there is a simulator.

    Raises:
        ConfigError: If it is not installed.
    """
    missing = [name for name in ("mujoco", "metaworld") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"The tasks run in MetaWorld on MuJoCo, and {missing[0]} is not installed: pip install "
            "'theia[simulation]'. It holds MuJoCo at the version that MetaWorld wants; if other programs want another, "
            "install it in an environment of its own."
        )


def _metaworld(module: str) -> ModuleType:
    load_mujoco()
    return importlib.import_module(f"metaworld.{module}")


def _no_opengl(said: str) -> str:
    chosen = os.environ.get("MUJOCO_GL")
    return (
        f"Nothing can be rendered{f' with MUJOCO_GL={chosen}' if chosen else ''} ({said}). On Debian and Ubuntu: "
        f"apt-get install {_PACKAGES}. Then leave MUJOCO_GL unset, or set it to egl or osmesa."
    )
