"""One run of a sweep: its folder, how far it is, and what is left of it to do."""

import csv
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from theia.ablation.grid import flat
from theia.errors import ConfigError
from theia.models import older
from theia.utils.files import write_whole

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "finished", "failed"]

CHECKPOINT = "last"  # no choice by held-out figures, which are what is compared
_TAIL_BYTES = 1 << 16

# Options that do not change what is trained: where, how often it is written down, and how the data are read.
_HARMLESS = frozenset({
    "run_folder", "ckpt_path", "checkpoint_every", "compare_untrained", "scorers", "scorer_images", "data.workers",
    "data.val_batch_size", "trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.log_every_n_steps", "trainer.logger", "trainer.callbacks",
})  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A row with a seed.

    Attributes:
        row: Name of the row.
        seed: Of the training.
        folder: Run folder.
        options: Dotted options in which the row differs from the base config.
        config: All options of ``theia fit``, resolved.
        steps: Optimisation steps of the whole training.
        scorers: What is to be scored beside the translators.
        store_sha256: Of the store's manifest: scores of another state of the store are not to be compared.
    """

    row: str
    seed: int
    folder: Path
    options: Mapping[str, Any]
    config: Mapping[str, Any]
    steps: int
    scorers: tuple[str, ...]
    store_sha256: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.row}, seed {self.seed}"

    @property
    def teachers(self) -> tuple[str, ...]:
        """Distilled from."""
        return tuple(self.config["data"]["teachers"])

    @property
    def batch(self) -> int:
        """Images per optimisation step."""
        return int(self.config["data"]["batch_size"] * self.config["trainer"]["accumulate_grad_batches"])

    @property
    def config_file(self) -> Path:
        """What ``theia fit`` and ``theia test`` are given."""
        return self.folder / "fit.yaml"

    @property
    def log(self) -> Path:
        """What both said."""
        return self.folder / "log.txt"

    @property
    def failed(self) -> Path:
        """Holds the exit status of the command that failed, until the run is tried again."""
        return self.folder / "failed"

    @property
    def trained(self) -> Path:
        """A mark that training came to its end."""
        return self.folder / "trained"

    @property
    def running(self) -> bool:
        """Whether a process is at work on it, here or on another machine that shares the folder."""
        if not self.lock.exists():
            return False
        with lock(self.lock) as held:
            return held is None

    @property
    def lock(self) -> Path:
        """Held by whoever works on it."""
        return self.folder / ".lock"

    @property
    def finished(self) -> bool:
        """Whether all scores are there."""
        report = self.report
        return report is not None and set(self.scorers) <= set(report["scorers"])

    @property
    def report(self) -> dict[str, Any] | None:
        """What ``theia test`` wrote, if it is of the store as it is; it may lack the scores of a scorer."""
        try:
            report = json.loads((self.folder / f"test_{CHECKPOINT}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(report, dict) and {"after", "scores", "scorers", "store"} <= report.keys()
        return report if whole and report["store"]["manifest_sha256"] == self.store_sha256 else None

    def prepare(self) -> None:
        """Writes the config."""
        write_whole(self.config_file, yaml.safe_dump(dict(self.config), sort_keys=False))

    def progress(self) -> tuple[int, float | None]:
        """Optimisation steps so far and the last training loss that was logged."""
        if self.trained.exists():
            return self.steps, None
        step, loss = 0, None
        for row in _rows(self.folder / "metrics.csv", _TAIL_BYTES):
            step = max(step, int(_number(row, "step") or 0) + 1)
            loss = _number(row, "train/loss") or loss
        return min(step, self.steps), loss

    def environment(self) -> dict[str, Any]:
        """What the training ran with; empty if that is lost."""
        try:
            found = json.loads((self.folder / "environment.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def last_lines(self, count: int = 15) -> str:
        """The end of the log."""
        if not self.log.exists():
            return ""
        return "\n".join(_tail(self.log, _TAIL_BYTES)[-count:])

    def speed(self) -> dict[str, float]:
        """Images per second, the median of what was logged, and hours of the devices together for the whole run."""
        rates = [rate for row in _rows(self.folder / "metrics.csv") if (rate := _number(row, "train/images_per_s"))]
        if not rates:
            return {}
        rate = sorted(rates)[len(rates) // 2]
        processes = self.environment().get("processes", 1)
        return {"images_per_s": rate, "device_hours": processes * self.steps * self.batch / rate / 3600}

    def check(self) -> None:
        """Sees that the folder is of this very run, if it is there.

        Raises:
            ConfigError: If it holds a run with other options.
        """
        if not (self.folder / "checkpoints").exists() and not self.trained.exists():
            return  # nothing was trained
        # A training by hand has only what 'theia fit' wrote.
        path = self.config_file if self.config_file.exists() else self.folder / "config.yaml"
        try:
            content = older.config(yaml.safe_load(path.read_text()) or {})
            there, here = _comparable(content), _comparable(self.config)
        except (OSError, AttributeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__}), so nobody knows what was trained there. Remove that "
                f"folder, or restore the file."
            ) from error
        # What an earlier version did not know had its default.
        different = [name for name in here if name in there and there[name] != here[name]]
        if different:
            lines = "; ".join(f"{name} was {there.get(name)!r}, is {here.get(name)!r}" for name in different[:4])
            raise ConfigError(
                f"{self.folder} holds a run of {self.name} with other options: {lines}. Choose another --out, or "
                "remove that folder."
            )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options that make a training what it is, flat."""
    found = {name: value for name, value in flat(config).items() if name not in _HARMLESS}
    return {**found, "data.store": str(Path(found["data.store"]).resolve())} if "data.store" in found else found


def _rows(path: Path, tail_bytes: int | None = None) -> list[dict[str, str]]:
    """Rows of a CSV file, or those of its end: a long run's file is not read as a whole every second."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        header = file.readline()
    lines = _tail(path, tail_bytes)
    # The first line is the header, or a row that the tail cuts through.
    return list(csv.DictReader(lines[1:], next(csv.reader([header]), [])))


def _tail(path: Path, count: int | None) -> list[str]:
    with path.open("rb") as file:
        if count is not None:
            file.seek(max(0, path.stat().st_size - count))
        return file.read().decode(errors="replace").splitlines()


def _number(row: Mapping[str, str], column: str) -> float | None:
    try:
        return float(row.get(column) or "")
    except ValueError:
        return None


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
def hold(folder: Path) -> Iterator[None]:
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


def earlier_record(folder: Path) -> Record:
    """What is in a folder already; an empty record if there is nothing, or nothing that can be read."""
    if not (folder / _FILE).exists():
        return Record()
    try:
        return read_record(folder)
    except ConfigError as error:
        logger.warning("%s It is written anew, without rows that are not asked for now.", error)
        return Record()


def write_record(
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
    check_runs(runs)
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


def check_runs(runs: Sequence[Run]) -> None:
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


def read_record(folder: Path) -> Record:
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
        config = older.config(yaml.safe_load(path.read_text()))
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


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[int | None]:
    """Holds a file for one process, and for those of its children that are given the descriptor.

    Args:
        path: Of the file, which stays.
        wait: Until whoever holds it lets go.

    Yields:
        The descriptor, or ``None`` if somebody else holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be locked ({error.strerror}): the file system has no locks. Choose another folder."
            ) from error
        else:
            yield descriptor
    finally:
        os.close(descriptor)
