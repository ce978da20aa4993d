"""A run's figures as columns of a sweep: a CSV file that ``theia ablate report --scores`` reads."""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from theia.utils.files import read_json, write_whole

_SWEEP = "sweep.json"
_SEED = re.compile(r"seed_(\d+)")
_ALL = "cortexbench"


class SweepRun(NamedTuple):
    """One training of a sweep.

    Attributes:
        sweep: Folder of the sweep.
        row: Name of the row.
        seed: Seed of the training.
    """

    sweep: Path
    row: str
    seed: int


def find_run(encoder: str) -> SweepRun | None:
    """Finds the training of a sweep that an encoder comes from.

    Args:
        encoder: Path of a checkpoint or an exported folder inside the run's folder; any other name is of no sweep.

    Returns:
        The training; ``None`` if there is none, as for the same student untrained.
    """
    path = Path(encoder).expanduser().absolute()
    if not path.exists():
        return None
    for folder in path.parents:
        found = _SEED.fullmatch(folder.name)
        if found is not None and (folder.parents[1] / _SWEEP).is_file():
            return SweepRun(folder.parents[1], folder.parent.name, int(found[1]))
    return None


def write_scores(folder: Path, values: Mapping[str, Mapping[str, float]]) -> list[Path]:
    """Writes what the students of sweeps reached, a file for each sweep.

    The header is ``row,seed,<task>,...,cortexbench``: means over rollouts and over the seeds of the policies, and the
    mean over all tasks, which is left empty where a student lacks one of them.

    Args:
        folder: Folder of the run.
        values: Success or score of each encoder, by its label, on each task.

    Returns:
        Files that were written; none if no encoder comes from a sweep.
    """
    by_sweep: dict[Path, list[tuple[SweepRun, Mapping[str, float]]]] = {}
    for about in sorted((folder / "policies").glob("*/encoder.json")):
        record = read_json(about)
        found = find_run(record.get("name", ""))
        if found is not None and record["label"] in values:
            by_sweep.setdefault(found.sweep, []).append((found, values[record["label"]]))
    return [_write(folder / f"scores-{sweep.name}.csv", rows) for sweep, rows in by_sweep.items()]


def _write(path: Path, rows: Iterable[tuple[SweepRun, Mapping[str, float]]]) -> Path:
    rows = sorted(rows, key=lambda row: (row[0].row, row[0].seed))
    tasks = sorted({task for _, values in rows for task in values})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["row", "seed", *tasks, _ALL])
    for run, values in rows:
        mean = float(np.mean([values[task] for task in tasks])) if len(values) == len(tasks) else ""
        writer.writerow([run.row, run.seed, *(values.get(task, "") for task in tasks), mean])
    write_whole(path, text.getvalue())
    return path
