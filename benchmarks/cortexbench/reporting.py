"""``report``: success or score per task and in the mean, with intervals, paired comparisons and learning curves."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.cortexbench.encoders import CONTROLS
from benchmarks.cortexbench.sweep_scores import write_scores
from benchmarks.cortexbench.tasks import TASKS
from theia.errors import ConfigError
from theia.utils.estimates import Difference, Estimate, holm, over_episodes, paired_over_episodes
from theia.utils.files import jsonable, read_json, replacing, write_whole

RECORD = "run.json"
SHIFT = "shift-"  # and the factor: rollouts of a finished policy where one thing looks different
MEAN = "mean"
RATE, MIXED = "success rate", "scores, and success x 100"

NOT_COMPARABLE = (
    "These figures must not be compared with published ones, the paper's table of CortexBench included: "
    "{demonstrations}the physics are those of another release of MuJoCo and of the simulators"
)
_OTHER_EXPERTS = "the demonstrations are by other experts, "
_PRESETS_DIFFER = ", and the preset {name} trains and tests less than the paper does"
LOSSY = (
    "The demonstrations are kept as lossy video, and the pictures of rollouts are not lossy: encoders that see fine "
    "texture, such as HOG, are given other tokens than they were fitted on. Record with --pictures image instead"
)
_BEST = (
    "Success in MetaWorld is that at the last step of a rollout. 'best' is the best evaluation of each seed, which is "
    "chosen on the rollouts themselves and so flatters everybody; 'at any step' counts rollouts that fulfilled the "
    "task at some step."
)
_ADROIT = (
    "A rollout in Adroit succeeds if the task is fulfilled in more than {steps}; the files rollouts-*.json hold the "
    "number of those steps."
)
_SCORES = (
    "A score is 100 times the mean reward of a step, which for 1000 steps is the return divided by 10. The mean over "
    "tasks is one of scores and of 100 times success rates, as in the paper."
)
_TWICE = " (twice as many outside MetaWorld, but never more than a task has)"
_COMPARED = (
    "Differences are paired by initial state, their intervals by bootstrap over rollouts and seeds; p is by McNemar's "
    "exact test for success with one seed, else by flipping the signs of the differences of whole rollouts, corrected "
    "by Holm."
)


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
        difference: Paired difference of ``last`` to the reference; ``None`` for the reference itself.
        unit: What is shown: a success rate between 0 and 1, or a score between 0 and 100.
    """

    encoder: str
    task: str
    last: Estimate
    best: float
    anywhere: float | None
    difference: Difference | None
    unit: str = RATE


