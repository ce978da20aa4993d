"""Options of the trainer and of a run that Lightning would not refuse, or only after work has begun."""

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.modules.batchnorm import _NormBase

from theia.cli.options import recorded
from theia.errors import ConfigError
from theia.training.distillation import COURSE
from theia.training.optim import Course
from theia.utils.arguments import check_number
from theia.utils.device import cores_of_process, has_bfloat16_cpu

logger = logging.getLogger(__name__)

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
_EPOCHS = 1000  # Lightning's number, if none is given
_LARGEST_SEED = 2**32 - 1
_FLOAT32 = "32-true"


def check_trainer(options: Namespace) -> None:
    """Refuses options of the run that would fail only after work has begun.

    Args:
        options: Options of one command.

    Raises:
        ConfigError: If an option is refused. The message names it.
    """
    check_number("checkpoint_every", options.checkpoint_every, 1)
    check_number("checkpoint_minutes", options.checkpoint_minutes, 0, above=True)
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


def choose_precision(trainer: Namespace, checkpoint: Mapping[str, Any]) -> str | None:
    """The precision of a training for which none is given.

    A run that goes on keeps its precision, on any machine. A new one takes bfloat16 if it trains on a CPU that has
    instructions for it, else float32.

    Args:
        trainer: Options of the trainer.
        checkpoint: Content of the checkpoint that the run goes on from; empty for a new run.

    Returns:
        Value for ``trainer.precision``; ``None`` beside plugins, as one may bring a precision of its own.
    """
    if trainer.precision is not None or trainer.plugins:
        return trainer.precision  # type: ignore[no-any-return]
    if checkpoint:
        return str(recorded(checkpoint).get("trainer.precision", _FLOAT32))
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.accelerator.is_available())
    if not on_cpu or not has_bfloat16_cpu():
        return _FLOAT32
    logger.info(
        "Training in bfloat16 (trainer.precision: bf16-mixed), for which this CPU has instructions. For float32: "
        "--trainer.precision 32-true"
    )
    return "bf16-mixed"


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


def check_course(trainer: Namespace, checkpoint: Mapping[str, Any]) -> None:
    """Refuses to resume a run for another number of steps if its learning rate would jump.

    Args:
        trainer: Options of the trainer.
        checkpoint: Content of the checkpoint that the run goes on from.

    Raises:
        ConfigError: If the rate would jump. The message says what is possible.
    """
    if COURSE not in checkpoint:
        return  # after the warm-up, a constant rate does not depend on the number of steps
    then, options, step = checkpoint[COURSE], checkpoint["hyper_parameters"], checkpoint["global_step"]
    most_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    epochs = _EPOCHS if trainer.max_epochs is None and trainer.max_steps == -1 else trainer.max_epochs
    most_epochs = math.inf if epochs in (None, -1) else epochs
    planned = int(min(most_steps, most_epochs * then["steps_per_epoch"]))
    old, new = (
        Course(options["schedule"], steps, round(options["warmup"] * steps)) for steps in (then["steps"], planned)
    )
    if old.share(step) == new.share(step):
        return
    possible = (
        "A cosine needs the number from its first step on"
        if old.schedule == "cosine"
        else "With wsd, the number may change while the rate is full: after the warm-up and before the last fifth of "
        "the steps, by the old number and by the new one"
    )
    raise ConfigError(
        f"trainer.max_epochs and trainer.max_steps now mean {planned} steps, but the learning rate (model.schedule "
        f"{old.schedule}) was planned for {old.steps}: after step {step} it would jump from {old.share(step):.2%} to "
        f"{new.share(step):.2%} of its full value. {possible}. Resume the run with its own number, or start another "
        "with --run_folder FOLDER and without --ckpt_path."
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


def set_up_processes(trainer: Trainer, model: LightningModule, every_parameter: bool = True) -> None:
    """Sets how several processes train together; what was given with a strategy of one's own stays as it is.

    Gradients become views of the buckets in which processes sum them, which saves a copy of them. Buffers are sent
    around before every step only if training changes them, as batch norms do: statistics of features never change.
    Parameters that a step does without are looked for only if there are any; they then have no gradient, and the
    optimiser leaves them alone, as in one process. And all processes of a node together start as many compiler
    processes as the node has cores. The graph is not declared static: that gains nothing where every parameter is used,
    and does not go together with a compiled step (https://github.com/pytorch/pytorch/issues/93672).

    Args:
        trainer: Trainer that is to train the model.
        model: Model that is to be trained.
        every_parameter: Whether each step uses every parameter.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    changed = any(isinstance(part, _NormBase) and part.track_running_stats for part in model.modules())
    # The strategy cannot be built with these options, as it is there before the model.
    strategy._ddp_kwargs = {
        "broadcast_buffers": changed,
        "gradient_as_bucket_view": True,
        **({} if every_parameter else {"find_unused_parameters": True}),
        **strategy._ddp_kwargs,
    }
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        import torch._inductor.config as inductor

        share = cores_of_process(trainer.num_devices)
        inductor.compile_threads = min(inductor.compile_threads or 1, share)
