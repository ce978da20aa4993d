"""One table for people and one JSON for everything else."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.throughput.measure import Measure, Result
from theia.utils.files import write_whole

_HEADERS = ["measure", "median", "least", "greatest", "aim", "reached"]


def table(results: Mapping[str, Result]) -> str:
    """All measures of all suites, and under them what a reader must know.

    Args:
        results: Results by suite.
    """
    rows = [_row(measure) for result in results.values() for measure in result.measures]
    lines = [tabulate(rows, headers=_HEADERS, disable_numparse=True, colalign=("left", *["right"] * 4, "left"))]
    lines += [f"{name}: {note}" for name, result in results.items() for note in result.notes]
    return "\n".join(lines)


def write(folder: Path, kind: str, results: Mapping[str, Result], more: Mapping[str, Any]) -> Path:
    """Writes results to a new file.

    Args:
        folder: Folder of the file, which is made if it is missing.
        kind: First part of the file's name, before date and time.
        results: Results by suite.
        more: Further entries of the file, as plain values.

    Returns:
        Path of the file.

    Raises:
        FileError: If it cannot be written, for instance on a full disk.
    """
    suites = {
        name: {
            "measures": [_record(measure) for measure in result.measures],
            "details": result.details,
            "notes": result.notes,
        }
        for name, result in results.items()
    }
    text = json.dumps({**more, "suites": suites}, indent=1) + "\n"
    path = folder / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}.json"
    while path.exists():  # never over another
        path = path.with_stem(f"{path.stem}-again")
    write_whole(path, text)
    return path


def _row(measure: Measure) -> list[str]:
    aim = ""
    if measure.aim is not None:
        aim = f"{'<=' if measure.at_most else '>='} {_figure(measure.aim, measure.unit)}"
    reached = {None: "", True: "yes", False: "no"}[measure.reached]
    figures = (measure.median, min(measure.values), max(measure.values))
    return [measure.name, *(_figure(figure, measure.unit) for figure in figures), aim, reached]


def _record(measure: Measure) -> dict[str, Any]:
    return {
        "name": measure.name,
        "unit": measure.unit,
        "aim": measure.aim,
        "at_most": measure.at_most,
        "median": measure.median,
        "reached": measure.reached,
        "values": list(measure.values),
    }


def _figure(value: float, unit: str) -> str:
    return f"{value:.3g}{unit}" if unit == "x" else f"{value:.3g} {unit}".rstrip()
