"""The run folder: what is in it, when it may be used, and how a run is resumed."""

import importlib.metadata
import json
import logging
import platform
import subprocess
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.fabric.loggers.csv_logs import _ExperimentWriter as FabricExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from theia.errors import CheckpointError, ConfigError

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
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == "checkpoints" else otherwise


def resolve_checkpoint(ckpt_path: str, run: Path) -> Path | None:
    """Path behind ``--ckpt_path``, where ``last`` and ``best`` stand for those of the run folder.

    Args:
        ckpt_path: A file, or one of the two words.
        run: Run folder.

    Returns:
        The file; ``None`` for ``last`` before the run's first checkpoint, so that one command can start and resume.

    Raises:
        CheckpointError: If there is no such file.
    """
    path = checkpoints(run) / f"{ckpt_path}.ckpt" if ckpt_path in ("last", "best") else Path(ckpt_path)
    if path.is_file():
        return path
    if ckpt_path == "last":
        logger.warning("No checkpoint in %s yet: training starts from the beginning.", checkpoints(run))
        return None
    there = ", ".join(str(other) for other in sorted(path.parent.glob("*.ckpt"))) or "no checkpoint"
    raise CheckpointError(f"No checkpoint at {path}. In that folder: {there}.")


def check_unused(run: Path) -> None:
    """Refuses to start a new run in the folder of another.

    Raises:
        ConfigError: If a run was started there.
    """
    if (run / "config.yaml").exists() or checkpoints(run).exists():
        raise ConfigError(
            f"{run} holds a run already. Resume it with --ckpt_path last, or start another with --run FOLDER."
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
        }
        path = Path(trainer.default_root_dir) / "environment.json"
        path.write_text(json.dumps(environment, indent=2) + "\n")


class MetricsCSV(CSVLogger):
    """Lightning's CSV logger, but a resumed run goes on in the same ``metrics.csv`` instead of deleting it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> FabricExperimentWriter:
        """The writer, made on first use."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        # Lightning deletes the file here.
        path = Path(self.metrics_file_path)
        if path.is_file():
            header = path.read_text().partition("\n")[0]
            self.metrics_keys = header.strip().split(",")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout that this code runs from, with a mark if it was changed; none for an installed wheel."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
