"""What a run writes down step by step, ``metrics.csv`` and TensorBoard's events, and how a resumed run goes on in both.

A checkpoint of ``n`` steps belongs to the rows of the steps ``0 .. n - 1``. Every row is on the disk before the
checkpoint that follows it, and a resumed run first cuts away the rows of steps that it will take again. So both hold
each step once, wherever a run was killed.
"""

import csv
import io
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
    """Records that write each row once: the row of a checkpoint's step is handed over before it, and again after it."""

    _last_row = ""

    def _is_new(self, metrics: Mapping[str, Any], step: int | None) -> bool:
        row = repr((step, dict(metrics)))
        if row == self._last_row:
            return False
        self._last_row = row
        return True


class MetricsCSV(Rows, Logger):
    """Writes ``metrics.csv``, a line at once, and goes on in it when a run is resumed.

    Lightning's own logger rewrites the whole file in place when a column is added, and deletes it on resuming.

    Args:
        run: Run folder.
        resumed_at: Optimisation steps already taken; rows of later ones are dropped. ``None`` for a new run.

    Raises:
        FileError: On the first row and later, if it cannot be written.
    """

    def __init__(self, run: str | Path, resumed_at: int | None = None) -> None:
        super().__init__()
        self.path = Path(run) / METRICS
        self._resumed_at = resumed_at
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """None: the folder is the run's."""
        return ""

    @property
    def version(self) -> str:
        """None, likewise."""
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
        row = {**metrics, "step": step}
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
        """They stand in ``config.yaml``."""

    @rank_zero_only
    def save(self) -> None:
        """Every row is written at once."""

    @rank_zero_only
    def sync(self) -> None:
        """Waits until all rows are on the disk, and those of steps that are taken again are gone."""
        self._cut()
        with writing(self.path, again=RESUME):
            if self.path.exists():
                sync(self.path)

    def _cut(self) -> None:
        if self._resumed_at is not None:
            self._columns = cut_rows(self.path, self._resumed_at)
            self._resumed_at = None


class Events(Rows, TensorBoardLogger):
    """TensorBoard's events, right in the run folder; a resumed run cuts away those of steps that it will take again.

    Args:
        run: Run folder.
        resumed_at: Optimisation steps already taken; events of later ones are dropped. ``None`` for a new run.
    """

    def __init__(self, run: str | Path, resumed_at: int | None = None) -> None:
        super().__init__(run, name="", version="", default_hp_metric=False)
        self._resumed_at = resumed_at

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made on first use."""
        if self._experiment is None and self._resumed_at is not None:
            cut_events(Path(self.log_dir), self._resumed_at)
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """See Lightning."""
        if self._is_new(metrics, step):
            super().log_metrics(dict(metrics), step)

    @rank_zero_only
    def save(self) -> None:
        """Brings out what waits; without Lightning's ``hparams.yaml``, whose content stands in ``config.yaml``."""
        self.experiment.flush()


def cut_rows(path: Path, steps: int) -> list[str]:
    """Cuts ``metrics.csv`` back to its whole rows of the first steps.

    Args:
        path: The file; it may be missing.
        steps: How many steps to keep.

    Returns:
        Its columns.
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
        folder: The run folder; what lies deeper is left alone.
        steps: How many steps to keep.
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
    """Whole rows: a line that a kill or a full disk cut short is none."""
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
