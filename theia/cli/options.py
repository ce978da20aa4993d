"""Every option of ``theia fit``, ``validate`` and ``test``: which commands use it, and how a resumed run treats it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import Namespace

from theia.cli.data import CLASS, OPTIONS_OF_CLASS, flat, is_feature_data
from theia.errors import ConfigError
from theia.models.scaler import POWER
from theia.training.checkpoints import Checkpoints
from theia.training.distillation import weights_name
from theia.training.optim import ADAMW, BETAS

# What happens if a run is resumed with another value: "same" is refused; "applied" holds from there on and is written
# down with the step; "free" has no bearing on what is learned.
Resumed = Literal["same", "applied", "free"]


class Option(NamedTuple):
    """What is known about an option.

    Attributes:
        commands: Commands that use the option.
        resumed: How a resumed run treats another value.
    """

    commands: tuple[str, ...]
    resumed: Resumed


_FIT, _TEST, _SCORE = ("fit",), ("test",), ("validate", "test")
_ALL = (*_FIT, *_SCORE)


def _table(commands: tuple[str, ...], resumed: Resumed, part: str, names: str) -> dict[str, Option]:
    return {f"{part}{name}": Option(commands, resumed) for name in names.split()}


OPTIONS: dict[str, Option] = {
    # Options of the student, its translators, and the held-out loss.
    **_table(_ALL, "same", "model.", "backbone backbone_stage registers width depth heads lift wide_last"),
    **_table(_ALL, "same", "model.", "weights translator distill_cls loss cls_loss teacher_weights"),
    **_table(_ALL, "same", "model.", "normalizer normalizer_exponent"),
    **_table(_FIT, "same", "model.", "teacher_dropping shift"),
    # Options of the optimiser and its schedule, which a checkpoint restores.
    **_table(_FIT, "same", "model.", "optimizer optimizer_options learning_rate scale_learning_rate"),
    **_table(_FIT, "same", "model.", "weight_decay decay_rule betas"),
    **_table(_FIT, "same", "model.", "warmup schedule ema"),
    # What a training has beside the student and its translators is in its checkpoint.
    **_table(_ALL, "same", "model.", "patch_dropout balance"),
    **_table(_FIT, "free", "model.", "compile cuda_graphs"),
    # Options of the samples and their order. A store may have moved: its images and features are compared, not its
    # path. Options of another data class are all applied: that class checks for itself whether a run can go on
    # (check_state).
    **_table(_ALL, "free", "data.", "store workers"),
    **_table(_ALL, "applied", "data.", "val_batch_size"),  # matters where only a number of batches is validated
    **_table(_ALL, "same", "data.", f"{CLASS} teachers val_split holdout"),
    **_table(_FIT, "same", "data.", "batch_size fraction weights seed image_sizes teachers_per_step"),
    # How long and where to train; the steps already taken stay the same. A learning rate that decays may forbid another
    # length (check_course).
    **_table(_FIT, "applied", "trainer.", "max_epochs min_epochs max_steps min_steps max_time"),
    **_table(_ALL, "applied", "trainer.", "accelerator strategy devices num_nodes precision sync_batchnorm"),
    **_table(_ALL, "applied", "trainer.", "deterministic benchmark callbacks plugins"),
    **_table(_FIT, "applied", "trainer.", "val_check_interval check_val_every_n_epoch"),
    # What a step or an epoch sees, and what counts as the best checkpoint.
    **_table(_FIT, "same", "trainer.", "accumulate_grad_batches gradient_clip_val gradient_clip_algorithm"),
    **_table(_FIT, "same", "trainer.", "limit_train_batches overfit_batches"),
    **_table(("fit", "validate"), "same", "trainer.", "limit_val_batches"),
    **_table(_TEST, "free", "trainer.", "limit_test_batches"),
    **_table(_ALL, "same", "", "seed_everything"),
    # What is shown, written and measured besides.
    **_table(_FIT, "free", "", "checkpoint_every checkpoint_minutes"),
    **_table(_FIT, "free", "trainer.", "logger log_every_n_steps enable_checkpointing num_sanity_val_steps"),
    **_table(_FIT, "free", "trainer.", "enable_model_summary enable_autolog_hparams detect_anomaly"),
    **_table(_FIT, "free", "trainer.", "reload_dataloaders_every_n_epochs"),
    **_table(_ALL, "free", "trainer.", "fast_dev_run enable_progress_bar profiler"),
    **_table(_SCORE, "free", "trainer.", "inference_mode"),
    **_table(_ALL, "free", "", "run_folder ckpt_path config"),
    **_table(_TEST, "free", "", "compare_untrained scorers scorer_images"),
    **_table(("validate",), "free", "", "verbose"),
    # Options of Lightning for what is not done here.
    **_table((), "free", "trainer.", "limit_predict_batches use_distributed_sampler model_registry barebones"),
}

_DATA = "data."

# Values that Lightning takes where none is given.
_DEFAULTS = {"trainer.limit_train_batches": 1.0, "trainer.limit_val_batches": 1.0, "trainer.precision": "32-true"}

# What runs did before these options were there.
_BEFORE = {
    "model.schedule": "constant", "model.ema": None, "model.betas": list(BETAS),
    "model.optimizer": ADAMW, "model.optimizer_options": None,
    "model.balance": "fixed", "model.teacher_dropping": None, "model.patch_dropout": 0.0, "model.cls_loss": "same",
    "model.lift": None, "model.wide_last": None, "model.shift": None,
    "model.normalizer": "std", "model.normalizer_exponent": POWER, "data.image_sizes": None,
    "data.teachers_per_step": None,
}  # fmt: skip

# Options for which 1 is one batch, and 1.0 is all batches.
_SHARES = {f"trainer.{name}" for name in ("limit_train_batches", "limit_val_batches", "overfit_batches")}
_SHARES.add("trainer.val_check_interval")

# Options of Lightning that another option replaces here.
_INSTEAD = {"trainer.default_root_dir": "--run_folder"}


class Change(NamedTuple):
    """An option whose value differs in a resumed run.

    Attributes:
        step: Number of optimisation steps that were taken with the old value.
        option: Name of the option.
        old: Value until then.
        new: Value from then on.
    """

    step: int
    option: str
    old: Any
    new: Any


def check_used(command: str, arguments: Sequence[str]) -> None:
    """Refuses options on the command line that the command would ignore.

    A config file may contain them, since one file serves all three commands.

    Args:
        command: ``"fit"``, ``"validate"`` or ``"test"``.
        arguments: Arguments after the command, as typed.

    Raises:
        ConfigError: If there is such an option. The message names the first.
    """
    for name in _typed(arguments):
        if name in _INSTEAD:
            raise ConfigError(f"--{name} is not an option of its own: use {_INSTEAD[name]}.")
        option = OPTIONS.get(name)
        if option is not None and command not in option.commands:
            others = " and ".join(f"'theia {other}'" for other in option.commands)
            whose = f"it is an option of {others}" if others else "nothing here depends on it"
            raise ConfigError(
                f"'theia {command}' does not use --{name}: {whose}. Leave it out; in a config file it may stand."
            )


def typed(name: str, arguments: Sequence[str]) -> bool:
    """Whether an option was typed on the command line itself."""
    return name in _typed(arguments)


def without(name: str, arguments: Sequence[str]) -> list[str]:
    """The command line without an option and its value."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != f"--{name}" and not argument.startswith(f"--{name}="):
            kept.append(argument)
        skip = argument == f"--{name}"
    return kept


