"""Errors of all encoders as a table with intervals and paired differences, and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tabulate import tabulate

from theia.utils.estimates import Difference, Estimate, holm, over_episodes, paired_over_episodes
from theia.utils.files import replacing
from theia.utils.pictures import wrapped

# Errors by encoder, question and data set: shape (seeds, episodes).
Errors = Mapping[str, Mapping[str, Mapping[str, Sequence[Sequence[float]]]]]
_MOST_TASKS = 10  # columns of the table by task


@dataclass(frozen=True)
class Summary:
    """Figures of all encoders.

    Attributes:
        means: By encoder and column (question, data set), the error with its interval.
        differences: By encoder and column, the paired difference to the reference; ``p`` is adjusted by Holm over all.
        by_task: By encoder, column and task, the mean error; empty if there is one task.
        columns: Question and data set of each column.
        reference: Name of the encoder that the others are compared with.
    """

    means: dict[str, dict[tuple[str, str], Estimate]]
    differences: dict[str, dict[tuple[str, str], Difference]]
    by_task: dict[str, dict[tuple[str, str], dict[str, float]]]
    columns: list[tuple[str, str]]
    reference: str

    def table(self) -> str:
        """A row per encoder; below it, by task if there are several."""
        headers = ["encoder"]
        for column in self.columns:
            title = f"{self._title(column)} error"
            headers += [title, f"{title}: to {self.reference}", "p"]
        rows = []
        for name, means in self.means.items():
            row = [name]
            for column in self.columns:
                mean, other = means[column], self.differences[name].get(column)
                row += [f"{mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]"]
                row += ["", ""] if other is None else [_signed(other), f"{other.p:.3f}"]
            rows.append(row)
        text = str(tabulate(rows, headers=headers, disable_numparse=True))
        tasks = list(
            dict.fromkeys(task for columns in self.by_task.values() for parts in columns.values() for task in parts)
        )
        if 1 < len(tasks) <= _MOST_TASKS:
            for column in self.columns:
                of_tasks = [
                    [name, *(f"{columns[column][task]:.3f}" if task in columns[column] else "" for task in tasks)]
                    for name, columns in self.by_task.items()
                ]
                text += f"\n\n{tabulate(of_tasks, headers=[self._title(column), *tasks], disable_numparse=True)}"
        return text

    def as_json(self) -> dict[str, Any]:
        """The figures for the JSON, by encoder and column."""
        return {
            name: {
                self._title(column): {
                    **asdict(mean),
                    "difference": asdict(other) if (other := self.differences[name].get(column)) else None,
                    "tasks": self.by_task[name][column],
                }
                for column, mean in means.items()
            }
            for name, means in self.means.items()
        }

    def _title(self, column: tuple[str, str]) -> str:
        question, data = column
        return question if len({name for _, name in self.columns}) == 1 else f"{question}, {data}"


def summarise(
    errors: Errors, weights: Mapping[str, NDArray[np.float64]], tasks: Mapping[str, Sequence[str]], reference: str
) -> Summary:
    """Computes intervals and comparisons.

    Args:
        errors: Mean error of each tested episode.
        weights: By data set, number of pairs in each episode.
        tasks: By data set, task of each episode.
        reference: Encoder that the others are compared with.
    """
    columns = [(question, data) for question, of in errors[reference].items() for data in of]
    means: dict[str, dict[tuple[str, str], Estimate]] = {}
    raw: dict[tuple[str, tuple[str, str]], Difference] = {}
    by_task: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for name, of in errors.items():
        means[name], by_task[name] = {}, {}
        for column in columns:
            question, data = column
            here, there = np.asarray(of[question][data]), np.asarray(errors[reference][question][data])
            means[name][column] = over_episodes(here, weights[data], tasks[data])
            if name != reference:
                raw[name, column] = paired_over_episodes(here, there, weights[data], tasks[data])
            labels = np.asarray(tasks[data])
            by_task[name][column] = {
                str(task): float(
                    (here.mean(0) * weights[data])[labels == task].sum() / weights[data][labels == task].sum()
                )
                for task in dict.fromkeys(tasks[data])
            }
    corrected = holm({f"{name} {column}": found.p or 0.0 for (name, column), found in raw.items()})
    differences: dict[str, dict[tuple[str, str], Difference]] = {name: {} for name in errors}
    for (name, column), found in raw.items():
        differences[name][column] = replace(found, p=corrected[f"{name} {column}"])
    return Summary(means, differences, by_task, columns, reference)


def draw(path: Path, summary: Summary, label: str) -> None:
    """Draws the error of every encoder with its interval, a panel per column.

    Args:
        path: PNG to write.
        summary: Figures of all encoders.
        label: What the axis says.
    """
    names = list(summary.means)
    figure = Figure((3.2 * len(summary.columns) + 1.5, 0.4 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(summary.columns), squeeze=False, sharey=True)[0]
    places = np.arange(len(names))[::-1]
    for axis, column in zip(axes, summary.columns, strict=True):
        found = [summary.means[name][column] for name in names]
        values = np.array([part.mean for part in found])
        ends = np.array([[part.low, part.high] for part in found], np.float64).T
        spread = np.abs(ends - values)
        colours = ["tab:orange" if name == summary.reference else "tab:blue" for name in names]
        axis.barh(places, values, color=colours, alpha=0.75)
        axis.errorbar(values, places, xerr=spread, fmt="none", ecolor="black", capsize=3)
        axis.set_title(", ".join(column) if len({data for _, data in summary.columns}) > 1 else column[0], fontsize=10)
        axis.set_yticks(places, [wrapped(name) for name in names], fontsize=8)
        axis.set_xlim(left=0)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel(f"error (less is better): {label}", fontsize=9)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]


def _signed(difference: Difference) -> str:
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
