"""``theia fit | validate | test``: LightningCLI for the distillation module and its training data."""

import logging
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import SUPPRESS, ArgumentParser, Namespace, capture_parser, get_loader, set_loader
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from theia.cli.data import DataParser, data_last
from theia.cli.main import COMMANDS
from theia.cli.options import OPTIONS, changes, check_used, earlier_changes, shaping, typed
from theia.cli.parser import OF_FIT_MAY_BE_EMPTY, as_one_word, settle
from theia.cli.run_folder import (
    CONFIG,
    SaveRun,
    check_newest,
    check_unused,
    checkpoints,
    moved_run,
    resolve_checkpoint,
    run_of,
)
from theia.cli.signals import until_signalled
from theia.cli.trainer import (
    check_course,
    check_left,
    check_processes,
    check_trainer,
    choose_precision,
    set_up_processes,
)
from theia.data.datamodule import FeatureData
from theia.data.protocol import TrainingData
from theia.errors import ConfigError
from theia.live import LiveData
from theia.models import older
from theia.models.checkpoint import check_architecture, read_checkpoint
from theia.scoring.contract import data_of, find_scorers, scorer_names
from theia.scoring.scorers import run_scorers, scores_table, translators_table, write_report
from theia.training.callbacks import FeaturePictures, Throughput, TrainingProgress
from theia.training.checkpoints import BEST, LAST, Checkpoints, DurableCheckpoints
from theia.training.distillation import Distillation
from theia.training.records import METRICS, Events, MetricsCSV
from theia.utils.files import check_folder, file_sha256

logger = logging.getLogger(__name__)

_RENAMED = {"FeatureDataModule": FeatureData.__qualname__}  # in checkpoints of earlier versions
# Options of earlier versions are translated into those of today, in every config that is given.
_read_yaml = get_loader("yaml")
set_loader("yaml", lambda text: older.config(_read_yaml(text)), (yaml.YAMLError,))
# Python keeps either Union[int, float] or Union[float, int], whichever is asked for first, and jsonargparse tries types
# in their order: with some releases of torch, 3 batches would be read as 3.0, a share.
for _name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"):
    Trainer.__init__.__annotations__[_name] = int | float | None
Trainer.__init__.__annotations__["overfit_batches"] = int | float


