"""MetaWorld's tasks, with its scripted experts."""

import importlib
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cortexbench.scenes import Factor, View, view_from
from benchmarks.cortexbench.simulation import Environment, Expert, Quality, Step, load_mujoco
from benchmarks.cortexbench.tasks import Task

# CortexBench looks through a camera "top_cap2", which MetaWorld has lost since.
_CAMERA_M, _TARGET = (0.0, 0.9, 0.6), "tablelink"


class MetaWorld(Environment):
    """One task of MetaWorld; see :class:`benchmarks.cortexbench.simulation.Environment`."""

    def __init__(self, task: Task, size: int, quality: Quality, vary: Collection[Factor]) -> None:
        tasks = importlib.import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        self._environment: Any = tasks[f"{task.name}-goal-observable"]()
        # Without these two, every episode begins in the same state, whatever the seed.
        self._environment._freeze_rand_vec = False
        self._environment.seeded_rand_vec = True
        super().__init__(task, self._environment.model, self._environment.data, size, quality, vary)
        self.own_view = view_from(_CAMERA_M, self._data.body(_TARGET).xpos)

    def expert(self) -> Expert:
        """MetaWorld's scripted policy for this task."""
        policy = importlib.import_module("metaworld.policies").ENV_POLICY_MAP[self.task.name]()

        def act(observation: NDArray[np.float64]) -> NDArray[np.float32]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that its actions will be clipped
                action: NDArray[np.float32] = np.clip(policy.get_action(observation), -1, 1).astype(np.float32)
            return action

        return act

    def _begin(self, seed: int) -> NDArray[np.float64]:
        self._environment.seed(seed)
        observation: NDArray[np.float64] = self._environment.reset()[0]
        # In some tasks, MetaWorld moves a body after it has computed where everything is: picture and observation would
        # show it where it was until the first step. The solver's next search begins at what is found here, so contacts
        # may differ a little from those of an environment without this.
        load_mujoco().mj_forward(self._model, self._data)
        here = self._environment._get_curr_obs_combined_no_goal()
        self._environment._prev_obs = here.copy()
        observation[: 2 * len(here)] = np.concatenate([here, here])  # now, and one step before
        return observation

    def _move(self, action: NDArray[np.float32]) -> Step:
        observation, reward, _, _, more = self._environment.step(action)
        return Step(observation, bool(more["success"]), float(reward))

    def _find_view(self) -> View:
        return self.own_view
