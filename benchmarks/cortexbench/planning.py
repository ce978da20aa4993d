"""Experts that plan: model predictive path integral control (MPPI) with MuJoCo's own rollouts.

Many plans near the last one are simulated; their mean, weighted by what they earn, is the next plan, whose first
actions are carried out.

Source: Williams et al., Information Theoretic MPC for Model-Based Reinforcement Learning, algorithm 2. Here the plans
are drawn as values at few moments, between which they are linear, and with spreads of several sizes.
"""

import copy
import importlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Moments(NamedTuple):
    """Simulated moments of many plans.

    Attributes:
        model: MuJoCo's model.
        positions: Positions of the joints, shape ``(samples, steps, positions)``.
        velocities: Their velocities, shape ``(samples, steps, velocities)``.
        sensors: Values of the sensors, shape ``(samples, steps, values)``.
    """

    model: Any
    positions: Array
    velocities: Array
    sensors: Array


Earnings = Callable[[Moments], Array]  # shape (samples, steps)

_LOST = -10.0  # what a simulation earns that came to values that are not finite


@dataclass(frozen=True)
class Planning:
    """How a task is planned.

    Attributes:
        earnings: What a moment earns: the task's reward, made smooth where it is flat.
        least_score: Score, between 0 and 100, below which a demonstration is dropped.
        samples: Number of plans that are simulated each time.
        steps: Number of steps that a plan looks ahead.
        knots: Number of moments at which a plan is drawn.
        spread: Greatest standard deviation of a drawn value.
        least_share: Least standard deviation, as a share of the greatest; each plan has its own.
        uniform: Number of plans that are drawn anew, far from the last plan.
        temperature: Spread of earnings within which plans count alike, in standard deviations of all.
        substeps: Number of physical steps in which a plan simulates one action.
        every: Number of actions that are carried out of each plan.
    """

    earnings: Earnings
    least_score: float
    samples: int
    steps: int
    knots: int
    spread: float
    least_share: float
    uniform: int
    temperature: float
    substeps: int
    every: int


class Planner:
    """An expert for one episode.

    Args:
        planning: How the task is planned.
        model: MuJoCo's model of the task, which stays as it is.
        substeps: Number of physical steps in which the simulator carries out one action.
        rng: Random numbers, from which with the states follows what is done, whatever the number of threads.
        threads: Number of threads.
    """

    def __init__(
        self, planning: Planning, model: Any, substeps: int, rng: np.random.Generator, threads: int = 1
    ) -> None:
        self._mujoco = importlib.import_module("mujoco")
        self._rollout = importlib.import_module("mujoco.rollout").rollout
        self._planning, self._rng = planning, rng
        self._model = copy.copy(model)
        self._model.opt.timestep *= substeps / planning.substeps
        self._data = [self._mujoco.MjData(self._model) for _ in range(threads)]
        self._between = _linear(planning.knots, planning.steps)
        self._plan = np.zeros((planning.steps, model.nu))
        self._queue: deque[NDArray[np.float32]] = deque()

    def act(self, data: Any) -> NDArray[np.float32]:
        """The next action, shape ``(A,)``, in ``[-1, 1]``.

        Args:
            data: MuJoCo's data of this moment, which stay as they are.
        """
        if not self._queue:
            every = self._planning.every
            self._improve(data)
            self._queue.extend(self._plan[:every].astype(np.float32))
            self._plan = np.concatenate([self._plan[every:], np.zeros((every, self._plan.shape[1]))])
        return self._queue.popleft()

    def _improve(self, data: Any) -> None:
        kind = self._mujoco.mjtState.mjSTATE_FULLPHYSICS
        state = np.zeros(self._mujoco.mj_stateSize(self._model, kind))
        self._mujoco.mj_getState(self._model, data, state, kind)
        one = self._planning
        plans = self._draw()
        every = max(1, one.substeps)
        states, sensors = self._rollout(
            self._model, self._data, state[None], np.repeat(plans, every, 1), persistent_pool=len(self._data) > 1
        )
        states, sensors = states[:, every - 1 :: every], sensors[:, every - 1 :: every]
        positions, velocities = np.split(states[..., 1 : 1 + self._model.nq + self._model.nv], [self._model.nq], -1)
        earned = np.nan_to_num(one.earnings(Moments(self._model, positions, velocities, sensors)), nan=_LOST).mean(1)
        weights = np.exp((earned - earned.max()) / (one.temperature * max(float(earned.std()), 1e-9)))
        self._plan = np.einsum("k,kta->ta", weights / weights.sum(), plans)

    def _draw(self) -> Array:
        """Plans, shape ``(samples, steps, A)``; the first is the last plan itself."""
        one, actions = self._planning, self._plan.shape[1]
        shares = np.exp(self._rng.uniform(np.log(one.least_share), 0, (one.samples, 1, 1)))
        changes = self._between @ self._rng.normal(size=(one.samples, one.knots, actions)) * (one.spread * shares)
        changes[0] = 0
        plans = self._plan + changes
        if one.uniform:
            drawn = self._rng.uniform(-1.5, 1.5, (one.uniform, one.knots, actions))
            plans[1 : 1 + one.uniform] = self._between @ drawn
        return np.asarray(np.clip(plans, -1, 1))


