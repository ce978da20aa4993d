"""What a sweep consists of, as its folder says: ``sweep.json``, and a folder for each run."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from theia.ablation.lock import lock
from theia.ablation.run import Run
from theia.errors import ConfigError
from theia.utils.files import write_whole

logger = logging.getLogger(__name__)

_FILE = "sweep.json"


@dataclass(frozen=True)
class Record:
    """What was started in a folder, in one go or in several.

    Attributes:
        runs: Those whose folders are there.
        lost: Names of those whose folders are gone or damaged.
        planned: Seeds of each row of the grid, run or not.
        statement: Where it comes from, as plain values.
    """

    runs: Sequence[Run] = ()
    lost: Sequence[str] = ()
    planned: Mapping[str, Sequence[int]] = field(default_factory=dict)
    statement: Mapping[str, Any] = field(default_factory=dict)

    def with_planned(self, rows: Sequence[str], seeds: Sequence[int]) -> dict[str, list[int]]:
        """Seeds of each row, with those of further rows."""
        added = {row: list(seeds) for row in rows}
        every = dict.fromkeys([*self.planned, *added])
        return {row: sorted({*self.planned.get(row, ()), *added.get(row, ())}) for row in every}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other sweeps out of a folder, which is made if need be.

    Raises:
        ConfigError: If one is at work there, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise ConfigError(f"Nothing can be written into {folder}: {error.strerror}. Choose another --out.") from error
    with lock(folder / ".lock") as descriptor:
        if descriptor is None:
            raise ConfigError(f"Another sweep is at work in {folder}. Wait for it, or choose another --out.")
        yield


def earlier(folder: Path) -> Record:
    """What is in a folder already; an empty record if there is nothing, or nothing that can be read."""
    if not (folder / _FILE).exists():
        return Record()
    try:
        return read(folder)
    except ConfigError as error:
        logger.warning("%s It is written anew, without rows that are not asked for now.", error)
        return Record()


def write(
    folder: Path,
    runs: Sequence[Run],
    kept: Sequence[Run],
    planned: Mapping[str, Sequence[int]],
    statement: Mapping[str, Any],
) -> None:
    """Writes down what the sweep consists of, and the config of each run.

    Args:
        folder: Of the sweep.
        runs: To do now.
        kept: In the folder from before; those among ``runs`` are described anew.
        planned: Seeds of each row of the grid.
        statement: Where it comes from, as plain values.

    Raises:
        ConfigError: If a folder of a run holds one with other options.
        FileError: If something cannot be written, for instance on a full disk.
    """
    check(runs)
    asked = {(run.row, run.seed) for run in runs}
    for run in runs:
        run.prepare()
    content = {
        "statement": statement,
        "planned": planned,
        "runs": [
            {
                "row": run.row, "seed": run.seed, "folder": str(run.folder.relative_to(folder)),
                "options": run.options, "steps": run.steps, "scorers": run.scorers, "store_sha256": run.store_sha256,
            }
            for run in [*(run for run in kept if (run.row, run.seed) not in asked), *runs]
        ],
    }  # fmt: skip
    write_whole(folder / _FILE, json.dumps(content, indent=2) + "\n")


def check(runs: Sequence[Run]) -> None:
    """Sees that the folders of runs are theirs.

    Raises:
        ConfigError: Lists all that hold a run with other options.
    """
    problems = []
    for run in runs:
        try:
            run.check()
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def read(folder: Path) -> Record:
    """What a folder says of its sweep.

    Raises:
        ConfigError: If the folder holds none, or its description is damaged.
    """
    path = folder / _FILE
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
        return Record(runs, lost, planned, content["statement"])
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} is not the folder of a sweep: there is no {error.filename}. Give the --out of 'theia ablate'."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}). Start the sweep again: its runs are kept.") from error


def _run(folder: Path, one: Mapping[str, Any]) -> Run | None:
    path = folder / one["folder"] / "fit.yaml"
    try:
        config = yaml.safe_load(path.read_text())
        reason = "is no config" if not isinstance(config, dict) else ""
    except (OSError, ValueError, yaml.YAMLError) as error:
        config, reason = None, f"cannot be read ({type(error).__name__})"
    if reason:
        logger.warning(
            "The run %s, seed %d is lost: %s %s. Start the sweep again to have it.", one["row"], one["seed"], path,
            reason,
        )  # fmt: skip
        return None
    return Run(
        row=one["row"], seed=one["seed"], folder=folder / one["folder"], options=one["options"], config=config,
        steps=one["steps"], scorers=tuple(one["scorers"]), store_sha256=one["store_sha256"],
    )  # fmt: skip
