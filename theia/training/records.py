"""Records that a run writes step by step, ``metrics.csv`` and TensorBoard events, and how a resumed run continues them.

A checkpoint of ``n`` steps belongs to the rows of the steps ``0 .. n - 1``. Every row is on the disk before the
checkpoint that follows it, and a resumed run first removes the rows of steps that it will repeat. So both records hold
each step once, wherever a run was killed.
"""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from theia.utils.files import replacing, sync, write_whole, writing

METRICS = "metrics.csv"
RESUME = "resume with --ckpt_path last"


class Rows:
    """Writes each row once, although the row of a checkpoint's step arrives both before and after the checkpoint.

    What a training step did not measure is not a number, and is left out: a loss that is none ends the training.
    """

    _last_row = ""

    def _is_new(self, metrics: Mapping[str, Any], step: int | None) -> bool:
        row = repr((step, dict(metrics)))
        if row == self._last_row:
            return False
        self._last_row = row
        return True

    @staticmethod
    def _measured(metrics: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if not (name.startswith("train/") and math.isnan(value))}


class MetricsCSV(Rows, Logger):
    """Writes ``metrics.csv`` line by line, without delay, and appends to it when a run is resumed.

    Lightning's own logger rewrites the whole file in place when a column is added, and deletes it on resuming.

    Args:
        run: Run folder.
        resumed_at: Number of optimisation steps already taken; rows of later steps are removed. ``None`` for a new run.

    Raises:
        FileError: When a row is logged, if the file cannot be written.
    """

    def __init__(self, run: str | Path, resumed_at: int | None = None) -> None:
        super().__init__()
        self.path = Path(run) / METRICS
        self._resumed_at = resumed_at
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Empty, because the file lies in the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty, because the file lies in the run folder itself."""
        return ""

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one row, and a column for each new name.

        Args:
            metrics: Values by name.
            step: Number of the optimisation step, from 0.
        """
        if not self._is_new(metrics, step):
            return
        row = {**self._measured(metrics), "step": step}
        self._cut()
        with writing(self.path, again=RESUME):
            if not row.keys() <= set(self._columns):
                earlier = _read(self.path) if self._columns else []
                self._columns = sorted({*self._columns, *row})
                write_whole(self.path, _lines(self._columns, [*earlier, row], header=True), again=RESUME)
                return
            with self.path.open("ab") as file:
                file.write(_lines(self._columns, [row]).encode())

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing, because ``config.yaml`` holds the hyperparameters."""

    @rank_zero_only
    def save(self) -> None:
        """Does nothing, because every row is written without delay."""

    @rank_zero_only
    def sync(self) -> None:
        """Removes the rows of steps that will be repeated, and waits until all others are on the disk."""
        self._cut()
        with writing(self.path, again=RESUME):
            if self.path.exists():
                sync(self.path)

    def _cut(self) -> None:
        if self._resumed_at is not None:
            self._columns = cut_rows(self.path, self._resumed_at)
            self._resumed_at = None


class Events(Rows, TensorBoardLogger):
    """Writes TensorBoard events into the run folder; a resumed run removes the events of steps that it will repeat.

    Args:
        run: Run folder.
        resumed_at: Number of optimisation steps already taken; events of later steps are removed. ``None`` for a new
            run.
    """

    def __init__(self, run: str | Path, resumed_at: int | None = None) -> None:
        super().__init__(run, name="", version="", default_hp_metric=False)
        self._resumed_at = resumed_at

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The event writer, created on first use."""
        if self._experiment is None and self._resumed_at is not None:
            cut_events(Path(self.log_dir), self._resumed_at)
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes the values of one step, unless they are written already."""
        if self._is_new(metrics, step):
            super().log_metrics(self._measured(metrics), step)

    @rank_zero_only
    def save(self) -> None:
        """Flushes events, without writing Lightning's ``hparams.yaml``, whose content is in ``config.yaml``."""
        self.experiment.flush()


def cut_rows(path: Path, steps: int) -> list[str]:
    """Cuts ``metrics.csv`` back to the complete rows of the first steps.

    Args:
        path: Path of ``metrics.csv``, which may be missing.
        steps: Number of steps to keep.

    Returns:
        Names of the file's columns; empty if no row is left.
    """
    if not path.is_file():
        return []
    rows = [row for row in _read(path) if int(row["step"]) < steps]
    if not rows:
        path.unlink()
        return []
    columns = list(rows[0])
    content = _lines(columns, rows, header=True)
    if content.encode() != path.read_bytes():
        write_whole(path, content, again=RESUME)
    return columns


def cut_events(folder: Path, steps: int) -> None:
    """Cuts the event files in a folder back to the first steps.

    Args:
        folder: Run folder; its subfolders are not touched.
        steps: Number of steps to keep.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in sorted(folder.glob("events.out.tfevents.*")):
        records = list(RawEventFileLoader(str(path)).Load())
        events = [Event.FromString(record) for record in records]
        kept = [
            record
            for record, event in zip(records, events, strict=True)
            if not event.HasField("summary") or event.step < steps
        ]
        if len(kept) < len(records):
            with replacing(path, again=RESUME) as temporary, temporary.open("wb") as file:
                writer = RecordWriter(file)
                for record in kept:
                    writer.write(record)


def _read(path: Path) -> list[dict[str, Any]]:
    """Reads the complete rows, without a line that a kill or a full disk cut short."""
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(lines)) if None not in row.values() and None not in row]


def _lines(columns: list[str], rows: list[dict[str, Any]], header: bool = False) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