def _linear(knots: int, steps: int) -> Array:
    """Matrix that makes a value for each step of values at some moments, linear between them."""
    places = np.linspace(0, knots - 1, steps)
    return np.stack([np.interp(places, np.arange(knots), row) for row in np.eye(knots)], 1)


def _toward(value: Array, least: float, margin: float) -> Array:
    """One from the least value on; below it, a Gaussian that is 0.1 at the margin. As in the suite."""
    missing = np.maximum(least - value, 0) / margin
    return np.asarray(np.exp(np.log(0.1) * missing**2))


def _walker(speed: float) -> Earnings:
    def earnings(now: Moments) -> Array:
        height = now.model.body("torso").pos[2] + now.positions[..., 0]
        forwards = now.sensors[..., 0]
        standing = (3 * _toward(height, 1.2, 0.6) + (1 + np.cos(now.positions[..., 2])) / 2) / 4
        if not speed:
            return np.asarray(standing - 0.002 * np.abs(forwards))
        return np.asarray(standing * (5 * np.clip(forwards / speed, -0.5, 1) + 1) / 6)

    return earnings


def _cheetah(now: Moments) -> Array:
    return np.asarray(now.sensors[..., 0] / 10 - 0.1 * (1 - np.cos(now.positions[..., 2])))


def _reacher(now: Moments) -> Array:
    upper, lower = (now.model.body(name).pos[0] for name in ("hand", "finger"))
    target, finger = now.model.geom("target"), now.model.geom("finger")
    first, second = now.positions[..., 0], now.positions.sum(-1)
    x = upper * np.cos(first) + lower * np.cos(second) - target.pos[0]
    y = upper * np.sin(first) + lower * np.sin(second) - target.pos[1]
    distance = np.hypot(x, y)
    # A little inside, so that it stays there.
    there = distance < 0.9 * (target.size[0] + finger.size[0])
    return np.asarray(there - 2 * distance - 0.002 * np.abs(now.velocities).sum(-1))


def _finger(now: Moments) -> Array:
    spin = -now.velocities[..., 2]  # rad/s; the reward begins at 15
    return np.asarray(np.clip(spin / 15, -1, 1.2) + (spin > 15))


# Found by a random search on a few episodes.
PLANNING = {
    "walker-stand": Planning(_walker(0), 90, 32, 28, 3, 1.2, 0.1, 0, 0.05, 5, 2),
    "walker-walk": Planning(_walker(1), 80, 32, 28, 3, 1.2, 0.1, 0, 0.05, 5, 2),
    "reacher-easy": Planning(_reacher, 80, 32, 24, 4, 0.4, 0.3, 0, 0.5, 1, 2),
    "cheetah-run": Planning(_cheetah, 40, 48, 60, 6, 0.6, 1.0, 0, 0.05, 1, 1),
    "finger-spin": Planning(_finger, 50, 64, 14, 14, 1.2, 1.0, 0, 0.05, 2, 1),
}
