"""One run of a sweep in its folder: what it trains, how far it is, and who works on it."""

import csv
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from theia.ablation.grid import flat
from theia.errors import ConfigError
from theia.models import older
from theia.utils.files import read_json, write_whole

# The checkpoint that is scored: choosing one by held-out images would spoil what is compared on them.
CHECKPOINT = "last"

_TAIL_BYTES = 1 << 16

# Options that do not change what is trained, only where it goes, how often it is logged, and how data are read.
_HARMLESS = frozenset({
    "run_folder", "ckpt_path", "checkpoint_every", "compare_untrained", "scorers", "scorer_images", "data.workers",
    "data.val_batch_size", "trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.log_every_n_steps", "trainer.logger", "trainer.callbacks",
})  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training and its test: a row with one seed.

    Attributes:
        row: Name of the row.
        seed: Seed of the training.
        folder: Run folder.
        options: Dotted options in which the row differs from the base config.
        config: All options of ``theia fit``, resolved.
        steps: Optimisation steps of the whole training.
        scorers: Names of the scorers to run beyond the student's own translators.
        store_sha256: Digest of the store's manifest; scores on another state of the store are not comparable.
        scorer_data: By scorer, fingerprint of its own data, for those that have some: the same holds for them.
    """

    row: str
    seed: int
    folder: Path
    options: Mapping[str, Any]
    config: Mapping[str, Any]
    steps: int
    scorers: tuple[str, ...]
    store_sha256: str
    scorer_data: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Row and seed, as messages name the run."""
        return f"{self.row}, seed {self.seed}"

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers that the student is distilled from."""
        return tuple(self.config["data"]["teachers"])

    @property
    def batch(self) -> int:
        """Images per optimisation step."""
        return int(self.config["data"]["batch_size"] * self.config["trainer"]["accumulate_grad_batches"])

    @property
    def config_file(self) -> Path:
        """The config for ``theia fit`` and ``theia test``."""
        return self.folder / "fit.yaml"

    @property
    def log(self) -> Path:
        """The output of both commands."""
        return self.folder / "log.txt"

    @property
    def failed(self) -> Path:
        """Holds the exit status of the command that failed, until the run is tried again."""
        return self.folder / "failed"

    @property
    def trained(self) -> Path:
        """An empty file that says that training is complete."""
        return self.folder / "trained"

    @property
    def lock(self) -> Path:
        """A file that whoever works on the run holds with :func:`lock`."""
        return self.folder / ".lock"

    @property
    def running(self) -> bool:
        """Whether a process works on the run, on this machine or on another that shares the folder."""
        if not self.lock.exists():
            return False
        with lock(self.lock) as held:
            return held is None

    @property
    def report(self) -> dict[str, Any] | None:
        """What ``theia test`` wrote, if the store is still the same; scores of some scorers may be missing."""
        try:
            report = json.loads((self.folder / f"test_{CHECKPOINT}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        whole = isinstance(report, dict) and {"after", "scores", "scorers", "store"} <= report.keys()
        return report if whole and report["store"]["manifest_sha256"] == self.store_sha256 else None

    @property
    def finished(self) -> bool:
        """Whether the run has all its scores, each on the data as they are."""
        report = self.report
        return report is not None and set(self.scorers) <= set(report["scorers"]) and not self.outdated

    @property
    def outdated(self) -> list[str]:
        """Scorers whose own data have changed since the test."""
        report = self.report or {"scorers": []}
        scored_on = report.get("scorer_data", self.scorer_data)  # earlier versions did not write it
        return [
            name for name, fingerprint in self.scorer_data.items()
            if name in report["scorers"] and scored_on.get(name) != fingerprint
        ]  # fmt: skip

    def prepare(self) -> None:
        """Writes the config."""
        write_whole(self.config_file, yaml.safe_dump(dict(self.config), sort_keys=False))

    def progress(self) -> tuple[int, float | None]:
        """Optimisation steps so far, and the training loss that was logged last."""
        if self.trained.exists():
            return self.steps, None
        step, loss = 0, None
        for row in _rows(self.folder / "metrics.csv", _TAIL_BYTES):
            step = max(step, int(_cell(row, "step") or 0) + 1)
            loss = _cell(row, "train/loss") or loss
        return min(step, self.steps), loss

    def speed(self) -> dict[str, float]:
        """Median of the logged images per second, and hours of all devices together for the whole training."""
        rates = [rate for row in _rows(self.folder / "metrics.csv") if (rate := _cell(row, "train/images_per_s"))]
        if not rates:
            return {}
        rate = sorted(rates)[len(rates) // 2]
        processes = self.environment().get("processes", 1)
        return {"images_per_s": rate, "device_hours": processes * self.steps * self.batch / rate / 3600}

    def environment(self) -> dict[str, Any]:
        """Versions and hardware of the training; empty if the file is lost."""
        return read_json(self.folder / "environment.json")

    def last_lines(self, count: int = 15) -> str:
        """The end of the log."""
        if not self.log.exists():
            return ""
        return "\n".join(_tail(self.log, _TAIL_BYTES)[-count:])

    def problem(self) -> str | None:
        """Says what is wrong if the folder holds a training with other options, or with options that cannot be read."""
        if not (self.folder / "checkpoints").exists() and not self.trained.exists():
            return None
        # A folder trained by hand has only what 'theia fit' writes.
        path = self.config_file if self.config_file.exists() else self.folder / "config.yaml"
        try:
            content = older.config(yaml.safe_load(path.read_text()) or {})
            there, here = _comparable(content), _comparable(self.config)
        except (OSError, AttributeError, yaml.YAMLError) as error:
            return (
                f"{path} cannot be read ({type(error).__name__}), so it is unknown what was trained there. Remove that "
                "folder, or restore the file."
            )
        # An option that the earlier version did not have had its default.
        different = [name for name in here if name in there and there[name] != here[name]]
        if not different:
            return None
        lines = "; ".join(f"{name} was {there.get(name)!r}, is {here.get(name)!r}" for name in different[:4])
        return (
            f"{self.folder} holds a run of {self.name} with other options: {lines}. Choose another --out, or remove "
            "that folder."
        )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make a training what it is, by dotted name."""
    found = {name: value for name, value in flat(config).items() if name not in _HARMLESS}
    return {**found, "data.store": str(Path(found["data.store"]).resolve())} if "data.store" in found else found


def _rows(path: Path, tail_bytes: int | None = None) -> list[dict[str, str]]:
    """Rows of a CSV file, or only those at its end: the progress looks at the files of long runs every second."""
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


def _cell(row: Mapping[str, str], column: str) -> float | None:
    """A number in a row of metrics; ``None`` for an empty cell, or one that was being written."""
    try:
        return float(row.get(column) or "")
    except ValueError:
        return None


@contextmanager
def lock(path: Path) -> Iterator[int | None]:
    """Holds a lock file for this process, and for those of its children that inherit the descriptor.

    A training inherits it, so that it keeps the lock when the sweep that started it is killed; filelock cannot do that.

    Args:
        path: The lock file, which stays.

    Yields:
        The descriptor, or ``None`` if another process holds the lock.

    Raises:
        ConfigError: If the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
