"""What the policies of a run reached: read from its files, estimated with intervals, and compared in pairs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cortexbench.encoders import CONTROLS
from benchmarks.cortexbench.run_files import SHIFT, RunFiles
from benchmarks.cortexbench.tasks import TASKS
from theia.errors import ConfigError
from theia.utils.estimates import Difference, Estimate, holm, over_episodes, paired_over_episodes
from theia.utils.files import read_json

MEAN = "mean"
RATE, MIXED = "success rate", "scores, and success x 100"


@dataclass(frozen=True)
class Results:
    """Rollouts of one encoder on one task.

    Attributes:
        seeds: Seeds of the training.
        epochs: Epochs after which the policy acted.
        value: Success, or the score divided by 100, shape ``(seeds, evaluations, rollouts)``.
        anywhere: Success at any step, same shape.
        losses: Mean loss of each epoch, by seed.
        states: Seeds of the rollouts.
        seconds: Time of training and of rollouts.
        shifted: Value for the finished policies where one thing looks different, by factor, shape
            ``(seeds, rollouts)``.
    """

    seeds: tuple[int, ...]
    epochs: tuple[int, ...]
    value: NDArray[np.float64]
    anywhere: NDArray[np.bool_]
    losses: list[list[float]]
    states: tuple[int, ...]
    seconds: tuple[float, float]
    shifted: dict[str, NDArray[np.float64]]

    def of(self, seeds: set[int]) -> "Results":
        """Those of some of the seeds alone."""
        places = [place for place, seed in enumerate(self.seeds) if seed in seeds]
        return replace(
            self, seeds=tuple(self.seeds[place] for place in places), value=self.value[places],
            anywhere=self.anywhere[places],
        )  # fmt: skip

    @property
    def last(self) -> NDArray[np.float64]:
        """Success, or the score divided by 100, after the last epoch, shape ``(seeds, rollouts)``."""
        return self.value[:, -1]

    @property
    def best(self) -> float:
        """Mean over seeds of the best evaluation."""
        return float(self.value.mean(2).max(1).mean())


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        encoder: Name of the encoder.
        task: Name of the task, or ``mean``.
        last: Success, or the score divided by 100, after the last epoch.
        best: The same after the best epoch.
        anywhere: Success at any step, after the last epoch; ``None`` if a task only has a score.
        difference: Paired difference of ``last`` to the reference; ``None`` for the reference itself, and where it has
            no policy for the task, or none with the same seed.
        unit: What is shown: a success rate between 0 and 1, or a score between 0 and 100.
    """

    encoder: str
    task: str
    last: Estimate
    best: float
    anywhere: float | None
    difference: Difference | None
    unit: str = RATE


def load(folder: Path) -> tuple[dict[str, dict[str, Results]], list[str]]:
    """Reads the rollouts of a run.

    Returns:
        Results by encoder and task, of those policies that are finished; and the names of those that are not.

    Raises:
        ConfigError: If a file is damaged, or encoders did not begin in the same states.
    """
    found: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
    paths: dict[tuple[str, str, int], Path] = {}
    unfinished = []
    policies = RunFiles(folder).policies
    for path in sorted(policies.glob("*/*/seed-*")):
        records = sorted((_read(file) for file in path.glob("rollouts-*.json")), key=lambda record: record["epoch"])
        if not records or not records[-1]["last"]:
            unfinished.append(str(path.relative_to(policies)))
            continue
        first = records[0]
        found.setdefault((first["encoder"], first["task"]), {})[int(first["seed"])] = records
        paths[first["encoder"], first["task"], int(first["seed"])] = path
    _check_beginnings(found)
    results: dict[str, dict[str, Results]] = {}
    controls = list(CONTROLS)
    order = sorted(found, key=lambda key: (key[0] not in controls, key[0], key[1]))
    for encoder, task in order:
        by_seed = dict(sorted(found[encoder, task].items()))
        every = list(by_seed.values())
        value = [[[_value(one) for one in record["rollouts"]] for record in records] for records in every]
        anywhere = [
            [[one["first_success"] is not None for one in record["rollouts"]] for record in records]
            for records in every
        ]
        last = [records[-1] for records in every]
        results.setdefault(encoder, {})[task] = Results(
            tuple(by_seed), tuple(record["epoch"] for record in every[0]), np.array(value, np.float64),
            np.array(anywhere), [record["losses"] for record in last],
            tuple(one["seed"] for one in last[0]["rollouts"]),
            (
                sum(record["training seconds"] for record in last),
                sum(record["rollout seconds"] for records in every for record in records),
            ),
            _shifted([paths[encoder, task, seed] for seed in by_seed]),
        )  # fmt: skip
    return results, unfinished


