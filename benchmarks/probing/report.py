"""What was found as a table for people and as measures for the JSON."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from tabulate import tabulate

from benchmarks.throughput.measure import Measure, Result

# By encoder and figure ("task/name"), one value per seed; one value where seeds play no part.
Found = Mapping[str, Mapping[str, Sequence[float]]]

_UNITS = {
    "rmse": "m", "aligned_rmse": "m", "angular_rmse": "degrees", "silog": "100 log m",
}  # fmt: skip


def table(found: Found) -> str:
    """A row per figure, a column per encoder; means over seeds, with their standard deviation if there are several.

    Args:
        found: By encoder, then figure.
    """
    figures = list(dict.fromkeys(figure for values in found.values() for figure in values))
    rows = []
    for figure in figures:
        cells = [_cell(values.get(figure, ())) for values in found.values()]
        rows.append([figure, _unit(figure), "less" if _unit(figure) else "more", *cells])
    lines: str = tabulate(rows, headers=["figure", "unit", "better", *found], disable_numparse=True)
    return lines


def results(found: Found) -> dict[str, Result]:
    """The same for the JSON, by encoder, with every seed's value and the mean.

    Args:
        found: By encoder, then figure.
    """
    return {
        name: Result(
            [Measure(figure, values, _unit(figure), at_most=bool(_unit(figure))) for figure, values in figures.items()],
            details={"means": {figure: fmean(values) for figure, values in figures.items()}},
        )
        for name, figures in found.items()
    }


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _unit(figure: str) -> str:
    """Shares have none. All that has one is an error, and better if less."""
    return _UNITS.get(figure.rpartition("/")[2], "")
