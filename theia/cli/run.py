"""The run folder: what is in it, when it may be used, and how a run is resumed."""

import csv
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from pathlib import Path

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.fabric.loggers.csv_logs import _ExperimentWriter as FabricExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from theia.errors import ConfigError

logger = logging.getLogger(__name__)

_VERSIONS = (
    "theia", "torch", "lightning", "timm", "transformers", "segment-anything", "jsonargparse", "h5py", "torchmetrics",
    "numpy",
)  # fmt: skip


def checkpoints(run: Path) -> Path:
    """Folder of a run's checkpoints: ``last.ckpt``, from which it resumes, and ``best.ckpt``."""
    return run / "checkpoints"


def run_of(checkpoint: Path, otherwise: Path) -> Path:
    """Run folder that a checkpoint lies in; ``otherwise`` if it lies in none."""
    parent = checkpoint.absolute().parent
    if parent.name != "checkpoints" or parent.parent == otherwise.absolute():
        return otherwise
    return parent.parent


def resolve_checkpoint(ckpt_path: str, run: Path, starting: bool) -> Path | None:
    """Path behind ``--ckpt_path``, where ``last`` and ``best`` stand for those of the run folder.

    Args:
        ckpt_path: A file, or one of the two words.
        run: Run folder.
        starting: Whether ``last`` may be missing, so that one command can start and resume a run.

    Returns:
        The path; ``None`` for a ``last`` that may be missing and is.
    """
    if ckpt_path not in ("last", "best"):
        return Path(ckpt_path)
    path = checkpoints(run) / f"{ckpt_path}.ckpt"
    if starting and ckpt_path == "last" and not path.is_file():
        logger.warning("No checkpoint in %s yet: training starts from the beginning.", checkpoints(run))
        return None
    return path


def check_trainer(options: Namespace) -> None:
    """Refuses options of the run that would fail only after work has begun.

    Args:
        options: Of one command.

    Raises:
        ConfigError: Names the option.
    """
    if options.checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every is {options.checkpoint_every}; it must be at least 1.")
    if options.scorer_images < 1:
        raise ConfigError(f"scorer_images is {options.scorer_images}; it must be at least 1.")
    trainer = options.trainer
    endless = trainer.max_epochs == -1 or (trainer.max_epochs is None and trainer.max_time is not None)
    if endless and trainer.max_steps == -1:
        raise ConfigError("The warm-up is a share of all steps. Set trainer.max_epochs or trainer.max_steps.")
    if str(trainer.precision) in ("16-true", "bf16-true"):
        raise ConfigError(
            f"trainer.precision is {trainer.precision}: features and their statistics would lose too much. "
            f"Use {str(trainer.precision).replace('true', 'mixed')}."
        )


def check_processes(trainer: Trainer) -> None:
    """Refuses a launcher that started more processes than the trainer knows of: each would train on its own.

    Raises:
        ConfigError: Names the options that must agree.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched not in (1, trainer.world_size):
        raise ConfigError(
            f"The launcher started {launched} processes, but the trainer expects {trainer.world_size}. Set "
            "trainer.devices to the processes per node and trainer.num_nodes to the nodes."
        )


def check_unused(run: Path) -> None:
    """Refuses to start a run in the folder of another.

    Raises:
        ConfigError: If a run was started there.
    """
    if (run / "config.yaml").exists() or checkpoints(run).exists():
        raise ConfigError(
            f"{run} holds a run already. Resume it with --ckpt_path last, or start another with --run_folder FOLDER."
        )


class SaveRun(SaveConfigCallback):
    """Writes ``config.yaml`` (resolved) and ``environment.json`` when training starts."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the environment beside the config."""
        datamodule = getattr(trainer, "datamodule", None)
        environment = {
            "versions": {name: _version(name) for name in _VERSIONS},
            "python": platform.python_version(),
            "git_commit": _git_commit(),
            "device": str(trainer.strategy.root_device),
            "processes": trainer.world_size,
            "precision": trainer.precision,
            "store": datamodule.provenance() if datamodule else None,
            "images": datamodule.trained_on if datamodule else None,
        }
        path = Path(trainer.default_root_dir) / "environment.json"
        path.write_text(json.dumps(environment, indent=2) + "\n")


class MetricsCSV(CSVLogger):
    """Lightning's CSV logger, but a resumed run goes on in the same ``metrics.csv`` instead of deleting it.

    Args:
        run: Run folder.
        resumed_at: Optimisation steps already taken; later rows, of steps that will be taken again, are dropped.
    """

    def __init__(self, run: Path, resumed_at: int) -> None:
        super().__init__(run, name="", version="")
        self._resumed_at = resumed_at

    @property
    @rank_zero_experiment
    def experiment(self) -> FabricExperimentWriter:
        """The writer, made on first use."""
        if self._experiment is None:
            columns = _keep_rows(Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE, self._resumed_at)
            self._experiment = _AppendingWriter(self.log_dir)
            self._experiment.metrics_keys = columns
        return self._experiment


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Lightning deletes the file here."""


def _keep_rows(path: Path, steps: int) -> list[str]:
    """Cuts a CSV file back to its whole rows of the first steps, and gives its columns."""
    if not path.is_file() or not path.stat().st_size:
        path.unlink(missing_ok=True)
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        # A row that a kill cut short lacks values; its step may be cut too.
        rows = [row for row in reader if None not in row.values() and int(row["step"]) < steps]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
    return columns


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout that this code runs from, with a mark if it was changed; none for an installed wheel."""
    here = Path(__file__)
    try:
        _git(here, "ls-files", "--error-unmatch", here.name)  # a wheel may lie inside somebody else's checkout
        return _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(file: Path, *arguments: str) -> str:
    command = ["git", "-C", str(file.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