def compare(results: Mapping[str, Mapping[str, Results]], reference: str) -> list[Line]:
    """Computes intervals and comparisons, per task and in the mean over the tasks of the reference.

    Args:
        results: Results by encoder and task.
        reference: Encoder that the others are compared with.
    """
    compared = list(results[reference])
    tasks = list(dict.fromkeys([*compared, *(task for of in results.values() for task in of)]))
    lines = []
    for task in [*tasks, *([MEAN] if len(compared) > 1 else [])]:
        included = compared if task == MEAN else [task]
        found = {name: of for name, of in results.items() if all(one in of for one in included)}
        # The mean is over tasks with the same seeds; an encoder that has none in common has no mean.
        found = {name: of for name, of in found.items() if _common([of[one] for one in included])}
        units = list(dict.fromkeys(unit_of(one) for one in included))
        unit = units[0] if len(units) == 1 else MIXED
        lines += [_line(name, task, unit, [of[one] for one in included],
                        [results[reference][one] for one in included]
                        if name != reference and set(included) <= set(compared) else None)
                  for name, of in found.items()]  # fmt: skip
    # The mean answers another question than the tasks do, and is corrected by itself.
    for family in (tasks, [MEAN]):
        raw = {
            f"{place}": line.difference.p
            for place, line in enumerate(lines)
            if line.task in family and line.difference is not None and line.difference.p is not None
        }
        for place, p in holm(raw).items():
            line = lines[int(place)]
            assert line.difference is not None
            lines[int(place)] = replace(line, difference=replace(line.difference, p=p))
    return lines


def paired(ours: NDArray[np.float64], theirs: NDArray[np.float64], tasks: int = 1) -> Difference:
    """Difference in success, or in score, on the same initial states.

    Args:
        ours: Value of each rollout, between 0 and 1, shape ``(seeds, rollouts)``.
        theirs: The same of the reference.
        tasks: Number of tasks, whose rollouts lie one after another.

    Returns:
        The mean of ``ours - theirs``; its p value is McNemar's exact one for success with one seed, else that of
        flipping signs.
    """
    from scipy import stats

    found = paired_over_episodes(ours, theirs, np.ones(ours.shape[1]), _parts(ours, tasks))
    if len(ours) > 1 or not np.isin([ours, theirs], (0, 1)).all():
        return found
    better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return replace(found, p=p)


def unit_of(task: str) -> str:
    """What is shown of a task: a success rate, or a score."""
    return TASKS[task].unit if task in TASKS else RATE


def _line(name: str, task: str, unit: str, ours: Sequence[Results], theirs: Sequence[Results] | None) -> Line:
    seeds = _common(ours)
    found = [one.of(seeds) for one in ours]
    last = _joined(found, seeds)
    difference = None
    if theirs is not None:
        common = seeds & _common(theirs)
        if common:
            difference = paired(_joined(ours, common), _joined(theirs, common), len(ours))
    best = float(np.mean([one.best for one in found]))
    anywhere = float(np.mean([one.anywhere[:, -1].mean() for one in found])) if unit == RATE else None
    return Line(
        name,
        task,
        over_episodes(last, np.ones(last.shape[1]), _parts(last, len(ours))),
        best,
        anywhere,
        difference,
        unit,
    )


def _parts(values: NDArray[np.float64], tasks: int) -> list[int]:
    """Task of each rollout, where those of several tasks lie one after another."""
    return np.repeat(np.arange(tasks), values.shape[1] // tasks).tolist()


def _common(parts: Sequence[Results]) -> set[int]:
    """Seeds that all of them have."""
    return set.intersection(*(set(one.seeds) for one in parts))


def _shifted(paths: Sequence[Path]) -> dict[str, NDArray[np.float64]]:
    """Rollouts where one thing looks different, of those factors that all seeds of a policy have."""
    by_factor: dict[str, list[list[float]]] = {}
    for path in paths:
        for file in sorted(path.glob(f"{SHIFT}*.json")):
            record = _read(file)
            by_factor.setdefault(record["shift"], []).append([_value(one) for one in record["rollouts"]])
    return {factor: np.array(found, float) for factor, found in by_factor.items() if len(found) == len(paths)}


def _value(rollout: Mapping[str, Any]) -> float:
    # Runs of earlier versions were of tasks with success alone.
    return float(rollout["value"] if "value" in rollout else rollout["success"])


def _joined(parts: Iterable[Results], seeds: set[int]) -> NDArray[np.float64]:
    """Values of some seeds on one task after another, shape ``(seeds, rollouts of all tasks)``."""
    return np.concatenate([one.of(seeds).last for one in parts], 1)


def _check_beginnings(found: Mapping[tuple[str, str], Mapping[int, Sequence[Mapping[str, Any]]]]) -> None:
    """Paired comparisons mean nothing unless all policies began in the same states."""
    first: dict[str, tuple[str, list[Any]]] = {}
    for (encoder, task), by_seed in found.items():
        for records in by_seed.values():
            for record in records:
                begun = [[one["seed"], one["beginning"]] for one in record["rollouts"]]
                other, expected = first.setdefault(task, (encoder, begun))
                if begun != expected:
                    raise ConfigError(
                        f"The rollouts of {encoder} on {task} did not begin in the states in which those of {other} "
                        "began. They cannot be compared: run both anew in one folder."
                    )


def _read(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not record:
        raise ConfigError(f"{path} is damaged. Delete it with its folder, and run the same command again.")
    return record
