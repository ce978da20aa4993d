"""The findings as a page, a picture and JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.evidence.faults import Cure
from benchmarks.evidence.findings import (
    COLUMNS,
    COSINE,
    ENTROPY,
    MOTION,
    PLAN,
    QUESTIONS,
    READOUT,
    STUDENTS,
    Cell,
    Findings,
)
from benchmarks.evidence.stages import BEYOND, INGREDIENTS, TEACHERS
from theia.utils.estimates import Estimate
from theia.utils.files import jsonable, replacing, write_whole

_TITLES = {
    TEACHERS: "Sets of teachers",
    BEYOND: "Sets of teachers, with the ingredients of configs/beyond_*",
    INGREDIENTS: "Ingredients, each against the paper's recipe at equal steps",
    STUDENTS: "Students of a large student, against students of all teachers directly",
}
_DRAWN = (PLAN, MOTION, READOUT, COSINE)
_COLOURS = {PLAN: "#e8963c", MOTION: "#7ba3cc"}
_SMALL = 7.5  # points
_HEAD = 2  # parts of a page that says nothing yet
_ACROSS = 4  # panels beside each other
_ABSENT = "–"


def write(out: Path, findings: Findings, record: Mapping[str, Any]) -> list[Path]:
    """Writes ``evidence.md``, ``evidence.png`` and ``evidence.json``.

    Args:
        out: Folder of the evidence.
        findings: What was found.
        record: Settings, versions and machine.

    Returns:
        The files, the page first.
    """
    content = json.dumps(jsonable({**record, **findings.as_json()}), indent=1) + "\n"
    write_whole(out / "evidence.json", content)
    draw(out / "evidence.png", findings)
    write_whole(out / "evidence.md", page(findings) + "\n")
    return [path for name in ("evidence.md", "evidence.png", "evidence.json") if (path := out / name).exists()]


def page(findings: Findings) -> str:
    """The findings in Markdown."""
    parts = ["# Evidence", "The figure after ± is half of the 95 % interval over seeds (Student's t). Differences are "
             "paired by seed; p is of a paired t test, with Holm's correction for the rows of the table."]  # fmt: skip
    for sweep, rows in findings.tables.items():
        if rows:
            parts += [f"## {_TITLES[sweep]}", _means(rows), _differences(rows)]
    for size, rows in findings.sizes.items():
        parts += [f"## Pictures resized to {size}x{size} pixels", _means(rows), _differences(rows)]
    if findings.faults:
        parts += ["## Planted faults", _faults(findings.faults)]
    if findings.bounds:
        names = list(findings.bounds)
        table = [[name, *(f"{findings.bounds[name][column]:.3f}" for column in QUESTIONS)] for name in names]
        parts += ["## What was not trained here", _table(table, ["encoder", *(COLUMNS[c] for c in QUESTIONS)])]
    if findings.shares:
        table = [[row, *(_text(of.get(column)) for column in QUESTIONS)] for row, of in findings.shares.items()]
        parts += ["## Part of the way from the untrained student to the best of its teachers",
                  _table(table, ["students of", *QUESTIONS.values()])]  # fmt: skip
    for found, unit in ((findings.steps, "steps"), (findings.compute, "CPU-seconds")):
        seeds = sorted({seed for of in found.values() for seed in of})
        table = [[row, *(_reached(of[seed]) if seed in of else _ABSENT for seed in seeds)] for row, of in found.items()]
        if table:
            parts += [f"## {unit[0].upper()}{unit[1:]} until the paper's final held-out cosine, as a part of its own",
                      _table(table, ["ingredient", *(f"seed {seed}" for seed in seeds)])]  # fmt: skip
    for column, entropy in findings.entropy.items():
        interval = "" if entropy.low is None else f" [{entropy.low:.2f}, {entropy.high:.2f}]"
        parts.append(
            f"Norm entropy and {COLUMNS[column]}, over {entropy.n} rows: Pearson's r = {entropy.r:.2f}{interval}. Less "
            "error is better, so the paper's claim is a negative one."
        )
    if len(parts) == _HEAD:
        parts.append("No sweep and no probe is finished yet.")
    return "\n\n".join(parts)


def draw(path: Path, findings: Findings) -> None:
    """Draws differences to the paper's recipe, errors by set of teachers and size, shares, faults and norm entropy."""
    ingredients = findings.tables.get(INGREDIENTS, {})
    teachers = findings.tables.get(TEACHERS, {}) | {
        f"{row}, beyond": cells for row, cells in findings.tables.get(BEYOND, {}).items()
    }
    panels = [column for column in _DRAWN if any(column in cells for cells in ingredients.values())]
    kinds = [*panels, *(["teachers"] if teachers else []), *(["shares"] if findings.shares else [])]
    sized = {f"{row}, {size} pixels": cells for size, of in findings.sizes.items() for row, cells in of.items()}
    kinds += [
        *(["sizes"] if sized else []),
        *(["faults"] if findings.faults else []),
        *(["entropy"] if findings.entropy else []),
    ]
    if not kinds:
        return
    lines = 2 * len(findings.faults)  # of a fault are two
    rows = max(len(ingredients), len(teachers), len(findings.shares), len(sized), lines, 4)
    across = min(len(kinds), _ACROSS)
    down = math.ceil(len(kinds) / across)
    figure = Figure(figsize=(3.1 * across + 1.5, down * (1.4 + 0.27 * rows)), dpi=130, layout="constrained")
    places = figure.subplots(down, across, squeeze=False).flatten()
    for axes in places[len(kinds) :]:
        axes.set_axis_off()
    for axes, kind in zip(places, kinds, strict=False):
        if kind in _DRAWN:
            named = {row: cells[kind].difference if kind in cells else None for row, cells in ingredients.items()}
            _points(axes, {COLUMNS[kind]: {row: one for row, one in named.items() if one is not None}}, list(named))
            axes.tick_params(labelleft=kind == panels[0])  # all have the same rows
            axes.axvline(0, color="black", linewidth=0.8)
            direction = "right is better" if kind in (READOUT, COSINE) else "left is better"
            axes.set_xlabel(f"{COLUMNS[kind]}: difference to the\npaper's recipe ({direction})", fontsize=_SMALL)
        elif kind == "teachers":
            _points(axes, _errors(teachers))
            for column in QUESTIONS:
                if "untrained" in findings.bounds:
                    axes.axvline(findings.bounds["untrained"][column], color=_COLOURS[column], linestyle=":")
            axes.set_xlabel("error by set of teachers\n(dotted: the untrained student)", fontsize=_SMALL)
            _legend(axes)
        elif kind == "sizes":
            _points(axes, _errors(sized))
            axes.set_xlabel("error with resized pictures", fontsize=_SMALL)
            _legend(axes)
        elif kind == "shares":
            _points(axes, {
                QUESTIONS[column]: {row: of[column] for row, of in findings.shares.items() if column in of}
                for column in QUESTIONS
            })  # fmt: skip
            axes.axvline(1, color="black", linestyle="--", linewidth=0.8)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel("part of the way from the untrained\nstudent to its best teacher", fontsize=_SMALL)
            _legend(axes)
        elif kind == "faults":
            of_fault = {f"{cure.fault}:\n{cure.ingredient}, {cure.figure}": cure for cure in findings.faults}
            _points(axes, {
                "with the fault": {name: cure.gain for name, cure in of_fault.items()},
                "without": {name: cure.gain_without for name, cure in of_fault.items()},
            })  # fmt: skip
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel("planted faults: gain over the\npaper's recipe (right is better)", fontsize=_SMALL)
            _legend(axes)
        else:
            for column in QUESTIONS:
                cells = [of for table in findings.tables.values() for of in table.values()]
                both = [(of[ENTROPY].mean.mean, of[column].mean.mean) for of in cells if ENTROPY in of and column in of]
                axes.scatter(*zip(*both, strict=True), 14, _COLOURS[column], label=COLUMNS[column])
            axes.set_xlabel("norm entropy (nats)", fontsize=_SMALL)
            _legend(axes)
        axes.tick_params(labelsize=_SMALL)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png")


