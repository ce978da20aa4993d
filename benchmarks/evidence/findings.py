"""What the finished sweeps and probes say: tables with intervals, shares of the way, time to quality."""

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.faults import Cure, cures
from benchmarks.evidence.stages import BEYOND, BOUNDS, FAULTS, INGREDIENTS, PROXY, SETTINGS, SIZES, TEACHERS, VIEWS
from theia.probing.datasets import IMAGE_SIZE
from theia.utils.estimates import Correlation, Estimate, correlation, estimate, holm, paired_difference
from theia.utils.files import read_json

PLAN, MOTION, READOUT, ENTROPY = (
    "dynamics/plan_error", "dynamics/motion_error", "readout/explained_variance", "test/norm_entropy",
)  # fmt: skip
DEPTH, CLASSES = "dense/depth_rmse", "dense/mean_iou"
UNSEEN, WORST, COSINE, COST = "unseen", "worst", "cosine", "cost"
SUCCESS = "external/cortexbench"
_UNTRAINED = "untrained"
STUDENTS, LARGE = f"{PROXY}/students", f"{PROXY}/large"
COLUMNS = {
    SUCCESS: "success", PLAN: "plan error", MOTION: "motion error", READOUT: "read-out", WORST: "worst teacher",
    UNSEEN: "unseen teachers",
    COSINE: "held-out cosine", DEPTH: "depth (m)", CLASSES: "classes (IoU)", ENTROPY: "norm entropy", COST: "CPU-s",
}  # fmt: skip
"""Columns of the tables. ``worst`` and ``unseen`` are read-outs: of the teacher that is read worst among those that a
student was distilled from, and the mean of those that it was not. ``cost`` is in CPU-seconds of all training steps;
``success`` in the simulator's tasks."""

QUESTIONS = {PLAN: "plan", MOTION: "motion"}
_OF_TEACHER = f"{READOUT}/"  # and a name
_REFERENCES = {TEACHERS: "all", INGREDIENTS: "paper", BEYOND: "all", STUDENTS: "direct"}

Values = dict[str, dict[str, dict[int | None, float]]]  # by row, column and seed


@dataclass(frozen=True)
class Cell:
    """A row's score.

    Attributes:
        values: By seed.
        mean: Their mean, with Student's interval.
        difference: Mean of the differences to the reference, seed by seed, with its interval; ``None`` for itself.
        p: P value of the paired t test, after Holm's correction for the other rows of the column.
    """

    values: Mapping[int | None, float]
    mean: Estimate
    difference: Estimate | None
    p: float | None


@dataclass(frozen=True)
class Findings:
    """All that could be computed; what is not finished is empty.

    Attributes:
        tables: By sweep, row and column.
        bounds: By encoder and question, the error of what was not trained here: teachers and the untrained student.
        shares: By row of the sweeps over ingredients and teachers and question, the part of the way from the untrained
            student to the best of its teachers; no value where that teacher is not better than the untrained student.
        steps: By row of the sweep over ingredients, steps until the reference's final held-out cosine, as a part of its
            steps; by seed, ``None`` where it was not reached.
        compute: The same in CPU-seconds, as a part of the reference's.
        entropy: By question, correlation of norm entropy and error over the rows of all sweeps but that of the proxy.
        sizes: By size of pictures in pixels, row of the sweep over ingredients and column, errors of the same students.
        curves: By row of the sweep over ingredients and seed: steps, CPU-seconds and held-out cosine.
        faults: What ingredients do to planted faults.
    """

    tables: dict[str, dict[str, dict[str, Cell]]]
    bounds: dict[str, dict[str, float]]
    shares: dict[str, dict[str, Estimate]]
    steps: dict[str, dict[int, float | None]]
    compute: dict[str, dict[int, float | None]]
    entropy: dict[str, Correlation]
    sizes: dict[int, dict[str, dict[str, Cell]]]
    curves: dict[str, dict[int, list[tuple[int, float, float]]]]
    faults: list[Cure]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def find(out: Path) -> Findings:
    """Reads what is finished.

    Args:
        out: Folder of the evidence.
    """
    teachers = read_json(out / SETTINGS).get("teachers", ())
    values = {sweep: _values(out / sweep, teachers) for sweep in _REFERENCES}
    values[STUDENTS] |= _values(out / LARGE, teachers) if values[STUDENTS] else {}
    # The same teachers and steps. Held-out cosines are of targets in deviations of other images, so not the same.
    values[INGREDIENTS] |= _values(out / VIEWS, teachers) if values[INGREDIENTS] else {}
    curves = _curves(out / INGREDIENTS)
    for row, of_seeds in curves.items():
        values[INGREDIENTS][row][COSINE] = {seed: curve[-1][2] for seed, curve in of_seeds.items()}
    bounds = _bounds(out / BOUNDS)
    # The paper's recipe with two teachers is in both sweeps, if pairs are.
    again = _REFERENCES[INGREDIENTS] if "+".join(teachers[:2]) in values[TEACHERS] or len(teachers) == 2 else None
    others = {row: of for row, of in values[INGREDIENTS].items() if row != again}
    return Findings(
        {sweep: _table(of_rows, _REFERENCES[sweep]) for sweep, of_rows in values.items()},
        bounds,
        _shares(others, bounds, _distilled(out / INGREDIENTS) | _distilled(out / VIEWS))
        | _shares(values[TEACHERS], bounds, _distilled(out / TEACHERS))
        | {f"{row}, beyond": of for row, of in _shares(values[BEYOND], bounds, _distilled(out / BEYOND)).items()},
        time_to_quality(_against(curves, 0), _REFERENCES[INGREDIENTS]),
        time_to_quality(_against(curves, 1), _REFERENCES[INGREDIENTS]),
        _entropy([*values[TEACHERS].values(), *others.values(), *values[BEYOND].values()]),
        _sizes(out / SIZES, values[INGREDIENTS], bounds),
        curves,
        cures(out / FAULTS),
    )


