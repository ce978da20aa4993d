"""Runs of a sweep for TensorBoard's HPARAMS tab: options and scores side by side."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from theia.ablation.grid import flat
from theia.ablation.summary import Scored
from theia.utils.files import publish, writing

_FOLDER = "hparams"


def write_hparams(folder: Path, scored: Sequence[Scored]) -> None:
    """Writes one entry per run, ``hparams/<row>/<seed>``, in place of all that was there.

    Options that are lists are joined with ``+``. Scores of a row as a whole are shown with each of its runs.

    Args:
        folder: Of the sweep; ``hparams`` in it is this function's alone, for one process at a time.
        scored: Finished runs.

    Raises:
        FileError: If something cannot be written, for instance on a full disk.
    """
    for left in folder.glob(f".{_FOLDER}-*"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    with writing(folder / _FOLDER):
        _replace(folder, scored)


def _replace(folder: Path, scored: Sequence[Scored]) -> None:
    # Written beside it first, so that a kill leaves one of the two whole.
    written = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}-", dir=folder))
    whole = {run.row: run.scores for run in scored if run.seed is None}
    for run in scored:
        if run.seed is not None:
            options = {"row": run.row, "seed": run.seed}
            options |= {name: _plain(value) for name, value in flat(run.options).items()}
            _write(written / run.row / str(run.seed), options, {**whole.get(run.row, {}), **run.scores})
    written.chmod(0o755)
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)
    publish(written, folder / _FOLDER)


def _write(folder: Path, options: Mapping[str, Any], scores: Mapping[str, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    with SummaryWriter(str(folder)) as writer:
        # SummaryWriter.add_hparams would put the entry into a folder of its own below this one.
        for summary in hparams(dict(options), dict(scores)):  # type: ignore[no-untyped-call]
            writer.file_writer.add_summary(summary)
        for name, score in scores.items():
            writer.add_scalar(name, score)


def _plain(value: Any) -> str | bool | int | float:
    """What the tab can show."""
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return value if isinstance(value, (str, bool, int, float)) else str(value)
