"""What a report shows, from the scores of finished runs and from elsewhere: ranks, differences, and caveats."""

import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from theia.ablation.sweep_run import Run
from theia.errors import ConfigError
from theia.utils.estimates import Correlation, Difference, Estimate, correlation, estimate, holm, paired_difference

ENTROPY = "test/norm_entropy"
TRANSFER = "readout/explained_variance/"

# For every other metric, more is better.
_LOWER_IS_BETTER = (
    "loss", "mse", "smooth_l1", "device_hours", "plan_error", "motion_error", "depth_rmse", "normals_rmse",
)  # fmt: skip

# The first three use the same teachers or images in every row, the broadest first. The loss is each row's own.
_DEFAULTS = (
    "readout/explained_variance",
    "readout/cosine",
    "classification/linear_probe_accuracy",
    "classification/knn_accuracy",
    "test/loss",
)

_AGAIN = "Start the sweep again with all rows: trained runs are only tested again."

# Options that decide, within one store, which images a student is scored on.
_HELD_OUT = ("val_split", "holdout")
_RUNS_SHOWN = 4

_Key = tuple[str, int | None]
External = Mapping[_Key, Mapping[str, float]]
"""Scores measured elsewhere, by row and seed, named ``external/<name>``; seed ``None`` is for a row as a whole."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A finished run with its scores.

    Attributes:
        row: Name of the row.
        seed: Seed of the training; ``None`` for scores of a row as a whole, which are one observation.
        teachers: Names of the teachers that the student is distilled from.
        scores: Values by name, ``split/metric`` or ``split/metric/teacher``.
        options: Dotted options in which the row differs from the base config.
    """

    row: str
    seed: int | None
    teachers: tuple[str, ...]
    scores: Mapping[str, float]
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RowSummary:
    """One line of the report.

    Attributes:
        name: Name of the row.
        teachers: Names of the teachers that its students are distilled from.
        seeds: Seeds of its runs, ascending.
        options: Dotted options in which the row differs from the base config.
        values: By seed, the score that rows are sorted by; empty if the row lacks it.
        columns: By name, each score's mean and interval over seeds.
        difference: Difference of ``values`` from the reference; ``None`` for the reference itself, and without common
            seeds.
    """

    name: str
    teachers: tuple[str, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Any]
    values: Mapping[int | None, float]
    columns: Mapping[str, Estimate]
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a report shows.

    Attributes:
        scored: The finished runs.
        sort_by: Name of the score that ranks the rows.
        chosen: Why that score, in a few words.
        reference: Row that the others are compared with, if any.
        rows: The rows, best first; those without the score come last.
        columns: Names of all scores.
        readable: Teachers that were read out of the frozen students, whether or not these were distilled from them.
        entropy: Correlation of norm entropy with the score, over means of rows.
        holm: By row, p value of the difference from the reference, corrected for the number of differences.
        lower_is_better: Names of scores for which less is better, beside the known losses and costs.
    """

    scored: tuple[Scored, ...]
    sort_by: str
    chosen: str
    reference: str | None
    rows: tuple[RowSummary, ...]
    columns: tuple[str, ...]
    readable: tuple[str, ...]
    entropy: Correlation | None
    holm: Mapping[str, float]
    lower_is_better: tuple[str, ...] = ()

    def higher_is_better(self, column: str) -> bool:
        """Whether more is better for a score."""
        return column not in self.lower_is_better and higher_is_better(column)

    def rank(self, row: RowSummary) -> int | None:
        """Place of a row, which equal rows share; ``None`` if it lacks the score."""
        if not row.values:
            return None
        ranks = [_rank(other, self.sort_by, self.lower_is_better) for other in self.rows]
        return 1 + sum(rank < _rank(row, self.sort_by, self.lower_is_better) for rank in ranks)

    def transfer(self, row: RowSummary) -> list[float | None]:
        """Mean explained variance in a row, one value for each teacher in ``readable``."""
        cells = [row.columns.get(TRANSFER + teacher) for teacher in self.readable]
        return [cell.mean if cell else None for cell in cells]


def higher_is_better(column: str) -> bool:
    """Whether more is better for a score; its metric, the second part of the name or else the whole, decides."""
    parts = column.split("/")
    return parts[min(1, len(parts) - 1)] not in _LOWER_IS_BETTER


def summarise(
    scored: Sequence[Scored],
    sort_by: str | None = None,
    reference: str | None = None,
    lower_is_better: Sequence[str] = (),
) -> Summary:
    """Groups runs by row, ranks the rows and compares them. Scores that are not finite count as missing.

    Args:
        scored: Finished runs.
        sort_by: Name of the score that ranks the rows; by default a score of the readout, if all rows have one, or the
            next best that all rows have.
        reference: Row that the others are compared with.
        lower_is_better: Names of scores for which less is better, beside losses and costs.

    Raises:
        ConfigError: If there is no score at all, or none of that name, or no such row.
    """
    columns = tuple(dict.fromkeys(name for run in scored for name, value in run.scores.items() if math.isfinite(value)))
    names = tuple(dict.fromkeys(run.row for run in scored))
    if not columns:
        raise ConfigError("No run of the sweep has a score, so there is nothing to report. Wait until one is finished.")
    if reference is not None and reference not in names:
        raise ConfigError(
            f"No run of the reference {reference!r} is finished. Rows with finished runs: {'; '.join(names)}."
        )
    for name in [*([] if sort_by is None else [sort_by]), *lower_is_better]:
        if name not in columns:
            raise ConfigError(f"No finished run has a score {name!r}. Scores: {', '.join(columns)}.")
    by_row = {name: [run for run in scored if run.row == name] for name in names}
    chosen = "as asked for"
    if sort_by is None:
        sort_by, chosen = _default(columns, by_row.values())
    base = _values(by_row[reference], sort_by) if reference is not None else {}
    rows = []
    for name, runs in by_row.items():
        values = _values(runs, sort_by)
        found = {column: list(_values(runs, column).values()) for column in columns}
        rows.append(
            RowSummary(
                name=name,
                teachers=runs[0].teachers,
                seeds=tuple(sorted(run.seed for run in runs if run.seed is not None)),
                options=runs[0].options,
                values=values,
                columns={column: estimate(numbers) for column, numbers in found.items() if numbers},
                difference=None if name == reference else paired_difference(values, base),
            )
        )
    rows.sort(key=lambda row: _rank(row, sort_by, lower_is_better))
    p = {row.name: row.difference.p for row in rows if row.difference is not None and row.difference.p is not None}
    both = [
        (row.columns[ENTROPY].mean, row.columns[sort_by].mean) for row in rows if {ENTROPY, sort_by} <= {*row.columns}
    ]
    return Summary(
        scored=tuple(scored),
        sort_by=sort_by,
        chosen=chosen,
        reference=reference,
        rows=tuple(rows),
        columns=columns,
        readable=tuple(name.removeprefix(TRANSFER) for name in columns if name.startswith(TRANSFER)),
        entropy=correlation([x for x, _ in both], [y for _, y in both]) if sort_by != ENTROPY else None,
        holm=holm(p),
        lower_is_better=tuple(lower_is_better),
    )


def _values(runs: Iterable[Scored], column: str) -> dict[int | None, float]:
    return {run.seed: run.scores[column] for run in runs if math.isfinite(run.scores.get(column, math.nan))}


def _default(columns: Sequence[str], rows: Collection[Sequence[Scored]]) -> tuple[str, str]:
    shared = [name for name in columns if all(_values(runs, name) for runs in rows)]
    for name in _DEFAULTS:
        if name in shared:
            return name, "the default, since all rows have it"
    return (shared or columns)[0], "since no usual score is one that all rows have"


def _rank(row: RowSummary, column: str, lower_is_better: Collection[str]) -> float:
    if column not in row.columns:
        return math.inf
    mean = row.columns[column].mean
    return -mean if column not in lower_is_better and higher_is_better(column) else mean


def read_external(path: Path, planned: Mapping[str, Collection[int]]) -> External:
    """Reads scores measured elsewhere from a CSV file.

    The header is ``row,seed,<name>,...``. An empty cell is a missing score; a line without a seed is for the row as a
    whole.

    Args:
        path: CSV file with a header.
        planned: Seeds of each row of the sweep, whether they are finished or not.

    Raises:
        ConfigError: If the file cannot be read or lacks a column, or a line has an unknown row or seed, repeats
            another line, or holds something that is not a number.
    """
    added: dict[_Key, dict[str, float]] = {}
    lines: dict[tuple[_Key, str], int] = {}
    for number, key, scores in _read_lines(path, planned):
        row, seed = key
        for name, value in scores.items():
            # A score of the row is a mean already, and cannot be averaged with scores of its seeds.
            rivals = [key] + [other for other in added if other[0] == row and (other[1] is None) != (seed is None)]
            for rival in rivals:
                if (rival, name) in lines:
                    raise ConfigError(
                        f"{path}, line {number}: line {lines[rival, name]} has {name!r} of row {row!r} already"
                        f"{'' if rival == key else ', once with a seed and once without'}. Keep one."
                    )
            lines[key, name] = number
            added.setdefault(key, {})[f"external/{name}"] = value
    return added


def merge_external(scored: Sequence[Scored], external: External) -> tuple[list[Scored], list[str]]:
    """Adds scores measured elsewhere to runs.

    Args:
        scored: Finished runs.
        external: What :func:`read_external` returns.

    Returns:
        First the runs with these scores, then one more without a seed for each row that was scored as a whole, which is
        one observation and has no interval. Second, names of scored runs and rows that are not finished.
    """
    merged = [replace(run, scores={**run.scores, **external.get((run.row, run.seed), {})}) for run in scored]
    first = {run.row: run for run in reversed(scored)}
    there = {(run.row, run.seed) for run in scored}
    waiting = []
    for (row, seed), scores in external.items():
        if seed is None and row in first:
            merged.append(replace(first[row], seed=None, scores=scores))
        elif (row, seed) not in there:
            waiting.append(row if seed is None else f"{row}, seed {seed}")
    return merged, waiting


def _read_lines(path: Path, planned: Mapping[str, Collection[int]]) -> Iterator[tuple[int, _Key, dict[str, float]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin the file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Give a CSV file in UTF-8.") from error
    reader = csv.reader(io.StringIO(text))
    header = [name.strip() for name in next(reader, [])]
    names = [name for name in header if name not in ("row", "seed")]
    if "row" not in header or not all(names) or not names or len(set(header)) < len(header):
        raise ConfigError(
            f"{path}, line 1: the columns are {','.join(header) or 'missing'}; they must be row, seed (optional) and "
            "one or more names of scores, each once, separated by commas."
        )
    empty = True
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        empty = False
        where = f"{path}, line {reader.line_num}"
        if len(cells) != len(header):
            raise ConfigError(
                f"{where}: {len(cells)} cells under {len(header)} columns. Put names that have commas in quotes."
            )
        line = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        key = line["row"], _seed(line, where)
        _check_planned(key, planned, where)
        yield reader.line_num, key, {name: _score(line[name], name, where) for name in names if line[name]}
    if empty:
        raise ConfigError(f"{path} has no line below its header. Add one for each row or each run.")


def _seed(line: dict[str, str], where: str) -> int | None:
    text = line.get("seed", "")
    if text and not text.isdecimal():
        raise ConfigError(f"{where}: the seed is {text!r}; it must be a whole number, or empty for the row as a whole.")
    return int(text) if text else None


def _check_planned(key: _Key, planned: Mapping[str, Collection[int]], where: str) -> None:
    row, seed = key
    if row not in planned:
        raise ConfigError(f"{where}: the sweep has no row {row!r}. Rows: {'; '.join(planned)}.")
    if seed is not None and seed not in planned[row]:
        raise ConfigError(
            f"{where}: row {row!r} has no seed {seed}. Seeds: {', '.join(map(str, sorted(planned[row])))}."
        )


def _score(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            f"{where}: {name} is {text!r}, which is not a number. Leave the cell empty for a missing score."
        )
    return value


def caveats(tested: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[str]:
    """Sentences about what makes figures of a report hard to compare.

    Args:
        tested: Finished runs, each with what ``theia test`` wrote.

    Returns:
        One for each condition that differs between runs and should not, and for each run that lacks scores.
    """
    found = []
    stores = {run.name: report["store"]["manifest_sha256"][:12] for run, report in tested}
    if _differ(stores):
        found.append(
            "**Scored on different stores, or on different states of one, so not comparable: "
            f"{_groups(stores)}. {_AGAIN}**"
        )
    for name in _HELD_OUT:
        values = {run.name: run.config["data"].get(name) for run, _ in tested}
        if _differ(values):
            found.append(f"**Scored on different images, so not comparable: `data.{name}` is {_groups(values)}.**")
    scored_on: dict[str, dict[str, str]] = {}
    for run, report in tested:
        for full_name in report["scorers"]:
            name, _, data = full_name.partition("@")
            state = report.get("scorer_data", {}).get(full_name, "")[:8]
            scored_on.setdefault(name, {})[run.name] = f"{data or 'that of training'}{state and f' ({state})'}"
    for name, of_runs in scored_on.items():
        if _differ(of_runs):
            found.append(f"**Scored by {name} on different data, so not comparable: {_groups(of_runs)}. {_AGAIN}**")
    for name in ("scorer_images", "device", "precision"):
        values = {run.name: report.get(name) for run, report in tested}
        if _differ(values):
            found.append(f"Tested with different {name}: {_groups(values)}.")
    conditions = {run.name: _conditions(run.environment()) for run, _ in tested}
    for name in dict.fromkeys(name for one in conditions.values() for name in one):
        values = {run: one.get(name, "unknown") for run, one in conditions.items()}
        if _differ(values):
            found.append(f"Trained with different {name}: {_groups(values)}.")
    for run, report in tested:
        lacking = [name for name in run.scorers if name not in report["scorers"]]
        if lacking:
            found.append(f"{run.name} has no scores of {', '.join(lacking)} yet; its other scores are shown.")
    return found


def _conditions(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions of a training: versions and hardware, but not store and images, which depend on its options."""
    plain = {name: value for name, value in environment.items() if name not in ("store", "images", "versions")}
    return {**environment.get("versions", {}), **plain}


def _differ(values: Mapping[str, Any]) -> bool:
    return len(set(map(str, values.values()))) > 1


def _groups(values: Mapping[str, Any]) -> str:
    """Text that says which runs have which value, beginning with the most frequent."""
    by_value: dict[str, list[str]] = {}
    for run, value in values.items():
        by_value.setdefault(str(value), []).append(run)
    usual, *others = sorted(by_value.items(), key=lambda group: -len(group[1]))
    parts = [f"{usual[0]} in {len(usual[1])} run{'s' * (len(usual[1]) != 1)}"]
    for value, names in others:
        more = f" and {len(names) - _RUNS_SHOWN} more" if len(names) > _RUNS_SHOWN else ""
        parts.append(f"{value} in {'; '.join(names[:_RUNS_SHOWN])}{more}")
    return ", ".join(parts)
