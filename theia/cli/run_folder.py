"""The run folder: its content, when it may be used, and how a run is resumed."""

import json
import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from theia.cli.options import Change
from theia.errors import CheckpointError, ConfigError
from theia.models.checkpoint import read_checkpoint
from theia.training.checkpoints import LAST
from theia.training.records import METRICS
from theia.utils.files import read_json, write_whole
from theia.utils.provenance import git_commit, installed

logger = logging.getLogger(__name__)

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
_VERSIONS = (
    "theia", "torch", "lightning", "timm", "transformers", "segment-anything", "jsonargparse", "h5py", "torchmetrics",
    "numpy",
)  # fmt: skip


def checkpoints(run: Path) -> Path:
    """Folder of a run's checkpoints: ``last.ckpt``, from which the run resumes, and ``best.ckpt``."""
    return run / "checkpoints"


def run_of(checkpoint: Path, otherwise: Path) -> Path:
    """Run folder that a checkpoint lies in, or ``otherwise`` if it lies in none."""
    parent = checkpoint.absolute().parent
    if parent.name != "checkpoints" or parent.parent == otherwise.absolute():
        return otherwise
    return parent.parent


def moved_run(configs: Sequence[Any]) -> Path | None:
    """Run folder of the last config file, if that is the ``config.yaml`` of a run; else ``None``."""
    if not configs:
        return None
    path = Path(str(configs[-1]))
    return path.parent if path.name == CONFIG and checkpoints(path.parent).is_dir() else None


def resolve_checkpoint(ckpt_path: str, run: Path, starting: bool) -> Path | None:
    """Finds the path behind ``--ckpt_path``, where ``last`` and ``best`` mean the checkpoints of the run folder.

    Args:
        ckpt_path: Path of a checkpoint, or one of the two words.
        run: Path of the run folder.
        starting: Whether ``last`` may be missing, so that one command can start and resume a run.

    Returns:
        The path; ``None`` for a ``last`` that is missing and may be.

    Raises:
        ConfigError: If the run has a checkpoint of another kind, from which it does not go on by itself.
    """
    if ckpt_path not in ("last", "best"):
        return Path(ckpt_path)
    path = checkpoints(run) / f"{ckpt_path}.ckpt"
    if starting and ckpt_path == "last" and not path.is_file():
        # Also checkpoints of Lightning's own, which an earlier version let it write under SLURM.
        there = [*checkpoints(run).glob("*.ckpt"), *run.glob("hpc_ckpt_*.ckpt")]
        if there:
            newest = max(there, key=lambda other: other.stat().st_mtime)
            raise ConfigError(
                f"There is no {LAST} in {checkpoints(run)}, but {newest}. Go on from it with --ckpt_path "
                f"{shlex.quote(str(newest))}, or start another run with --run_folder FOLDER."
            )
        logger.warning("No checkpoint in %s yet: training starts from the beginning.", checkpoints(run))
        return None
    return path


def check_unused(run: Path) -> None:
    """Refuses to start a run in the folder of another run.

    Raises:
        ConfigError: If a run was started there.
    """
    if any((run / name).exists() for name in (CONFIG, METRICS, checkpoints(run).name)):
        raise ConfigError(
            f"{run} holds a run already. Resume it with --ckpt_path last, or start another with --run_folder FOLDER."
        )


def check_newest(checkpoint: Path, steps: int, run: Path) -> None:
    """Refuses to lose steps of a run by going on from one of its earlier checkpoints.

    Args:
        checkpoint: Path of the checkpoint to go on from.
        steps: Number of steps that this checkpoint has taken.
        run: Path of the run folder.

    Raises:
        ConfigError: If steps would be lost. The message says how to go on.
    """
    try:
        newest = int(read_checkpoint(checkpoints(run) / LAST, mmap=True)["global_step"])
    except CheckpointError:
        return  # missing or damaged, so there is nothing to lose
    if newest > steps:
        raise ConfigError(
            f"{checkpoint} is of step {steps}, but {checkpoints(run) / LAST} of step {newest}: the steps between would "
            "be lost. Go on with --ckpt_path last, or branch off into another folder with --run_folder FOLDER."
        )


class SaveRun(SaveConfigCallback):
    """Writes ``config.yaml`` (resolved) and ``environment.json`` when training starts or goes on.

    Args:
        parser: Parser of the command.
        config: Parsed options of the command.
        resumed_at: Number of optimisation steps that the run took before this start.
        changes: Options with another value from there on, after those of earlier resumptions.
        started_from: For a branch of another run: name, sha256 and step of the checkpoint that it began with.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        resumed_at: int = 0,
        changes: Sequence[Change] = (),
        started_from: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(parser, config, save_to_log_dir=False)  # Lightning would not write the file atomically
        self._resumed_at, self._changes, self._started_from = resumed_at, list(changes), started_from

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes both files, each whole or not at all."""
        run = Path(trainer.default_root_dir)
        datamodule = getattr(trainer, "datamodule", None)
        environment: dict[str, Any] = {
            "versions": installed(_VERSIONS),
            "python": platform.python_version(),
            "git_commit": git_commit(),
            "device": str(trainer.strategy.root_device),
            "processes": trainer.world_size,
            "precision": trainer.precision,
            "store": datamodule.provenance() if datamodule else None,
            "images": datamodule.trained_on if datamodule else None,
        }
        path = run / ENVIRONMENT
        started_from = self._started_from or read_json(path).get("started_from")
        if started_from:
            environment["started_from"] = dict(started_from)
        changes = [change._asdict() for change in self._changes]
        if self._resumed_at:
            changes = _with_changes(path, environment, changes, self._resumed_at)
        if changes:
            environment["changes"] = changes
        config = self.config.clone()
        config.ckpt_path = None  # belongs to this start, not to the run
        write_whole(run / CONFIG, self.parser.dump(config, "yaml", skip_unset=False))
        write_whole(path, json.dumps(environment, indent=2) + "\n")


def _with_changes(
    path: Path, environment: Mapping[str, Any], changes: list[dict[str, Any]], step: int
) -> list[dict[str, Any]]:
    """All changes since the run began: known ones, and differences between the last environment and this one."""
    before = read_json(path)
    if not before:
        return changes  # the run was moved without that file
    said = before.get("changes", [])
    kept = [change for change in said if change["step"] < step and change not in changes]
    then, now = _flat(before), _flat(environment)
    # A change whose steps were all lost has never taken effect.
    for change in reversed(said):
        if change["step"] >= step and change["option"] in now:
            then[change["option"]] = change["old"]
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            change = Change(step, name, then.get(name), now.get(name))
            logger.warning("From step %d on, %s is %s; until then it was %s.", step, name, change.new, change.old)
            kept.append(change._asdict())
    return sorted([*changes, *kept], key=lambda change: int(change["step"]))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if f"{prefix}{name}" != "changes":
            flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
