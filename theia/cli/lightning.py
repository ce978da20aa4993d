"""``theia fit | validate | test``: LightningCLI over the distillation module and the feature store's datamodule."""

import logging
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from theia.cli.report import table, write_report
from theia.cli.run import (
    MetricsCSV,
    SaveRun,
    check_processes,
    check_trainer,
    check_unused,
    checkpoints,
    resolve_checkpoint,
    run_of,
)
from theia.cli.scores import find_scorers, run_scorers, scores_table
from theia.data.datamodule import FeatureDataModule
from theia.errors import ConfigError
from theia.models.checkpoint import check_architecture, file_sha256, read_checkpoint
from theia.scoring import registry
from theia.training.callbacks import FeaturePictures, LastCheckpoint, Throughput
from theia.training.distillation import Distillation

logger = logging.getLogger(__name__)

_TERMINATED = 128 + signal.SIGTERM  # what a shell reports of a program that the signal ended


class TheiaCLI(LightningCLI):
    """LightningCLI with a run folder, resuming, and a report after a test."""

    model: Distillation
    datamodule: FeatureDataModule
    subcommand: str

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that are commands, with the arguments that are not options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only", "verbose"},
        }

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Says what ``--ckpt_path`` means here: Lightning's help is about its own trainer."""
        super().setup_parser(*args, **kwargs)
        for parser in self._subcommand_parsers.values():
            for action in parser._actions:
                if action.dest == "ckpt_path":
                    action.help = (
                        "A checkpoint file, or 'last' or 'best' of the run folder. In fit, training goes on from it, "
                        "and 'last' also starts a run that has no checkpoint yet."
                    )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run's own options, and hands the store's teachers to the model."""
        parser.add_argument(
            "--run_folder", type=str, default="runs/default",
            help="Folder of the run: config.yaml, checkpoints, TensorBoard events, metrics.csv.",
        )  # fmt: skip
        parser.add_argument(
            "--checkpoint_every", type=int, default=1000,
            help="Optimisation steps between two writes of last.ckpt: the most that a killed run loses.",
        )  # fmt: skip
        parser.add_argument(
            "--compare_untrained", type=bool, default=True,
            help="In test: also score the student before training, so that the table shows what was learned.",
        )  # fmt: skip
        parser.add_argument(
            "--scorers", type=str | list[str], default="",
            help="In test: what to score beyond the student's own translators, comma-separated or a YAML list. "
            f"Installed: {', '.join(registry.names()) or 'none'}.",
        )  # fmt: skip
        parser.add_argument(
            "--scorer_images", type=int, default=10000,
            help="Training images that scorers fit on at most, a fixed part of all; the held-out ones are all used.",
        )  # fmt: skip
        parser.link_arguments("run_folder", "trainer.default_root_dir")
        # The store knows its teachers and image size, so one config serves any store.
        parser.link_arguments("data.teacher_shapes", "model.teachers", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses without Lightning's warning that arguments were passed from Python."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]  # this command line passes lists only

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's options silently override the config and the command line;
        # here a checkpoint that does not fit the config is an error (check_architecture).
        pass

    def before_instantiate_classes(self) -> None:
        """Settles run folder and checkpoint, and refuses what would fail later, before anything is loaded."""
        options = self.config[self.subcommand]
        self.run_folder = Path(options.run_folder)
        self.checkpoint: Path | None = None
        self.loaded: dict[str, Any] | None = None
        check_trainer(options)
        self.scorers = find_scorers(options.scorers)
        asked = options.ckpt_path
        if asked is None and self.subcommand != "fit":
            raise ConfigError(
                f"'theia {self.subcommand}' needs a checkpoint: --ckpt_path FILE, "
                f"or 'best' or 'last' of the run folder {self.run_folder}."
            )
        if asked is not None:
            self.checkpoint = resolve_checkpoint(asked, self.run_folder, starting=self.subcommand == "fit")
        if self.checkpoint is not None:
            self.loaded = read_checkpoint(self.checkpoint)
        options.ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
        if self.subcommand != "fit":
            self.save_config_callback = None
            return
        own = self.checkpoint is not None and self.checkpoint.resolve().parent == checkpoints(self.run_folder).resolve()
        resumes = asked == "last" or own
        # Only the first process looks: when the others start, it may have written there already.
        if not resumes and not options.trainer.fast_dev_run and getattr(rank_zero_only, "rank", 0) == 0:
            check_unused(self.run_folder)
        self.save_config_kwargs = {"overwrite": True}  # of this run's own, when it is resumed

    def after_instantiate_classes(self) -> None:
        """Checks what was just built, before the run folder is touched."""
        check_processes(self.trainer)
        if self.subcommand == "fit":
            self.datamodule.check_training(self.trainer.world_size)
        if self.loaded is not None:
            check_architecture(str(self.checkpoint), self.loaded, dict(self.model.hparams))
        if self.subcommand == "test" and self.scorers:
            self.scored = self.datamodule.with_all_teachers()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the run folder's loggers and callbacks to the configured trainer."""
        options = self.config_init[self.subcommand]
        trainer = options.trainer
        callbacks: list[Callback] = []
        if self.subcommand == "fit":
            run = self.run_folder
            callbacks = [Throughput(), FeaturePictures()]
            if trainer.logger is None or trainer.logger is True:
                step = 0 if self.loaded is None else self.loaded["global_step"]
                kwargs["logger"] = [TensorBoardLogger(run, name="", version=""), MetricsCSV(run, resumed_at=step)]
            if trainer.enable_checkpointing is not False and not trainer.fast_dev_run:
                folder = checkpoints(run)
                callbacks += [
                    ModelCheckpoint(folder, "best", monitor="val/loss", enable_version_counter=False),
                    LastCheckpoint(folder, options.checkpoint_every),  # after best, whose state it holds
                ]
        else:
            kwargs["logger"] = False
        given = trainer.callbacks or []
        kwargs["callbacks"] = [*(given if isinstance(given, list) else [given]), *callbacks]
        return super().instantiate_trainer(**kwargs)

    def fit(self, **kwargs: Any) -> None:
        """Trains, or goes on where the checkpoint was taken."""
        self.trainer.fit(**kwargs, weights_only=True)
        if not self.trainer.is_global_zero or self.config[self.subcommand].trainer.fast_dev_run:
            return
        run = self.run_folder
        logger.info("Run folder: %s", run)
        logger.info("Curves and pictures: tensorboard --logdir %s", run)
        if not (checkpoints(run) / "best.ckpt").exists():
            logger.warning("No validation took place, so there is no best.ckpt; last.ckpt holds the end of training.")
        best = "best" if (checkpoints(run) / "best.ckpt").exists() else "last"
        logger.info("Next: theia test --config %s --ckpt_path %s", run / "config.yaml", best)

    def validate(self, **kwargs: Any) -> None:
        """Scores a checkpoint and leaves the table to Lightning."""
        self.trainer.validate(**kwargs, weights_only=True)

    def test(self, **kwargs: Any) -> None:
        """Scores the student before and after training on the same held-out images."""
        if self.checkpoint is None or self.loaded is None:
            raise TypeError("a test without a checkpoint was refused before")
        before = None
        if self.config[self.subcommand].compare_untrained:
            self.model.start_untrained(self.loaded["state_dict"])
            before = self.trainer.test(self.model, self.datamodule, verbose=False)[0]
        figures = run_of(self.checkpoint, self.run_folder) / f"test_{self.checkpoint.stem}.json"
        picture = figures.with_suffix(".png")
        self.trainer.callbacks.append(FeaturePictures(picture))  # type: ignore[attr-defined]
        after = self.trainer.test(**kwargs, weights_only=True, verbose=False)[0]
        if not self.trainer.is_global_zero:
            return
        print(f"Held-out images: {self.datamodule.held_out} (before: untrained student; after: {self.checkpoint})")
        print(table(list(self.datamodule.teacher_specs), before, after))
        report = {
            "checkpoint": str(self.checkpoint),
            "checkpoint_sha256": file_sha256(self.checkpoint),
            "samples": self.datamodule.held_out,
            "before": before,
            "after": after,
            "device": str(self.trainer.strategy.root_device),
            "precision": self.trainer.precision,
            "store": self.datamodule.provenance(),
            **self._score(self.checkpoint),
        }
        write_report(figures, report)
        lines = (
            f"run folder:  {figures.parent}",
            f"figures:     {figures}",
            f"picture:     {picture}",
            f"TensorBoard: tensorboard --logdir {figures.parent}",
        )
        print("\n".join(lines))

    def _score(self, checkpoint: Path) -> dict[str, Any]:
        """Runs the scorers and prints what they say; the report's part about them."""
        if not self.scorers:
            return {"scorers": [], "scores": {}, "scorer_images": None}
        options = self.config[self.subcommand]
        images = min(options.scorer_images, self.scored.trained_on)
        scores = run_scorers(
            self.scorers, self.scored, checkpoint, self.trainer.strategy.root_device,
            images=images, seed=int(options.seed_everything or 0),
        )  # fmt: skip
        print(f"Scorers fitted on {images} training images, on the same held-out images:")
        for name in self.scorers:
            print(scores_table(name, scores, self.scored.teacher_specs, self.datamodule.teacher_specs))
        return {"scorers": list(self.scorers), "scores": scores, "scorer_images": images}


def main(argv: Sequence[str]) -> int:
    """Runs ``fit``, ``validate`` or ``test``.

    Args:
        argv: The command and its options.

    Returns:
        Exit status: 0, or 143 if a signal asked to stop.
    """
    _quieten()
    try:
        TheiaCLI(
            Distillation,
            FeatureDataModule,
            save_config_callback=SaveRun,
            seed_everything_default=0,
            parser_kwargs={"prog": "theia"},
            args=list(argv),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except SIGTERMException:  # Lightning would end with 0, as if the work were done
        return _TERMINATED
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
    return 0


def _quieten() -> None:
    """Drops advertisements, and notes about the libraries' own insides or about what this command does on purpose."""
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.(cli|utilities\._pytree)")
    for text in (
        ".*callbacks used to create the checkpoint need to be provided",
        "Checkpoint directory .* exists and is not empty",
        "Precision .* is not supported by the model summary",
    ):
        warnings.filterwarnings("ignore", message=text)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda line: "litlogger" not in line.getMessage() and "litmodels" not in line.getMessage()
    )
