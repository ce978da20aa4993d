"""``theia fit | validate | test``: LightningCLI over the distillation module and the feature store's datamodule."""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from theia.cli.report import table, write_report
from theia.cli.run import MetricsCSV, SaveRun, check_unused, checkpoints, resolve_checkpoint, run_of
from theia.data.datamodule import FeatureDataModule
from theia.errors import ConfigError
from theia.training.callbacks import FeaturePictures, LastCheckpoint, Throughput
from theia.training.checkpoint import check_architecture, read_checkpoint
from theia.training.distillation import Distillation

logger = logging.getLogger(__name__)


class TheiaCLI(LightningCLI):
    """LightningCLI with a run folder, resuming, and a report after a test."""

    model: Distillation
    datamodule: FeatureDataModule
    subcommand: str

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that are commands, with the arguments that are not options."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the run's own options, and hands the store's teachers to the model."""
        parser.add_argument(
            "--run", type=str, default="runs/default",
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
        parser.link_arguments("run", "trainer.default_root_dir")
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
        """Settles run folder and checkpoint before anything is loaded."""
        options = self.config[self.subcommand]
        self.run_folder = Path(options.run)
        self.checkpoint: Path | None = None
        if options.ckpt_path is not None:
            self.checkpoint = resolve_checkpoint(options.ckpt_path, self.run_folder)
            options.ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
        elif self.subcommand != "fit":
            raise ConfigError(
                f"'theia {self.subcommand}' needs a checkpoint: --ckpt_path FILE, "
                f"or 'best' or 'last' of the run folder {self.run_folder}."
            )
        elif getattr(rank_zero_only, "rank", 0) == 0 and not options.trainer.fast_dev_run:
            check_unused(self.run_folder)
        if "weights_only" in options:  # an option since Lightning 2.6, off by default
            options.weights_only = True
        if self.subcommand == "fit":
            self.save_config_kwargs = {"overwrite": True}  # check_unused has refused a folder that is another run's
        else:
            self.save_config_callback = None

    def after_instantiate_classes(self) -> None:
        """Checks the checkpoint against the model that was just built."""
        if self.checkpoint is not None:
            check_architecture(self.checkpoint, read_checkpoint(self.checkpoint), dict(self.model.hparams))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the run folder's loggers and callbacks to the configured trainer."""
        options = self.config_init[self.subcommand]
        trainer = options.trainer
        run = self.run_folder
        stem = "test" if self.checkpoint is None else f"test_{self.checkpoint.stem}"
        self.report = run_of(self.checkpoint or run, run) / f"{stem}.json"
        callbacks: list[Callback] = [FeaturePictures(self.report.with_suffix(".png"))]
        if self.subcommand == "fit":
            callbacks += [Throughput()]
            if trainer.logger is None or trainer.logger is True:
                kwargs["logger"] = [TensorBoardLogger(run, name="", version=""), MetricsCSV(run, name="", version="")]
            if trainer.enable_checkpointing is not False and not trainer.fast_dev_run:
                folder = checkpoints(run)
                callbacks += [
                    LastCheckpoint(folder, options.checkpoint_every),
                    ModelCheckpoint(folder, "best", monitor="val/loss", enable_version_counter=False),
                ]
        else:
            kwargs["logger"] = False
        kwargs["callbacks"] = [*(trainer.callbacks or []), *callbacks]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Says where things are and what comes next."""
        best = checkpoints(self.run_folder) / "best.ckpt"
        logger.info("Run folder: %s", self.run_folder)
        logger.info("Curves and pictures: tensorboard --logdir %s", self.run_folder)
        if best.exists():
            logger.info("Next: theia test %s --ckpt_path %s", _configs(), best)

    def test(self, **kwargs: Any) -> None:
        """Scores the student before and after training on the same held-out images."""
        untrained = self.config[self.subcommand].compare_untrained
        before = self.trainer.test(self.model, self.datamodule, verbose=False)[0] if untrained else None
        after = self.trainer.test(**{**kwargs, "verbose": False})[0]
        if not self.trainer.is_global_zero:
            return
        report = {
            "checkpoint": str(self.checkpoint),
            "samples": self.datamodule.held_out,
            "before": before,
            "after": after,
            "device": str(self.trainer.strategy.root_device),
            "precision": self.trainer.precision,
            "store": self.datamodule.provenance(),
        }
        write_report(self.report, report)
        lines = (
            f"Held-out images: {self.datamodule.held_out} (before: untrained student; after: {self.checkpoint})",
            table(list(self.datamodule.teacher_specs), before, after),
            f"run folder:  {self.report.parent}",
            f"figures:     {self.report}",
            f"picture:     {self.report.with_suffix('.png')}",
            f"TensorBoard: tensorboard --logdir {self.report.parent}",
        )
        print("\n".join(lines))  # noqa: T201  # the command's result


def main(argv: Sequence[str]) -> int:
    """Runs ``fit``, ``validate`` or ``test``.

    Args:
        argv: The command and its options.
    """
    _quieten()
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
    return 0


def _quieten() -> None:
    """Drops advertisements and deprecation notes that are about the libraries' own insides."""
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.(cli|utilities\._pytree)")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda line: "litlogger" not in line.getMessage()
    )


def _configs() -> str:
    given = [value for flag, value in zip(sys.argv, sys.argv[1:], strict=False) if flag in ("--config", "-c")]
    return " ".join(f"--config {value}" for value in given)