def shaping(config: Namespace) -> dict[str, Any]:
    """The options that a checkpoint records, since they shaped its content.

    Args:
        config: Config of ``theia fit``.

    Returns:
        Values by option: builtins only, and no path of this machine.
    """
    names = [name for name, option in OPTIONS.items() if option.resumed != "free"]
    values = {name: config.get(name) for name in names if not name.startswith(_DATA)}
    data = flat(config.get("data"))
    # The architecture says everything about the teachers.
    others = {f"{_DATA}{name}" for name in data} - {f"{_DATA}teachers"}
    kept = others.intersection(names) if is_feature_data(data) else others
    values |= {name: data[name.removeprefix(_DATA)] for name in sorted(kept)}
    return {name: _plain(name, value) for name, value in values.items()}


def changes(checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Compares a run that is about to be resumed with its checkpoint.

    Args:
        checkpoint: Content of the checkpoint.
        now: Options of this run, from :func:`shaping`.

    Returns:
        The options that have another value from here on.

    Raises:
        ConfigError: If options differ that must stay the same. The message names all of them.
    """
    then = recorded(checkpoint)
    different = [
        name
        for name, value in now.items()
        if name in then and (then[name] != value or (name in _SHARES and type(then[name]) is not type(value)))
    ]
    refused = [name for name in different if name in OPTIONS and OPTIONS[name].resumed == "same"]
    if refused:
        lines = "; ".join(f"{name} was {then[name]!r}, now it is {now[name]!r}" for name in refused)
        raise ConfigError(
            f"A run keeps its recipe, so it cannot be resumed with another: {lines}. Resume it with the values that it "
            "had, or start another run with --run_folder FOLDER and without --ckpt_path."
        )
    return [Change(checkpoint["global_step"], name, then[name], now[name]) for name in different]


def recorded(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the options with which a checkpoint was made, by name, as :func:`shaping` gives them."""
    then = checkpoint.get("callbacks", {}).get(Checkpoints.__qualname__, {}).get("options")
    if then is None:  # a run of an earlier version recorded less
        then = {
            f"model.{name}": _plain(f"model.{name}", value) for name, value in checkpoint["hyper_parameters"].items()
        }
    return {f"{_DATA}{CLASS}": flat(None)[CLASS], **_BEFORE, **then}  # earlier versions had no other data class


def earlier_changes(checkpoint: Mapping[str, Any]) -> list[Change]:
    """Changes that were made when the checkpoint's run was resumed before."""
    state = checkpoint.get("callbacks", {}).get(Checkpoints.__qualname__, {})
    return [Change(**change) for change in state.get("changes", [])]


def _typed(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].rstrip("+")
            yield name.replace(f"{_DATA}{OPTIONS_OF_CLASS}.", _DATA)


def _plain(name: str, value: Any) -> Any:
    if value is None:
        return _DEFAULTS.get(name)
    if name == "model.weights":
        return weights_name(value)
    if isinstance(value, Namespace | Mapping):
        items = vars(value) if isinstance(value, Namespace) else value
        return {str(key): _plain(str(key), inner) for key, inner in items.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, inner) for inner in value]
    if isinstance(value, bool | int | float) or name == "model.backbone":
        return value
    return Path(str(value)).name  # only the last part of a path, since the rest concerns this machine alone