def time_to_quality(
    curves: Mapping[str, Mapping[int, Sequence[tuple[float, float]]]], reference: str
) -> dict[str, dict[int, float | None]]:
    """Steps or CPU-seconds until a row reaches what the reference has in the end, seed by seed.

    Between two validations, the score is taken to change evenly.

    Args:
        curves: By row and seed, pairs of what was spent and a score of which more is better.
        reference: Row to compare with.

    Returns:
        By row and seed, what was spent as a part of the reference's; ``None`` where its score is never reached.
    """
    goals = {seed: curve[-1] for seed, curve in curves.get(reference, {}).items()}
    return {
        row: {
            seed: _first(curve, goals[seed][1], goals[seed][0]) for seed, curve in of_seeds.items() if seed in goals
        }
        for row, of_seeds in curves.items()
    }  # fmt: skip


def _first(curve: Sequence[tuple[float, float]], goal: float, whole: float) -> float | None:
    before = (0.0, -math.inf)
    for spent, score in curve:
        if score >= goal:
            part = 1.0 if math.isinf(before[1]) else (goal - before[1]) / (score - before[1])
            return (before[0] + part * (spent - before[0])) / whole
        before = (spent, score)
    return None


def share(untrained: float, reached: float, bound: float) -> float | None:
    """Part of the way from one error to a lower one; ``None`` if the bound is not lower."""
    return (untrained - reached) / (untrained - bound) if bound < untrained else None


def _runs(sweep: Path) -> list[dict[str, Any]]:
    path = sweep / "report.json"
    return list(read_json(path)["runs"]) if path.is_file() else []


def _values(sweep: Path, teachers: Sequence[str]) -> Values:
    found: Values = {}
    for run in _runs(sweep):
        scores = {name: run["scores"][name] for name in COLUMNS if run["scores"].get(name) is not None}
        # A proxy is read out too, and is none of the teachers.
        read = {name: run["scores"][_OF_TEACHER + name] for name in teachers if _OF_TEACHER + name in run["scores"]}
        distilled = [read[name] for name in run["teachers"] if name in read]
        others = [value for name, value in read.items() if name not in run["teachers"]]
        scores |= {READOUT: _mean(read)} if read else {}
        scores |= {WORST: min(distilled)} if distilled else {}
        scores |= {UNSEEN: sum(others) / len(others)} if others else {}
        curve = _curve(sweep, run)
        scores |= {COST: curve[-1][1]} if curve else {}
        for name, value in scores.items():
            found.setdefault(run["row"], {}).setdefault(name, {})[run["seed"]] = value
    return found


def _distilled(sweep: Path) -> dict[str, list[str]]:
    return {run["row"]: run["teachers"] for run in _runs(sweep)}


def _table(rows: Values, reference: str) -> dict[str, dict[str, Cell]]:
    table: dict[str, dict[str, Cell]] = {row: {} for row in rows}
    for column in COLUMNS:
        there = {row: of[column] for row, of in rows.items() if column in of}
        base = there.get(reference, {})
        differences = {row: paired_difference(values, base) for row, values in there.items() if row != reference}
        p = holm({row: found.p for row, found in differences.items() if found is not None and found.p is not None})
        for row, values in there.items():
            table[row][column] = Cell(values, estimate(list(values.values())), differences.get(row), p.get(row))
    return table