class TheiaCLI(LightningCLI):
    """LightningCLI with a run folder, resuming, and a report after a test."""

    model: Distillation
    datamodule: TrainingData
    subcommand: str

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that are commands, with those of their arguments that are not options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
        }

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Describes ``--ckpt_path`` as it works here, not as in Lightning's trainer, and lists only options in use."""
        super().setup_parser(*args, **kwargs)
        for command, parser in self._subcommand_parsers.items():
            parser.description = f"{COMMANDS[command].help[0].upper()}{COMMANDS[command].help[1:]}."
            unused = {name for name, option in OPTIONS.items() if command not in option.commands}
            if isinstance(parser, DataParser):
                parser.hidden = frozenset(unused)
            for action in parser._actions:
                if action.dest.removesuffix(".help") in unused:
                    action.help = SUPPRESS
                if action.dest == "data":
                    action.help = (
                        f"Class of the training data: {LiveData.__qualname__}, whose teachers run during training, or "
                        "one of your own by its import path; FeatureData, whose options are below, if none is named."
                    )
                if action.dest == "ckpt_path":
                    action.help = (
                        "A checkpoint file, or 'last' or 'best' of the run folder. In fit, training goes on from it, "
                        "and 'last' also starts a run that has no checkpoint yet."
                    )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run's own options, and links the teachers of the data to the model."""
        parser.add_argument(
            "--run_folder", type=str, default="runs/default",
            help="Folder of the run: config.yaml, checkpoints, TensorBoard events, metrics.csv, reports of tests.",
        )  # fmt: skip
        parser.add_argument(
            "--checkpoint_every", type=int, default=1000,
            help="Optimisation steps between two writes of last.ckpt: with those that a write takes, the most that a "
            "killed run loses.",
        )  # fmt: skip
        parser.add_argument(
            "--checkpoint_minutes", type=float, default=10.0,
            help="Minutes after which last.ckpt is written even if fewer steps were taken.",
        )  # fmt: skip
        parser.add_argument(
            "--compare_untrained", type=bool, default=True,
            help="Also score the student before training, so that the table shows what was learned.",
        )  # fmt: skip
        parser.add_argument(
            "--scorers", type=str | list[str], default="",
            help="Scorers to run besides those of the student's own translators, comma-separated or a YAML list; "
            "dynamics is followed by its data, dynamics@FOLDER, and readout may be by another store, readout@STORE. "
            f"Installed: {', '.join(scorer_names()) or 'none'}.",
        )  # fmt: skip
        parser.add_argument(
            "--scorer_images", type=int, default=10000,
            help="Largest number of training images that scorers are fitted on, always the same ones. They score on "
            "all held-out images.",
        )  # fmt: skip
        parser.link_arguments("run_folder", "trainer.default_root_dir")
        # The data module knows its teachers and image size, so one config serves any store.
        parser.link_arguments("data.teacher_shapes", "model.teachers", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses without Lightning's warning that arguments were passed from Python.

        Raises:
            ConfigError: If an option was typed that the command does not use, or a number is outside its range.
        """
        words = older.arguments(list(args))  # type: ignore[arg-type]  # this command line passes lists only
        for option in ("--data.images", "--data.val_images"):
            words = as_one_word(words, option)
        words = data_last(words)
        self.arguments = words[1:]
        if words and words[0] in self.subcommands():
            check_used(words[0], self.arguments)
        self.config = settle(parser.parse_args(words), OF_FIT_MAY_BE_EMPTY)
        check_trainer(self.config[self.config.subcommand])

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's options silently override the config and the command line;
        # here a checkpoint that does not fit the config is an error (check_architecture).
        pass

    def before_instantiate_classes(self) -> None:
        """Finds run folder and checkpoint, and refuses what would fail later, before anything is loaded."""
        options = self.config[self.subcommand]
        if options.data is None:
            raise ConfigError(
                "data is null. Name a class of training data, or leave it out: FeatureData is the default."
            )
        if not typed("run_folder", self.arguments):
            # The config of a run stands for its folder, wherever that was moved and wherever the command is run.
            options.run_folder = str(moved_run(options.config or []) or options.run_folder)
            options.trainer.default_root_dir = options.run_folder
        self.run_folder = Path(options.run_folder)
        self.checkpoint: Path | None = None
        self.loaded: dict[str, Any] = {}
        self.scorers = find_scorers(options.scorers)
        self.asked = asked = options.ckpt_path
        if asked is None and self.subcommand != "fit":
            raise ConfigError(
                f"'theia {self.subcommand}' needs a checkpoint: --ckpt_path FILE, "
                f"or 'best' or 'last' of the run folder {self.run_folder}."
            )
        if asked is not None:
            if self.subcommand == "validate" and asked not in ("last", "best") and typed("run_folder", self.arguments):
                raise ConfigError(
                    "'theia validate' of a checkpoint file does not use --run_folder: it writes nothing. Leave it out."
                )
            self.checkpoint = resolve_checkpoint(str(asked), self.run_folder, starting=self.subcommand == "fit")
        if self.checkpoint is not None:
            self.loaded = {_RENAMED.get(name, name): part for name, part in read_checkpoint(self.checkpoint).items()}
        options.ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
        if self.subcommand != "fit":
            self.save_config_callback = None
            return
        options.trainer.precision = choose_precision(options.trainer, self.loaded)
        self.state: dict[str, Any] = {"options": shaping(options), "changes": []}
        if not options.trainer.fast_dev_run:
            self._check_folder()
        if self.loaded:
            self._check_resumed(options, self.loaded)

    def _check_folder(self) -> None:
        """Checks that the run folder can be used and does not belong to another run."""
        if getattr(rank_zero_only, "rank", 0):
            return  # when the other processes start, the first one may have written there already
        run = self.run_folder
        check_folder(run, "--run_folder")
        if self.checkpoint is not None and self._is_own(self.checkpoint):
            check_newest(self.checkpoint, self.loaded["global_step"], run)
        elif self.asked != "last":
            check_unused(run)

    def _check_resumed(self, options: Namespace, checkpoint: dict[str, Any]) -> None:
        """Checks that the run keeps its recipe, and notes which options change from here on."""
        check_left(options.trainer, checkpoint)
        now = changes(checkpoint, self.state["options"])
        check_course(options.trainer, checkpoint)
        for change in [] if getattr(rank_zero_only, "rank", 0) else now:
            logger.warning(
                "From step %d on, %s is %r; until then it was %r.", change.step, change.option, change.new, change.old
            )
        every = [*earlier_changes(checkpoint), *now]
        self.state["changes"] = [change._asdict() for change in every]
        self.save_config_kwargs = {"resumed_at": checkpoint["global_step"], "changes": every}
        if self.checkpoint is not None and not self._is_own(self.checkpoint):
            self.save_config_kwargs["started_from"] = {
                "name": self.checkpoint.name,
                "sha256": file_sha256(self.checkpoint),
                "step": checkpoint["global_step"],
            }
        elif options.trainer.logger is False and (self.run_folder / METRICS).exists():
            raise ConfigError(
                f"trainer.logger is false, but {self.run_folder / METRICS} has rows of this run, and would lack those "
                "to come. Leave it out, or branch off into another folder with --run_folder FOLDER."
            )

    def _is_own(self, checkpoint: Path) -> bool:
        """Whether a checkpoint belongs to this run."""
        return checkpoint.resolve().parent in (checkpoints(self.run_folder).resolve(), self.run_folder.resolve())

    def after_instantiate_classes(self) -> None:
        """Checks the objects that were just built, before the run folder is touched."""
        check_processes(self.trainer)
        if not isinstance(getattr(self.datamodule, "batch_size", None), int):
            raise ConfigError(
                f"{type(self.datamodule).__qualname__} has no batch_size. Set it in its constructor: samples per step "
                "over all processes."
            )
        if self.subcommand == "fit":
            drawn = self.datamodule.teachers_per_step
            some = drawn is not None and drawn < len(self.datamodule.teacher_shapes)
            set_up_processes(self.trainer, self.model, every_parameter=not some)
            self.datamodule.check_training(self.trainer.world_size)
            self.model.check_steps(self.datamodule, self.trainer.strategy.root_device)
            if self.model.needs_covariances:
                self.datamodule.check_covariances()
        if self.loaded:
            check_architecture(str(self.checkpoint), self.loaded, dict(self.model.hparams))
            if self.subcommand == "fit":
                self.datamodule.check_state(self.loaded.get(type(self.datamodule).__qualname__, {}))
        if self.subcommand == "test" and self.scorers:
            self.scored = self.datamodule.with_all_teachers()
            if type(self.scored).ordered_dataloader is TrainingData.ordered_dataloader:
                self.scored.ordered_dataloader("held_out", self.trainer.strategy.root_device)  # says what is missing

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the run folder's loggers and callbacks to the configured trainer.

        Raises:
            ConfigError: If Lightning refuses the options.
        """
        options = self.config_init[self.subcommand]
        trainer = options.trainer
        callbacks: list[Callback] = []
        plugins: list[Any] = [DurableCheckpoints(_RENAMED)]
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            # Otherwise Lightning would write a checkpoint of another name and go on from it, whatever it is asked.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        if self.subcommand == "fit":
            run = self.run_folder
            callbacks = [Throughput(), FeaturePictures()]
            if trainer.benchmark is None and not trainer.deterministic:
                kwargs["benchmark"] = True  # all batches have one size, so cuDNN measures each convolution once
            if trainer.logger is None or trainer.logger is True:
                # Where 'last' found no checkpoint, rows of a run that was killed before its first one may lie there.
                step = 0 if self.asked == "last" else None
                step = self.loaded["global_step"] if self.loaded else step
                kwargs["logger"] = [Events(run, step), MetricsCSV(run, step)]
            if trainer.enable_checkpointing is not False and not trainer.fast_dev_run:
                every, minutes = options.checkpoint_every, options.checkpoint_minutes
                callbacks.append(Checkpoints(checkpoints(run), every, self.state, minutes))
        else:
            kwargs["logger"] = False
        if trainer.enable_model_summary is None:  # its table names the parts of the module, not those of the student
            kwargs["enable_model_summary"] = False
        own_bar = any(isinstance(callback, ProgressBar) for callback in _several(trainer.callbacks))
        if trainer.enable_progress_bar is not False and not own_bar:
            callbacks.append(TrainingProgress())
        for name, ours in (("callbacks", callbacks), ("plugins", plugins)):
            kwargs[name] = [*_several(trainer[name]), *ours]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ConfigError(
                f"Lightning refuses the options of the trainer: {' '.join(str(error).split())}"
            ) from error

    def fit(self, **kwargs: Any) -> None:
        """Trains, or goes on from the place where the checkpoint was taken."""
        if self.trainer.is_global_zero:
            student, translators = (
                f"{sum(parameter.numel() for parameter in part.parameters()):,}"
                for part in (self.model.distiller.student, self.model.distiller.translators)
            )
            logger.info("The student has %s parameters, the translators have %s.", student, translators)
        self.trainer.fit(**kwargs, weights_only=True)
        if not self.trainer.is_global_zero or self.config[self.subcommand].trainer.fast_dev_run:
            return
        run = self.run_folder
        logger.info("Run folder: %s", run)
        logger.info("Curves and pictures: %s", shlex.join(["tensorboard", "--logdir", str(run)]))
        best, last = ((checkpoints(run) / name).exists() for name in (BEST, LAST))
        if not best and last:
            logger.warning("No validation took place, so there is no %s; %s holds the end of training.", BEST, LAST)
        elif not best:
            logger.warning("No checkpoint was written, since trainer.enable_checkpointing is false.")
            return
        which = ["--config", str(run / CONFIG), "--ckpt_path", "best" if best else "last"]
        logger.info("Next: %s", shlex.join(["theia", "test", *which]))

    def validate(self, **kwargs: Any) -> None:
        """Scores a checkpoint. Lightning prints the table."""
        self.trainer.validate(**kwargs, weights_only=True)

    def test(self, **kwargs: Any) -> None:
        """Scores the student before and after training on the same held-out images."""
        checkpoint = Path(self.config[self.subcommand].ckpt_path)
        before = None
        if self.config[self.subcommand].compare_untrained:
            self.model.start_untrained(self.loaded["state_dict"])
            before = self.trainer.test(self.model, self.datamodule, verbose=False)[0]
        # Goes beside a checkpoint that lies in a run, unless a folder was typed here rather than set in a config.
        asked = typed("run_folder", self.arguments)
        run = self.run_folder if asked else run_of(checkpoint, self.run_folder)
        figures = run / f"test_{checkpoint.stem}.json"
        picture = figures.with_suffix(".png")
        self.trainer.callbacks.append(FeaturePictures(picture))  # type: ignore[attr-defined]
        after = self.trainer.test(**kwargs, weights_only=True, verbose=False)[0]
        if not self.trainer.is_global_zero:
            return
        print(f"Held-out images: {self.datamodule.held_out} (before: untrained student; after: {checkpoint})")
        print(translators_table(list(self.datamodule.teacher_shapes), before, after))
        report = {
            "checkpoint": str(checkpoint),
            "checkpoint_sha256": file_sha256(checkpoint),
            "samples": self.datamodule.held_out,
            "before": before,
            "after": after,
            "device": str(self.trainer.strategy.root_device),
            "precision": self.trainer.precision,
            "store": self.datamodule.provenance(),
            **self._score(checkpoint),
        }
        write_report(figures, report)
        lines = (
            f"run folder:  {figures.parent}",
            f"figures:     {figures}",
            f"picture:     {picture}",
            f"TensorBoard: tensorboard --logdir {shlex.quote(str(figures.parent))}",
        )
        print("\n".join(lines))

    def _score(self, checkpoint: Path) -> dict[str, Any]:
        """Runs the scorers, prints their results, and gives the part of the report about them."""
        if not self.scorers:
            return {"scorers": [], "scores": {}, "scorer_images": None, "scorer_data": {}}
        options = self.config[self.subcommand]
        data = data_of(self.scorers)  # of this state of them
        scores = run_scorers(
            self.scorers, self.scored, checkpoint, self.trainer.strategy.root_device,
            images=options.scorer_images, seed=int(options.seed_everything or 0),
        )  # fmt: skip
        images = min(options.scorer_images, self.scored.scorers_fit_to)
        print(f"Scorers without data of their own are fitted on {images} training images.")
        for name in self.scorers:
            plain, _, own = name.partition("@")
            if own:
                print(f"{plain}, by {own}:")
            print(scores_table(plain, scores, self.datamodule.teacher_shapes))
        return {"scorers": list(self.scorers), "scores": scores, "scorer_images": images, "scorer_data": data}


def _several(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given] if given else []


def main(argv: Sequence[str]) -> int:
    """Runs ``fit``, ``validate`` or ``test``.

    Args:
        argv: The command and its options.

    Returns:
        Exit status: that of :func:`theia.cli.signals.until_signalled`.
    """
    _quieten()
    return until_signalled(lambda: _run(argv), argv)


def _run(argv: Sequence[str]) -> None:
    TheiaCLI(
        Distillation,
        TrainingData,
        subclass_mode_data=True,
        parser_class=DataParser,
        save_config_callback=SaveRun,
        seed_everything_default=0,
        parser_kwargs={"prog": "theia"},
        args=list(argv),
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )


def fit_parser() -> ArgumentParser:
    """The parser of ``theia fit`` alone, which raises argparse's ArgumentError instead of ending the process."""
    whole = capture_parser(main, ["fit"])
    commands: Any = next(action.choices for action in whole._actions if action.dest == "subcommand")
    parser: ArgumentParser = commands["fit"]
    parser.exit_on_error = False
    return parser


def _quieten() -> None:
    """Drops advertisements, and the libraries' notes about their own internals or about deliberate choices here."""
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.(cli|utilities\._pytree)")
    for text in (
        ".*callbacks used to create the checkpoint need to be provided",
        "Precision .* is not supported by the model summary",
    ):
        warnings.filterwarnings("ignore", message=text)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda line: "litlogger" not in line.getMessage() and "litmodels" not in line.getMessage()
    )
