"""From the scores of finished runs to what a report shows: ranks, differences, transfer and entropy."""

import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from theia.ablation.run import Run
from theia.errors import ConfigError
from theia.utils.estimates import Correlation, Difference, Estimate, correlation, estimate, holm, paired_difference

ENTROPY = "test/norm_entropy"
TRANSFER = "readout/explained_variance/"

# Of every other metric, more is better.
_LOWER_IS_BETTER = ("loss", "mse", "smooth_l1", "device_hours")

# Of the same teachers or images in every row, the broadest first. The loss is each row's own.
_DEFAULTS = (
    "readout/explained_variance",
    "readout/cosine",
    "classification/linear_probe_accuracy",
    "classification/knn_accuracy",
    "test/loss",
)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A finished run.

    Attributes:
        row: Line of the report.
        seed: Of the training; ``None`` for scores of a row as a whole, which are one observation.
        teachers: Distilled from.
        scores: By name, ``split/metric`` or ``split/metric/teacher``.
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
        name: Of the row.
        teachers: Distilled from.
        seeds: Of its runs, ascending.
        options: As in its runs.
        values: The score that rows are sorted by, by seed; empty where the row lacks it.
        columns: All its scores by name, over seeds.
        difference: Of ``values`` to the reference; ``None`` for the reference itself and without common seeds.
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
        scored: The runs.
        sort_by: Name of the score that rows are compared by.
        chosen: Why that score, in a few words.
        reference: Row that others are compared with, if any.
        rows: Best first; rows without the score come last.
        columns: Names of all scores.
        readable: Teachers that were read out of the frozen students, whoever these were distilled from.
        entropy: Of norm entropy with the score, over means of rows.
        holm: p values of the differences to the reference by row, corrected for their number.
        lower_is_better: Names of scores of which less is better, beside the losses and costs that are known to be so.
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
        """Whether more of a score is better."""
        return column not in self.lower_is_better and higher_is_better(column)

    def rank(self, row: RowSummary) -> int | None:
        """One more than there are better rows, so that equals share a rank; ``None`` without the score."""
        if not row.values:
            return None
        ranks = [_rank(other, self.sort_by, self.lower_is_better) for other in self.rows]
        return 1 + sum(rank < _rank(row, self.sort_by, self.lower_is_better) for rank in ranks)

    def transfer(self, row: RowSummary) -> list[float | None]:
        """Mean explained variance of each readable teacher in a row."""
        cells = [row.columns.get(TRANSFER + teacher) for teacher in self.readable]
        return [cell.mean if cell else None for cell in cells]


def higher_is_better(column: str) -> bool:
    """Whether more of a score is better; its metric, which is the second part of its name or the whole, decides."""
    parts = column.split("/")
    return parts[min(1, len(parts) - 1)] not in _LOWER_IS_BETTER


def summarise(
    scored: Sequence[Scored],
    sort_by: str | None = None,
    reference: str | None = None,
    lower_is_better: Sequence[str] = (),
) -> Summary:
    """Puts runs together by row. Scores that are not finite count as missing.

    Args:
        scored: Finished runs.
        sort_by: Name of the score to compare rows by; by default a score of the readout, if all rows have one, or the
            next best that all rows have.
        reference: Row to compare the others with.
        lower_is_better: Scores of which less is better, beside losses and costs.

    Raises:
        ConfigError: If there is no score at all, or no score or row of that name.
    """
    columns = tuple(dict.fromkeys(name for run in scored for name, value in run.scores.items() if math.isfinite(value)))
    names = tuple(dict.fromkeys(run.row for run in scored))
    if not columns:
        raise ConfigError("No run of the sweep is finished, so there is nothing to report. Let at least one finish.")
    if reference is not None and reference not in names:
        raise ConfigError(f"No finished run of a row {reference!r} to compare with. Rows: {'; '.join(names)}.")
    for name in [*([] if sort_by is None else [sort_by]), *lower_is_better]:
        if name not in columns:
            raise ConfigError(f"No finished run has a score {name!r}. Scores: {', '.join(columns)}.")
    by_row = {name: [run for run in scored if run.row == name] for name in names}
    chosen = "as was asked for"
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
    return (shared or columns)[0], "for want of a usual score that all rows have"


def _rank(row: RowSummary, column: str, lower_is_better: Collection[str]) -> float:
    if column not in row.columns:
        return math.inf
    mean = row.columns[column].mean
    return -mean if column not in lower_is_better and higher_is_better(column) else mean


_Key = tuple[str, int | None]
External = Mapping[_Key, Mapping[str, float]]
"""By row and seed, scores by ``external/<name>``; the seed is ``None`` for scores of a row as a whole."""


