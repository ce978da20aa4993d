"""The run folder: its content, when it may be used, and how a run is resumed."""

import json
import logging
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from theia.cli.options import Change
from theia.errors import ConfigError
from theia.training.checkpoints import LAST
from theia.training.records import METRICS
from theia.utils.arguments import check_number
from theia.utils.files import write_whole
from theia.utils.provenance import git_commit, installed

logger = logging.getLogger(__name__)

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
_VERSIONS = (
    "theia", "torch", "lightning", "timm", "transformers", "segment-anything", "jsonargparse", "h5py", "torchmetrics",
    "numpy",
)  # fmt: skip

# Smallest allowed values of Lightning's numbers, which it does not check, or refuses only deep in its own code.
_LEAST = {
    "num_nodes": 1, "fast_dev_run": 0, "max_epochs": -1, "min_epochs": 1, "max_steps": -1, "min_steps": 1,
    "check_val_every_n_epoch": 1, "num_sanity_val_steps": -1, "log_every_n_steps": 1, "accumulate_grad_batches": 1,
    "gradient_clip_val": 0, "reload_dataloaders_every_n_epochs": 0,
}  # fmt: skip
# An integer is a number of batches, any other number is a share of them.
_SHARES = {
    "limit_train_batches": 1, "limit_val_batches": 0, "limit_test_batches": 1, "limit_predict_batches": 0,
    "overfit_batches": 0, "val_check_interval": 1,
}  # fmt: skip
_LARGEST_SEED = 2**32 - 1


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


def check_trainer(options: Namespace) -> None:
    """Refuses options of the run that would fail only after work has begun.

    Args:
        options: Options of one command.

    Raises:
        ConfigError: If an option is refused. The message names it.
    """
    check_number("checkpoint_every", options.checkpoint_every, 1)
    check_number("scorer_images", options.scorer_images, 1)
    check_number("seed_everything", options.seed_everything, 0, _LARGEST_SEED)
    trainer = options.trainer
    for name, least in _LEAST.items():
        check_number(f"trainer.{name}", trainer[name], least)
    for name in ("max_epochs", "max_steps"):
        if trainer[name] == 0:
            raise ConfigError(f"trainer.{name} is 0: nothing would be trained. Give -1 for no limit, or at least 1.")
    for name, least in _SHARES.items():
        value = trainer[name]
        if isinstance(value, float):
            check_number(f"trainer.{name}", value, 0, 1, above=least > 0)
        elif isinstance(value, int):
            check_number(f"trainer.{name}", value, least)
    try:
        Timer(duration=trainer.max_time)
    except MisconfigurationException as error:
        raise ConfigError(
            f"trainer.max_time is {trainer.max_time!r}; write days, hours, minutes and seconds as DD:HH:MM:SS."
        ) from error
    endless = trainer.max_epochs == -1 or (trainer.max_epochs is None and trainer.max_time is not None)
    if endless and trainer.max_steps == -1:
        raise ConfigError("The warm-up is a share of all steps. Set trainer.max_epochs or trainer.max_steps.")
    if str(trainer.precision) in ("16-true", "bf16-true"):
        raise ConfigError(
            f"trainer.precision is {trainer.precision}: features and their statistics would lose too much. "
            f"Use {str(trainer.precision).replace('true', 'mixed')}."
        )


def check_left(trainer: Namespace, checkpoint: Mapping[str, Any]) -> None:
    """Refuses to resume a run for a shorter training than it has done.

    Args:
        trainer: Options of the trainer.
        checkpoint: Content of the checkpoint that the run goes on from.

    Raises:
        ConfigError: If the training would be shorter. The message names the option.
    """
    steps = checkpoint["global_step"]
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"]
    for name, done, what in (("max_epochs", epochs, "epochs begun or done"), ("max_steps", steps, "steps taken")):
        most = trainer[name]
        if most not in (None, -1) and most < done:
            raise ConfigError(
                f"trainer.{name} is {most}, but the checkpoint has {done} {what}. Raise it to train on, or score what "
                "there is with 'theia test'."
            )


def check_processes(trainer: Trainer) -> None:
    """Refuses a launcher that started more processes than the trainer knows of, as each would train on its own.

    Raises:
        ConfigError: If there are more. The message names the options that must agree.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched not in (1, trainer.world_size):
        raise ConfigError(
            f"The launcher started {launched} processes, but the trainer expects {trainer.world_size}. Set "
            "trainer.devices to the processes per node and trainer.num_nodes to the nodes."
        )


def check_unused(run: Path) -> None:
    """Refuses to start a run in the folder of another run.

    Raises:
        ConfigError: If a run was started there.
    """
    if any((run / name).exists() for name in (CONFIG, METRICS, checkpoints(run).name)):
        raise ConfigError(
            f"{run} holds a run already. Resume it with --ckpt_path last, or start another with --run_folder FOLDER."
        )


def check_newest(checkpoint: Path, steps: int, run: Path, newest: int | None) -> None:
    """Refuses to lose steps of a run by going on from one of its earlier checkpoints.

    Args:
        checkpoint: Path of the checkpoint to go on from.
        steps: Number of steps that this checkpoint has taken.
        run: Path of the run folder.
        newest: Number of steps that the run's ``last.ckpt`` has taken; ``None`` if it is missing or damaged.

    Raises:
        ConfigError: If steps would be lost. The message says how to go on.
    """
    if newest is not None and newest > steps:
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
        started_from = self._started_from or _read(path).get("started_from")
        if started_from:
            environment["started_from"] = dict(started_from)
        changes = [change._asdict() for change in self._changes]
        if self._resumed_at:
            changes = _with_changes(path, environment, changes, self._resumed_at)
        if changes:
            environment["changes"] = changes
        config = self.config.clone()
        config.ckpt_path = None  # belongs to this start, not to the run
        # With options that are None. Their parameter has one name before jsonargparse 4.49, another since.
        write_whole(run / CONFIG, self.parser.dump(config, "yaml", False))
        write_whole(path, json.dumps(environment, indent=2) + "\n")


def _with_changes(
    path: Path, environment: Mapping[str, Any], changes: list[dict[str, Any]], step: int
) -> list[dict[str, Any]]:
    """All changes since the run began: known ones, and differences between the last environment and this one."""
    before = _read(path)
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


def _read(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if f"{prefix}{name}" != "changes":
            flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
