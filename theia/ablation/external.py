"""Scores that were measured elsewhere, success rates of robots for instance, from a CSV file."""

import csv
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from theia.ablation.summary import Scored
from theia.errors import ConfigError

_Key = tuple[str, int | None]
External = Mapping[_Key, Mapping[str, float]]
"""By row and seed, scores by ``external/<name>``; the seed is ``None`` for scores of a row as a whole."""


def read(path: Path, planned: Mapping[str, Collection[int]]) -> External:
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


def merge(scored: Sequence[Scored], external: External) -> tuple[list[Scored], list[str]]:
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
