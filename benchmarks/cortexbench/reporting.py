"""``report``: success or score per task and in the mean, with intervals, paired comparisons and learning curves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.cortexbench.encoders import CONTROLS
from benchmarks.cortexbench.outcomes import MEAN, RATE, Line, Results, compare, load, unit_of
from benchmarks.cortexbench.run_files import RECORD
from benchmarks.cortexbench.sweep_scores import write_scores
from benchmarks.cortexbench.tasks import TASKS
from theia.errors import ConfigError
from theia.utils.estimates import Estimate, over_episodes
from theia.utils.files import jsonable, read_json, replacing, write_whole

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
    "Differences are paired by initial state. Intervals are by bootstrap over each task's rollouts and over seeds; p "
    "is by McNemar's exact test for success with one seed, else by flipping the signs of the differences of whole "
    "rollouts, corrected by Holm."
)


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


def _shown(unit: str) -> tuple[int, str]:
    """What values are multiplied by, and with how many digits they are shown."""
    return (1, ".2f") if unit == RATE else (100, ".1f")


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
        scale, form = _shown(unit_of(task))
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
                f"{task}, {unit_of(task)} with",
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
    spread = about.get("demonstrations", {}).get("spread", 1.0)
    if spread != 1 and factors:
        varied += f" (in {spread:g} of the whole range)"
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


def _reference(wanted: str | None, names: Sequence[str]) -> str:
    if wanted is None:
        return next((name for name in names if name not in CONTROLS), names[0])
    if wanted not in names:
        raise ConfigError(f"--reference is {wanted!r}, which is none of the encoders: {', '.join(names)}.")
    return wanted


def _interval(estimate: Estimate, form: str, scale: float) -> str:
    low, high = (f"{scale * end:{form}}" for end in (estimate.low, estimate.high) if end is not None)
    return f"{scale * estimate.mean:{form}} [{low}, {high}]"