def read_external(path: Path, planned: Mapping[str, Collection[int]]) -> External:
    """Scores of a CSV file.

    The header is ``row,seed,<name>,...``; an empty cell is a score that there is not. Without a seed, a line holds for
    the row as a whole.

    Args:
        path: CSV file with a header.
        planned: Seeds of each row of the sweep, finished or not.

    Raises:
        ConfigError: If the file cannot be read or lacks a column, or a line names an unknown row or seed, repeats
            another, or holds something that is no number.
    """
    added: dict[_Key, dict[str, float]] = {}
    lines: dict[tuple[_Key, str], int] = {}
    for number, key, scores in _lines(path, planned):
        row, seed = key
        for name, value in scores.items():
            # Means over seeds would mix with what is a mean already.
            rivals = [key] + [other for other in added if other[0] == row and (other[1] is None) != (seed is None)]
            for rival in rivals:
                if (rival, name) in lines:
                    raise ConfigError(
                        f"{path}, line {number}: {name!r} of row {row!r} was given in line {lines[rival, name]} already"
                        f"{'' if rival == key else ', once with a seed and once without'}. Keep one."
                    )
            lines[key, name] = number
            added.setdefault(key, {})[f"external/{name}"] = value
    return added


def merge_external(scored: Sequence[Scored], external: External) -> tuple[list[Scored], list[str]]:
    """Adds scores from elsewhere to runs.

    Args:
        scored: Finished runs.
        external: As :func:`read` gives them.

    Returns:
        The runs with their scores, then one more for each row that was scored as a whole: that is one observation,
        without a seed, and has no interval. Second, names of the scored runs and rows of which none is finished.
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


def _lines(path: Path, planned: Mapping[str, Collection[int]]) -> Iterator[tuple[int, _Key, dict[str, float]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Give a CSV file in UTF-8.") from error
    reader = csv.reader(io.StringIO(text))
    header = [name.strip() for name in next(reader, [])]
    names = [name for name in header if name not in ("row", "seed")]
    if "row" not in header or not all(names) or not names or len(set(header)) < len(header):
        raise ConfigError(
            f"{path}, line 1: the columns are {','.join(header) or 'missing'}; they must be row, seed (or none) and "
            "one or more names of scores, each once, separated by commas."
        )
    empty = True
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        empty = False
        where = f"{path}, line {reader.line_num}"
        if len(cells) != len(header):
            raise ConfigError(f"{where}: {len(cells)} cells under {len(header)} columns. Quote names with commas.")
        line = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
        key = line["row"], _seed(line, where)
        _check(key, planned, where)
        yield reader.line_num, key, {name: _number(line[name], name, where) for name in names if line[name]}
    if empty:
        raise ConfigError(f"{path} has no line below its header. Add one for each row, or for each run.")


def _seed(line: dict[str, str], where: str) -> int | None:
    text = line.get("seed", "")
    if text and not text.isdecimal():
        raise ConfigError(f"{where}: the seed is {text!r}; it must be a whole number, or empty for the row as a whole.")
    return int(text) if text else None


def _check(key: _Key, planned: Mapping[str, Collection[int]], where: str) -> None:
    row, seed = key
    if row not in planned:
        raise ConfigError(f"{where}: the sweep has no row {row!r}. Rows: {'; '.join(planned)}.")
    if seed is not None and seed not in planned[row]:
        raise ConfigError(
            f"{where}: row {row!r} has no seed {seed}. Seeds: {', '.join(map(str, sorted(planned[row])))}."
        )


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {name} is {text!r}, which is not a number. Leave it empty where there is none.")
    return value


# Options that decide which images a student is scored on, where the store is one and the same.
_HELD_OUT = ("val_split", "holdout")
_SHOWN = 4


def caveats(tested: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[str]:
    """Sentences for a reader of the figures.

    Args:
        tested: Runs with what ``theia test`` wrote of each.

    Returns:
        One for each thing that differs between runs and should not, or that some lack.
    """
    found = []
    stores = {run.name: report["store"]["manifest_sha256"][:12] for run, report in tested}
    if _differ(stores):
        found.append(
            f"**Scored on different stores, or on different states of one, so not to be compared: {_groups(stores)}. "
            "Start the sweep again with all rows: what is trained is only tested anew.**"
        )
    for name in _HELD_OUT:
        values = {run.name: run.config["data"].get(name) for run, _ in tested}
        if _differ(values):
            found.append(f"**Scored on different images, so not to be compared: `data.{name}` is {_groups(values)}.**")
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
            found.append(f"{run.name} has no scores of {', '.join(lacking)} yet; the others of it are shown.")
    return found


def _conditions(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and the rest, without the store and the images, which are options."""
    plain = {name: value for name, value in environment.items() if name not in ("store", "images", "versions")}
    return {**environment.get("versions", {}), **plain}


def _differ(values: Mapping[str, Any]) -> bool:
    return len(set(map(str, values.values()))) > 1


def _groups(values: Mapping[str, Any]) -> str:
    """Which run has which value, the most usual first."""
    by_value: dict[str, list[str]] = {}
    for run, value in values.items():
        by_value.setdefault(str(value), []).append(run)
    usual, *others = sorted(by_value.items(), key=lambda group: -len(group[1]))
    parts = [f"{usual[0]} in {len(usual[1])} run{'s' * (len(usual[1]) != 1)}"]
    for value, names in others:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"{value} in {'; '.join(names[:_SHOWN])}{more}")
    return ", ".join(parts)
