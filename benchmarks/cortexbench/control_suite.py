"""Tasks of the DeepMind Control Suite, with experts that plan."""

import importlib
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cortexbench.fixed_camera import FixedCamera
from benchmarks.cortexbench.planning import PLANNING, Planner
from benchmarks.cortexbench.scenes import Factor, generator
from benchmarks.cortexbench.simulation import Expert, Quality, Step
from benchmarks.cortexbench.tasks import Task

# Near which cameras look that follow nothing.
_LOOKED_AT_M = {"reacher": (0.0, 0.0, 0.01), "finger": (0.0, 0.0, 0.4)}
_CAMERA = 0


class ControlSuite(FixedCamera):
    """One task of the suite; see :class:`benchmarks.cortexbench.simulation.Environment`."""

    def __init__(self, task: Task, size: int, quality: Quality, vary: Collection[Factor]) -> None:
        suite = importlib.import_module("dm_control.suite")
        domain, _, name = task.name.partition("-")
        # After its own limit, the suite would begin another episode by itself.
        self._environment: Any = suite.load(domain, name, task_kwargs={"random": 0, "time_limit": math.inf})
        physics = self._environment.physics
        looked_at = _LOOKED_AT_M.get(domain, (0.0, 0.0, 0.0))
        super().__init__(task, physics.model.ptr, physics.data.ptr, size, quality, vary, _CAMERA, looked_at)

    def expert(self) -> Expert:
        """A planner that knows the model, its state and the reward."""
        substeps = round(self._environment.control_timestep() / self._model.opt.timestep)
        planner = Planner(
            PLANNING[self.task.name], self._model, substeps, generator(self.task.name, self._seed, "expert"),
            self.threads,
        )  # fmt: skip
        return lambda _: planner.act(self._data)

    def _begin(self, seed: int) -> NDArray[np.float64]:
        self._environment.task.random.seed(seed)
        return _flat(self._environment.reset().observation)

    def _move(self, action: NDArray[np.float32]) -> Step:
        moment = self._environment.step(action)
        return Step(_flat(moment.observation), False, float(moment.reward))


def _flat(observation: Any) -> NDArray[np.float64]:
    """All values of an observation, in the suite's order."""
    return np.concatenate([np.ravel(np.asarray(part, np.float64)) for part in observation.values()])