def _probed(folder: Path) -> dict[str, dict[str, float]]:
    """Errors by encoder and question, of the latest probe."""
    files = sorted(folder.glob("probing-dynamics-*.json"))
    summary = read_json(files[-1])["summary"] if files else {}
    return {
        name: {column: of[question]["mean"] for column, question in QUESTIONS.items()} for name, of in summary.items()
    }


def _bounds(folder: Path) -> dict[str, dict[str, float]]:
    return {_UNTRAINED if name.endswith("@random") else name: of for name, of in _probed(folder).items()}


def _sizes(
    folder: Path, trained: Values, bounds: Mapping[str, Mapping[str, float]]
) -> dict[int, dict[str, dict[str, Cell]]]:
    found: dict[int, Values] = {}
    for name, errors in _probed(folder).items():
        for row, seed, untrained, size in re.findall(r"^(.+)/seed_(\d+)(@random)?@(\d+)$", name):
            columns = found.setdefault(int(size), {}).setdefault(_UNTRAINED if untrained else row, {})
            for column, error in errors.items():
                columns.setdefault(column, {})[int(seed)] = error
    if found:  # sweep and bounds have the same students at the size of the recordings' probe
        first: Values = {_UNTRAINED: {column: {0: error} for column, error in bounds.get(_UNTRAINED, {}).items()}}
        every = {row for of in found.values() for row in of}
        found[IMAGE_SIZE] = {
            row: {column: values for column, values in of.items() if column in QUESTIONS}
            for row, of in {**trained, **first}.items() if row in every
        }  # fmt: skip
    return {size: _table(found[size], _REFERENCES[INGREDIENTS]) for size in sorted(found)}


def _shares(
    rows: Values, bounds: Mapping[str, Mapping[str, float]], distilled: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Estimate]]:
    if _UNTRAINED not in bounds:
        return {}
    found: dict[str, dict[str, Estimate]] = {}
    for row, columns in rows.items():
        if any(f"teacher:{name}" not in bounds for name in distilled[row]):
            continue  # the bounds are not finished
        for column in QUESTIONS:
            best = min(bounds[f"teacher:{name}"][column] for name in distilled[row])
            parts = [share(bounds[_UNTRAINED][column], value, best) for value in columns.get(column, {}).values()]
            known = [part for part in parts if part is not None]
            if known:
                found.setdefault(row, {})[column] = estimate(known)
    return found


def _entropy(rows: Sequence[Mapping[str, Mapping[int | None, float]]]) -> dict[str, Correlation]:
    found = {}
    for column in QUESTIONS:
        # A set of pairs: students that two sweeps share count once.
        both = sorted({(_mean(row[ENTROPY]), _mean(row[column])) for row in rows if ENTROPY in row and column in row})
        known = correlation([x for x, _ in both], [y for _, y in both])
        if known is not None:
            found[column] = known
    return found


_Curves = dict[str, dict[int, list[tuple[int, float, float]]]]


def _curves(sweep: Path) -> _Curves:
    found: _Curves = {}
    for run in _runs(sweep):
        curve = _curve(sweep, run)
        if curve:
            found.setdefault(run["row"], {})[run["seed"]] = curve
    return found


def _curve(sweep: Path, run: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    path = sweep / run["row"] / f"seed_{run['seed']}" / "metrics.csv"
    return list(_held_out(path)) if path.is_file() else []


def _held_out(path: Path) -> Iterator[tuple[int, float, float]]:
    """Steps, CPU-seconds, and the mean over teachers of the held-out cosine after them."""
    cpu_s_of_step = math.nan
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            steps = int(line["step"]) + 1
            if line.get("train/cpu_s"):
                cpu_s_of_step = float(line["train/cpu_s"]) / steps
            cosines = [float(value) for name, value in line.items() if name.startswith("val/cosine/") and value]
            if cosines:
                yield steps, steps * cpu_s_of_step, sum(cosines) / len(cosines)


def _against(curves: _Curves, place: int) -> dict[str, dict[int, list[tuple[float, float]]]]:
    return {
        row: {seed: [(point[place], point[2]) for point in curve] for seed, curve in of_seeds.items()}
        for row, of_seeds in curves.items()
    }


def _mean(values: Mapping[Any, float]) -> float:
    return sum(values.values()) / len(values)
