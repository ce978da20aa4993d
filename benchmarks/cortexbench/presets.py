"""How much a benchmark of policies does, by name."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.cortexbench.tasks import Task

Features = Literal["spatial", "vector"]
PresetName = Literal["smoke", "small", "full"]


@dataclass(frozen=True)
class Preset:
    """How much is done.

    Attributes:
        demonstrations: Number of demonstrations of each task that are used; ``None`` for all.
        epochs: Number of passes over them.
        evaluations: Epochs, counted from 0, after which the policy acts.
        seeds: Seeds of the training.
        rollouts: Number of rollouts at each evaluation.
        horizon: Number of steps of a rollout in MetaWorld; elsewhere twice as many, but never more than the task has.
        hold: Number of steps on end that the task must be fulfilled for a rollout to end before; ``None`` for never.
        components: Number of principal components of the tokens that the policy is given; ``None`` for all channels.
        most_rows: Number of rows and of columns that a finer grid of tokens is averaged to; ``None`` for none.
            A policy must see where things are: averaged to 7x7, EfficientNet's tokens opened 8 of 25 doors, and as
            they are, on 14x14, 21.
    """

    demonstrations: int | None
    epochs: int
    evaluations: tuple[int, ...]
    seeds: tuple[int, ...]
    rollouts: int
    horizon: int
    hold: int | None
    components: int | None
    most_rows: int | None

    def steps(self, task: Task) -> int:
        """Number of steps of a rollout."""
        return min(task.horizon, self.horizon if task.simulator == "metaworld" else 2 * self.horizon)

    def holds(self, task: Task) -> int | None:
        """Number of steps on end after which a rollout ends; ``None`` where more than the last step counts."""
        return self.hold if task.measure == "last" else None


PRESETS = {
    "smoke": Preset(2, 20, (9, 19), (100,), 2, 60, 10, 24, 16),
    "small": Preset(50, 25, (24,), (100,), 25, 150, 20, 24, 16),
    "full": Preset(None, 100, (*range(5, 100, 5), 99), (100, 200, 300), 25, 500, None, None, None),
}
