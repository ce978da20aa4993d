"""From the scores of finished runs to what a report shows: ranks, differences, transfer and entropy."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from theia.ablation.statistics import Difference, Estimate, estimate, holm, paired_difference
from theia.analysis.statistics import Correlation, correlation
from theia.errors import ConfigError

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
