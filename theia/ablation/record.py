"""The record of a sweep, ``sweep.json``: all runs of its folder, however often the sweep was started."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from theia.ablation.sweep_run import Run, lock
from theia.errors import ConfigError
from theia.models import older
from theia.utils.files import write_whole

logger = logging.getLogger(__name__)

_RECORD = "sweep.json"


@dataclass(frozen=True)
class Record:
    """What ``sweep.json`` says of a sweep, which may have been started several times.

    Attributes:
        runs: The runs whose folders are there.
        lost: Names of the runs whose folders are gone or damaged.
        planned: Seeds of each row of the grid, whether they were run or not.
        provenance: Where the figures come from, as plain values: command line, base config, choices for the report,
            and provenance of the stores.
    """

    runs: Sequence[Run] = ()
    lost: Sequence[str] = ()
    planned: Mapping[str, Sequence[int]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def with_planned(self, rows: Sequence[str], seeds: Sequence[int]) -> dict[str, list[int]]:
        """Seeds of each row, after further rows with their seeds are added."""
        added = {row: list(seeds) for row in rows}
        every = dict.fromkeys([*self.planned, *added])
        return {row: sorted({*self.planned.get(row, ()), *added.get(row, ())}) for row in every}


def earlier_record(folder: Path) -> Record:
    """The record of a folder that is about to be used; empty if there is none, or none that can be read."""
    if not (folder / _RECORD).exists():
        return Record()
    try:
        return read_record(folder)
    except ConfigError as error:
        logger.warning("%s It is written anew, with the rows of this sweep only.", error)
        return Record()


def read_record(folder: Path) -> Record:
    """Reads the record of a sweep.

    Args:
        folder: Folder of the sweep.

    Raises:
        ConfigError: If the folder is not that of a sweep, or the record is damaged.
    """
    path = folder / _RECORD
    try:
        content = json.loads(path.read_text())
        runs, lost = [], []
        planned: dict[str, list[int]] = {row: list(seeds) for row, seeds in content.get("planned", {}).items()}
        for one in content["runs"]:
            seeds = planned.setdefault(one["row"], [])
            if one["seed"] not in seeds:
                seeds.append(one["seed"])
            run = _run(folder, one)
            if run is None:
                lost.append(f"{one['row']}, seed {one['seed']}")
            else:
                runs.append(run)
        # An earlier version called it a statement.
        provenance = content["provenance"] if "provenance" in content else content["statement"]
        return Record(runs, lost, planned, provenance)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} is not the folder of a sweep: there is no {error.filename}. Give the --out of 'theia ablate'."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}). Start the sweep again: its runs are kept.") from error


def _run(folder: Path, one: Mapping[str, Any]) -> Run | None:
    path = folder / one["folder"] / "fit.yaml"
    try:
        config = older.config(yaml.safe_load(path.read_text()))
        reason = "" if isinstance(config, dict) else "is not a config"
    except (OSError, ValueError, yaml.YAMLError) as error:
        config, reason = None, f"cannot be read ({type(error).__name__})"
    if reason:
        logger.warning(
            "The run %s, seed %d is lost: %s %s. Start the sweep again to repeat it.", one["row"], one["seed"], path,
            reason,
        )  # fmt: skip
        return None
    return Run(
        row=one["row"], seed=one["seed"], folder=folder / one["folder"], options=one["options"], config=config,
        steps=one["steps"], scorers=tuple(one["scorers"]), store_sha256=one["store_sha256"],
        scorer_data=one.get("scorer_data", {}),
    )  # fmt: skip


def write_record(
    folder: Path,
    runs: Sequence[Run],
    kept: Sequence[Run],
    planned: Mapping[str, Sequence[int]],
    provenance: Mapping[str, Any],
) -> None:
    """Writes the record of a sweep, and the config of each run.

    Args:
        folder: Folder of the sweep.
        runs: Runs to do now.
        kept: Runs that the folder had before; those that are among ``runs`` are replaced.
        planned: Seeds of each row of the grid.
        provenance: See :class:`Record`.

    Raises:
        ConfigError: If a run's folder holds a run with other options.
        FileError: If something cannot be written, for instance on a full disk.
    """
    check_runs(runs)
    asked = {(run.row, run.seed) for run in runs}
    for run in runs:
        run.prepare()
    content = {
        "provenance": provenance,
        "planned": planned,
        "runs": [
            {
                "row": run.row, "seed": run.seed, "folder": str(run.folder.relative_to(folder)),
                "options": run.options, "steps": run.steps, "scorers": run.scorers, "store_sha256": run.store_sha256,
                "scorer_data": run.scorer_data,
            }
            for run in [*(run for run in kept if (run.row, run.seed) not in asked), *runs]
        ],
    }  # fmt: skip
    write_whole(folder / _RECORD, json.dumps(content, indent=2) + "\n")


def check_runs(runs: Sequence[Run]) -> None:
    """Checks that what was trained in the folders of runs is these runs.

    Raises:
        ConfigError: Lists all folders for which it is not.
    """
    problems = [problem for run in runs if (problem := run.problem())]
    if problems:
        raise ConfigError("\n".join(problems))


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps other sweeps out of a folder, which is made if need be.

    Raises:
        ConfigError: If another sweep works there.
    """
    with lock(folder / ".lock") as descriptor:
        if descriptor is None:
            raise ConfigError(f"Another sweep works in {folder}. Wait for it, or choose another --out.")
        yield
