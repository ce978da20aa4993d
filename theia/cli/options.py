"""Every option of ``theia fit``, ``validate`` and ``test``: who uses it, and what a resumed run does with it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import Namespace

from theia.cli.data import CLASS, OPTIONS_OF_CLASS, flat, is_feature_data
from theia.errors import ConfigError
from theia.training.checkpoints import Checkpoints
from theia.training.distillation import weights_name

# Of a run that is resumed with another value: "same" is refused; "applied" holds from there on and is written down with
# the step; "free" has no bearing on what is learned.
Resumed = Literal["same", "applied", "free"]


class Option(NamedTuple):
    """What is to be known of an option.

    Attributes:
        commands: Those that use it.
        resumed: What a resumed run does with another value.
    """

    commands: tuple[str, ...]
    resumed: Resumed


_FIT, _TEST, _SCORE = ("fit",), ("test",), ("validate", "test")
_ALL = (*_FIT, *_SCORE)


def _table(commands: tuple[str, ...], resumed: Resumed, part: str, names: str) -> dict[str, Option]:
    return {f"{part}{name}": Option(commands, resumed) for name in names.split()}


OPTIONS: dict[str, Option] = {
    # What the student and its translators are, and what the held-out loss is.
    **_table(_ALL, "same", "model.", "backbone backbone_stage registers width depth heads"),
    **_table(_ALL, "same", "model.", "weights translator distill_cls loss teacher_weights"),
    # The optimiser and its schedule, which a checkpoint brings along.
    **_table(_FIT, "same", "model.", "learning_rate scale_learning_rate weight_decay decay_rule warmup"),
    **_table(_FIT, "free", "model.", "compile"),
    # The samples and their order. A store may have moved: its images and features are compared, not its path. Options
    # of another class of data are all applied: it sees for itself whether a run can go on (check_state).
    **_table(_ALL, "free", "data.", "store workers"),
    **_table(_ALL, "applied", "data.", "val_batch_size"),  # where only so many batches are validated, it matters
    **_table(_ALL, "same", "data.", f"{CLASS} teachers val_split holdout"),
    **_table(_FIT, "same", "data.", "batch_size fraction seed"),
    # How long, and where; the steps that are taken stay the same.
    **_table(_FIT, "applied", "trainer.", "max_epochs min_epochs max_steps min_steps max_time"),
    **_table(_ALL, "applied", "trainer.", "accelerator strategy devices num_nodes precision sync_batchnorm"),
    **_table(_ALL, "applied", "trainer.", "deterministic benchmark callbacks plugins"),
    **_table(_FIT, "applied", "trainer.", "val_check_interval check_val_every_n_epoch"),
    # What is seen in a step or an epoch, and what is called the best.
    **_table(_FIT, "same", "trainer.", "accumulate_grad_batches gradient_clip_val gradient_clip_algorithm"),
    **_table(_FIT, "same", "trainer.", "limit_train_batches overfit_batches"),
    **_table(("fit", "validate"), "same", "trainer.", "limit_val_batches"),
    **_table(_TEST, "free", "trainer.", "limit_test_batches"),
    **_table(_ALL, "same", "", "seed_everything"),
    # What is shown, written and measured beside.
    **_table(_FIT, "free", "", "checkpoint_every"),
    **_table(_FIT, "free", "trainer.", "logger log_every_n_steps enable_checkpointing num_sanity_val_steps"),
    **_table(_FIT, "free", "trainer.", "enable_model_summary enable_autolog_hparams detect_anomaly"),
    **_table(_FIT, "free", "trainer.", "reload_dataloaders_every_n_epochs"),
    **_table(_ALL, "free", "trainer.", "fast_dev_run enable_progress_bar profiler"),
    **_table(_SCORE, "free", "trainer.", "inference_mode"),
    **_table(_ALL, "free", "", "run_folder ckpt_path config"),
    **_table(_TEST, "free", "", "compare_untrained scorers scorer_images"),
    **_table(("validate",), "free", "", "verbose"),
    # Lightning's, for what is not done here.
    **_table((), "free", "trainer.", "limit_predict_batches use_distributed_sampler model_registry barebones"),
}

_DATA = "data."

# What Lightning takes where nothing is given.
_DEFAULTS = {"trainer.limit_train_batches": 1.0, "trainer.limit_val_batches": 1.0, "trainer.precision": "32-true"}

# Where 1 is one batch, and 1.0 all of them.
_SHARES = {f"trainer.{name}" for name in ("limit_train_batches", "limit_val_batches", "overfit_batches")}
_SHARES.add("trainer.val_check_interval")

# Options that another one replaces here.
_INSTEAD = {"trainer.default_root_dir": "--run_folder"}


class Change(NamedTuple):
    """An option that a resumed run has another value of.

    Attributes:
        step: Optimisation steps that were taken with the old value.
        option: Its name.
        old: Value until then.
        new: Value from then on.
    """

    step: int
    option: str
    old: Any
    new: Any


def check_used(command: str, arguments: Sequence[str]) -> None:
    """Refuses options on the command line that the command would ignore.

    In a config file they may stand: one file serves all three commands.

    Args:
        command: ``"fit"``, ``"validate"`` or ``"test"``.
        arguments: What was typed after it.

    Raises:
        ConfigError: Names the first such option.
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
    """Whether an option stands on the command line itself."""
    return name in _typed(arguments)


def without(name: str, arguments: Sequence[str]) -> list[str]:
    """A command line without an option and its value."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != f"--{name}" and not argument.startswith(f"--{name}="):
            kept.append(argument)
        skip = argument == f"--{name}"
    return kept


def shaping(config: Namespace) -> dict[str, Any]:
    """The options that a checkpoint keeps, since they shaped what it holds.

    Args:
        config: Of ``theia fit``.

    Returns:
        By name, builtins only and no path of this machine.
    """
    names = [name for name, option in OPTIONS.items() if option.resumed != "free"]
    values = {name: config.get(name) for name in names if not name.startswith(_DATA)}
    data = flat(config.get("data"))
    # Of the teachers, the architecture says all.
    others = {f"{_DATA}{name}" for name in data} - {f"{_DATA}teachers"}
    kept = others.intersection(names) if is_feature_data(data) else others
    values |= {name: data[name.removeprefix(_DATA)] for name in sorted(kept)}
    return {name: _plain(name, value) for name, value in values.items()}


def changes(checkpoint: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Compares a run that is about to be resumed with its checkpoint.

    Args:
        checkpoint: What it holds.
        now: What :func:`shaping` says of this run.

    Returns:
        What is applied from here on.

    Raises:
        ConfigError: Names all options that must stay as they were.
    """
    state = checkpoint.get("callbacks", {}).get(Checkpoints.__qualname__, {})
    then = state.get("options")
    if then is None:  # a run of an earlier version says less
        then = {
            f"model.{name}": _plain(f"model.{name}", value) for name, value in checkpoint["hyper_parameters"].items()
        }
    then = {f"{_DATA}{CLASS}": flat(None)[CLASS], **then}  # earlier versions had no other data
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


def earlier_changes(checkpoint: Mapping[str, Any]) -> list[Change]:
    """What was changed when the checkpoint's run was resumed before."""
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
    return Path(str(value)).name  # of a path, nothing that lies on this machine only