def _errors(rows: Mapping[str, Mapping[str, Cell]]) -> dict[str, dict[str, Estimate]]:
    return {
        COLUMNS[column]: {row: cells[column].mean for row, cells in rows.items() if column in cells}
        for column in QUESTIONS
    }


def _legend(axes: Any) -> None:
    """Above the panel, where it hides no point."""
    axes.legend(fontsize=_SMALL, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _points(axes: Any, series: Mapping[str, Mapping[str, Estimate]], rows: Sequence[str] = ()) -> None:
    """Means with intervals, a line for each row; several series are a little apart."""
    names = list(dict.fromkeys([*rows, *(name for values in series.values() for name in values)]))
    colours = list(_COLOURS.values()) if len(series) > 1 else ["#7ba3cc"]
    for number, ((label, values), colour) in enumerate(zip(series.items(), colours, strict=False)):
        places = [names.index(name) + 0.24 * (number - (len(series) - 1) / 2) for name in values]
        axes.errorbar(
            [found.mean for found in values.values()], places,
            xerr=[found.half_width or 0.0 for found in values.values()], fmt="o", markersize=5, color=colour,
            markeredgecolor="black", markeredgewidth=0.5, ecolor="black", capsize=2, linewidth=0.8, label=label,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=_SMALL)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _faults(found: Sequence[Cure]) -> str:
    lines = [
        [
            cure.fault, cure.ingredient, cure.figure,
            *(f"{of['without'].mean:.3f} / {of['with'].mean:.3f}" for of in cure.values.values()),
            _text(cure.gain_without, "+"), _text(cure.gain, "+"), cure.verdict,
        ]
        for cure in found
    ]  # fmt: skip
    headers = ["fault", "ingredient", "figure", "paper: without / with the fault", "ingredient: without / with",
               "gain without", "gain with", "verdict"]  # fmt: skip
    return _table(lines, headers)


def _means(rows: Mapping[str, Mapping[str, Cell]]) -> str:
    columns = [column for column in COLUMNS if any(column in cells for cells in rows.values())]
    lines = []
    for row, cells in rows.items():
        seeds = max((len(cell.values) for cell in cells.values()), default=0)
        found = (cells[column].mean if column in cells else None for column in columns)
        lines.append([row, str(seeds), *map(_text, found)])
    return _table(lines, ["row", "seeds", *(COLUMNS[column] for column in columns)])


def _differences(rows: Mapping[str, Mapping[str, Cell]]) -> str:
    columns = [column for column in _DRAWN if any(column in cells for cells in rows.values())]
    lines = []
    for row, cells in rows.items():
        if any(cell.difference is not None for cell in cells.values()):
            lines.append([row])
            for column in columns:
                cell = cells.get(column)
                lines[-1] += [
                    _text(cell.difference if cell else None, "+"),
                    _ABSENT if cell is None or cell.p is None else f"{cell.p:.3f}",
                ]
    if not lines:
        return "No row shares a seed with the reference yet."
    headers = [text for column in columns for text in (f"{COLUMNS[column]}: difference", "p")]
    return _table(lines, ["row", *headers])


def _text(found: Estimate | None, sign: str = "") -> str:
    if found is None:
        return _ABSENT
    return f"{found.mean:{sign}.3f}" + ("" if found.half_width is None else f" ± {found.half_width:.3f}")


def _reached(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.2f}"


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return str(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
