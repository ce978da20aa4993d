"""Adroit's tasks of gymnasium-robotics. There is no expert: demonstrations are imported."""

import contextlib
import importlib
import io
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cortexbench.fixed_camera import FixedCamera
from benchmarks.cortexbench.scenes import Factor
from benchmarks.cortexbench.simulation import Expert, Quality, Step
from benchmarks.cortexbench.tasks import NO_EXPERT, Task
from theia.errors import ConfigError

_CLASSES = {"pen": ("adroit_pen", "AdroitHandPenEnv"), "relocate": ("adroit_relocate", "AdroitHandRelocateEnv")}
_LOOKED_AT_M = (0.0, 0.0, 0.1)  # above the middle of the table
# Lower than this, a pen has been dropped. The environment itself goes on.
_DROPPED_M = {"pen": 0.075, "relocate": -math.inf}


class Adroit(FixedCamera):
    """One task of Adroit; see :class:`benchmarks.cortexbench.simulation.Environment`."""

    def __init__(self, task: Task, size: int, quality: Quality, vary: Collection[Factor]) -> None:
        module, name = _CLASSES[task.name]
        # It prints that rewards have changed, which are not what is measured here.
        with contextlib.redirect_stderr(io.StringIO()):
            found = importlib.import_module(f"gymnasium_robotics.envs.adroit_hand.{module}")
        self._environment: Any = getattr(found, name)()
        model, data = self._environment.model, self._environment.data
        super().__init__(task, model, data, size, quality, vary, model.camera(task.camera).id, _LOOKED_AT_M)

    def expert(self) -> Expert:
        """Refuses.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(NO_EXPERT.format(task=self.task.name))

    def _begin(self, seed: int) -> NDArray[np.float64]:
        observation: NDArray[np.float64] = self._environment.reset(seed=seed)[0]
        return observation

    def _move(self, action: NDArray[np.float32]) -> Step:
        observation, reward, _, _, more = self._environment.step(action)
        over = float(self._data.body("Object").xpos[2]) < _DROPPED_M[self.task.name]
        return Step(observation, bool(more["success"]), float(reward), over)