def report(folder: Path, reference: str | None = None) -> str:
    """Carries out the command; see :func:`benchmarks.cortexbench.commands.report` for the arguments."""
    about = read_json(folder / RECORD)
    results, unfinished = load(folder)
    if not results:
        raise ConfigError(f"{folder} holds no finished policy. Run the command run with --out {folder}, to its end.")
    chosen = _reference(reference, list(results))
    lines = compare(results, chosen)
    notes = _notes(about, lines, unfinished)
    text = "\n\n".join([table(lines, chosen), *shift_tables(results), *notes])
    record = {
        **about, "reference": chosen, "lines": [asdict(line) for line in lines], "notes": notes,
        "shifts": {
            name: {
                task: {factor: over_episodes(found, np.ones(found.shape[1])) for factor, found in one.shifted.items()}
                for task, one in of.items()
            }
            for name, of in results.items()
        },
        "seconds": {name: {task: one.seconds for task, one in of.items()} for name, of in results.items()},
        "rollout seeds": {task: one.states for of in results.values() for task, one in of.items()},
    }  # fmt: skip
    write_whole(folder / "report.json", json.dumps(jsonable(record), indent=1))
    write_whole(folder / "report.txt", text + "\n")
    draw(folder / "curves.png", results)
    values = {name: {task: float(one.last.mean()) for task, one in of.items()} for name, of in results.items()}
    files = [folder / "report.json", folder / "curves.png", *write_scores(folder, values)]
    return "\n".join([f"{text}\n", *map(str, files)])


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
    for path in sorted((folder / "policies").glob("*/*/seed-*")):
        records = [_read(file) for file in sorted(path.glob("rollouts-*.json"))]
        if not records or not records[-1]["last"]:
            unfinished.append(str(path.relative_to(folder / "policies")))
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
    tasks = list(results[reference])
    lines = []
    for task in [*tasks, *([MEAN] if len(tasks) > 1 else [])]:
        included = tasks if task == MEAN else [task]
        found = {name: of for name, of in results.items() if all(one in of for one in included)}
        units = list(dict.fromkeys(_unit(one) for one in included))
        unit = units[0] if len(units) == 1 else MIXED
        lines += [_line(name, task, unit, [of[one] for one in included],
                        [results[reference][one] for one in included] if name != reference else None)
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


def _unit(task: str) -> str:
    return TASKS[task].unit if task in TASKS else RATE


def _shown(unit: str) -> tuple[int, str]:
    """What values are multiplied by, and with how many digits they are shown."""
    return (1, ".2f") if unit == RATE else (100, ".1f")


def _line(name: str, task: str, unit: str, ours: Sequence[Results], theirs: Sequence[Results] | None) -> Line:
    seeds = set.intersection(*(set(one.seeds) for one in ours))
    last = _joined(ours, seeds)
    ones = np.ones(last.shape[1])
    difference = None
    if theirs is not None:
        common = seeds.intersection(*(set(one.seeds) for one in theirs))
        if common:
            difference = paired(_joined(ours, common), _joined(theirs, common))
    best = float(np.mean([one.best for one in ours]))
    anywhere = float(np.mean([one.anywhere[:, -1].mean() for one in ours])) if unit == RATE else None
    return Line(name, task, over_episodes(last, ones), best, anywhere, difference, unit)


def paired(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Difference:
    """Difference in success, or in score, on the same initial states.

    Args:
        ours: Value of each rollout, between 0 and 1, shape ``(seeds, rollouts)``.
        theirs: The same of the reference.

    Returns:
        The mean of ``ours - theirs``; its p value is McNemar's exact one for success with one seed, else that of
        flipping signs.
    """
    from scipy import stats

    found = paired_over_episodes(ours, theirs, np.ones(ours.shape[1]))
    if len(ours) > 1 or not np.isin([ours, theirs], (0, 1)).all():
        return found
    better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return replace(found, p=p)


def table(lines: Sequence[Line], reference: str) -> str:
    """Tables, one for each task and one for the mean."""
    parts = []
    for task in dict.fromkeys(line.task for line in lines):
        rows, unit = [], RATE
        for line in (line for line in lines if line.task == task):
            other, unit = line.difference, line.unit
            scale, form = _shown(unit)
            rows.append(
                [
                    f"{line.encoder} (control)" if line.encoder in CONTROLS else line.encoder,
                    _interval(line.last, form, scale), f"{scale * line.best:{form}}",
                    *([] if line.anywhere is None else [f"{line.anywhere:.2f}"]),
                    "" if other is None else _interval(other, f"+{form}", scale),
                    "" if other is None or other.p is None else f"{other.p:.3f}",
                ]
            )  # fmt: skip
        title = "Mean over tasks" if task == MEAN else task
        headers = [title, unit, "best", *(["at any step"] if unit == RATE else []), f"to {reference}", "p"]
        parts.append(str(tabulate(rows, headers=headers, disable_numparse=True)))
    return "\n\n".join(parts)


def shift_tables(results: Mapping[str, Mapping[str, Results]]) -> list[str]:
    """Success or score where one thing looks different than in training; a table for each task with such rollouts."""
    parts = []
    for task in dict.fromkeys(task for of in results.values() for task in of):
        scale, form = _shown(_unit(task))
        found = {name: of[task] for name, of in results.items() if task in of and of[task].shifted}
        factors = sorted({factor for one in found.values() for factor in one.shifted})
        rows = [
            [
                f"{name} (control)" if name in CONTROLS else name,
                _interval(over_episodes(one.last, np.ones(one.last.shape[1])), form, scale),
                *(
                    _interval(over_episodes(one.shifted[factor], np.ones(one.last.shape[1])), form, scale)
                    if factor in one.shifted
                    else ""
                    for factor in factors
                ),
            ]
            for name, one in found.items()
        ]
        if rows:
            headers = [
                f"{task}, {_unit(task)} with",
                "what was trained on",
                *(f"another {factor}" for factor in factors),
            ]
            parts.append(str(tabulate(rows, headers=headers, disable_numparse=True)))
    return parts


def draw(path: Path, results: Mapping[str, Mapping[str, Results]]) -> None:
    """Draws success or score, and loss, over the epochs, a column for each task.

    Args:
        path: PNG to write.
        results: Results by encoder and task.
    """
    tasks = list(dict.fromkeys(task for of in results.values() for task in of))
    figure = Figure((3.4 * len(tasks) + 2.2, 5.2), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex="col", sharey="row")
    for column, task in enumerate(tasks):
        above, below = axes[0, column], axes[1, column]
        for number, (name, of) in enumerate(results.items()):
            if task not in of:
                continue
            one, style = of[task], {"color": f"C{number % 10}", "linestyle": "--" if name in CONTROLS else "-"}
            above.plot(one.epochs, one.value.mean((0, 2)), marker="o", markersize=3, label=name, **style)
            below.plot(np.mean(one.losses, 0), **style)
        above.set_title(task, fontsize=10)
        above.set_ylim(-0.05, 1.05)
        below.set_yscale("log")
        below.set_xlabel("epoch")
        for axis in (above, below):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("success, or score / 100")
    axes[1, 0].set_ylabel("loss on demonstrations")
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]


def _notes(about: Mapping[str, Any], lines: Sequence[Line], unfinished: Sequence[str]) -> list[str]:
    settings = about.get("settings", {})
    name = settings.get("preset", "")
    factors = settings.get("vary") or []
    varied = f"{' and '.join(factors)} drawn anew for every rollout" if factors else "one fixed camera and light"
    demonstrated = about.get("demonstrations", {}).get("vary") or []
    experts = "" if about.get("demonstrations", {}).get("imported") else _OTHER_EXPERTS
    there = [TASKS[task] for task in dict.fromkeys(line.task for line in lines) if task in TASKS]
    adroit = {task.name: f"{task.fulfilled_steps} steps ({task.name})" for task in there if task.measure == "steps"}
    twice = _TWICE if any(task.simulator != "metaworld" for task in there) else ""
    less = "" if name == "full" else _PRESETS_DIFFER.format(name=name)
    notes = [
        f"Preset {name}: {settings.get('epochs')} epochs, {settings.get('rollouts')} rollouts of at most "
        f"{settings.get('horizon')} steps{twice}, {varied}"
        + ("." if list(factors) == list(demonstrated) else f"; demonstrations: {', '.join(demonstrated) or 'fixed'}."),
        *_trained_otherwise(settings),
        f"{NOT_COMPARABLE.format(demonstrations=experts)}{less}.",
        *([f"{LOSSY}."] if about.get("demonstrations", {}).get("pictures") == "video" else []),
        "Controls: " + "; ".join(f"{control} is given {what}" for control, what in CONTROLS.items()) + ".",
        _BEST,
        *([_ADROIT.format(steps=" and ".join(adroit.values()))] if adroit else []),
        *([_SCORES] if any(task.measure == "return" for task in there) else []),
        _COMPARED,
    ]
    if any(line.last.low == line.last.high for line in lines):
        notes.append(
            "An interval without width is of rollouts that all ended alike; of n such rollouts, up to 3/n of all may "
            "still end otherwise."
        )
    if unfinished:
        notes.append(f"Not finished, and left out: {', '.join(unfinished)}.")
    return notes


def _shifted(paths: Sequence[Path]) -> dict[str, NDArray[np.float64]]:
    """Rollouts where one thing looks different, of those factors that all seeds of a policy have."""
    by_factor: dict[str, list[list[float]]] = {}
    for path in paths:
        for file in sorted(path.glob(f"{SHIFT}*.json")):
            record = _read(file)
            by_factor.setdefault(record["shift"], []).append([_value(one) for one in record["rollouts"]])
    return {factor: np.array(found, float) for factor, found in by_factor.items() if len(found) == len(paths)}


def _trained_otherwise(settings: Mapping[str, Any]) -> list[str]:
    """What differs from the paper's head for CortexBench on a frozen encoder."""
    notes = []
    if "head" in settings:
        chunk = f", {settings['chunk']} actions at once" if settings.get("chunk") else ""
        notes.append(
            f"Head {settings['head']}{chunk}, {settings.get('execute') or 'all'} carried out between decisions."
        )
    if settings.get("encoder_learning_rate") is not None:
        notes.append(
            f"Encoders are trained with each policy, with a learning rate of {settings['encoder_learning_rate']:g}."
        )
    return notes


def _value(rollout: Mapping[str, Any]) -> float:
    # Runs of earlier versions were of tasks with success alone.
    return float(rollout["value"] if "value" in rollout else rollout["success"])


def _joined(parts: Iterable[Results], seeds: set[int]) -> NDArray[np.float64]:
    """Values of some seeds on one task after another, shape ``(seeds, rollouts of all tasks)``."""
    return np.concatenate([one.last[[one.seeds.index(seed) for seed in sorted(seeds)]] for one in parts], 1)


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


def _reference(wanted: str | None, names: Sequence[str]) -> str:
    if wanted is None:
        return next((name for name in names if name not in CONTROLS), names[0])
    if wanted not in names:
        raise ConfigError(f"--reference is {wanted!r}, which is none of the encoders: {', '.join(names)}.")
    return wanted


def _interval(estimate: Estimate, form: str, scale: float) -> str:
    low, high = (f"{scale * end:{form}}" for end in (estimate.low, estimate.high) if end is not None)
    return f"{scale * estimate.mean:{form}} [{low}, {high}]"
