"""One run of a sweep: its folder, how far it is, and what is left of it to do."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from theia.ablation.grid import flat
from theia.ablation.lock import lock
from theia.errors import ConfigError
from theia.utils.files import write_whole

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
            content = yaml.safe_load(path.read_text()) or {}
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
