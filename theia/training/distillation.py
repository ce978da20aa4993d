"""The LightningModule, which only connects student, translators, losses and metrics to the trainer and logs."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MetricCollection

from theia.errors import ConfigError, ShapeError, WeightsError
from theia.models import older
from theia.models.architecture import Architecture
from theia.models.distiller import SomePatches
from theia.models.scaler import NEED_COVARIANCE, POWER, Matrix, Normalizer
from theia.training import losses
from theia.training.averaging import WeightAverage
from theia.training.balance import Balance, RunningLosses, total_loss, weighted_mean
from theia.training.balance import teacher_weights as shares_of_teachers
from theia.training.losses import PAPER, BadSteps, ClsLoss, FeatureLoss, Objective, RunningMean, angle
from theia.training.metrics import NormEntropy, SampleMean, feature_metrics
from theia.training.optim import (
    ADAMW,
    BETAS,
    DECAY,
    Course,
    DecayRule,
    Schedule,
    build_optimizer,
    check_optimizer,
    learning_rate_schedule,
    scale_learning_rate,
)
from theia.training.shifting import common_cells, draw_shift
from theia.types import FeatureBatch, FeatureStatistics
from theia.utils.arguments import check_number

logger = logging.getLogger(__name__)

_HELD_OUT = ("val", "test")
# torch.compile keeps at most 8 versions of a step, one of them for validation, and compiles no more.
_MOST_VERSIONS = 7
COURSE = "course"  # entry of a checkpoint whose learning rate decays


def weights_name(weights: str) -> str:
    """The name of a student's initial weights; for a weights file, its name without the folder."""
    return weights if weights in ("scratch", "pretrained") else Path(weights).name


def shows_logged(trainer: L.Trainer) -> bool:
    """Whether values that are logged for a progress bar are shown by one.

    Lightning reads such values from the device after every step. The project's own bar reads logged values on the steps
    that log, when the host waits for the device anyway.
    """
    bar = trainer.progress_bar_callback
    return bar is not None and not getattr(bar, "reads_on_logged_steps", False)


class _FeatureData(Protocol):
    """The part of the trainer's datamodule that this module uses."""

    batch_size: int
    cls_teachers: Collection[str] | None
    image_sizes: Sequence[int]
    seed: int
    teachers_per_step: int | None

    def statistics(self) -> Mapping[str, FeatureStatistics]: ...

    def covariances(self) -> Mapping[str, Matrix]: ...


class Distillation(L.LightningModule):
    """Distils the spatial features of several teachers into one student.

    Args:
        teachers: Feature shapes by teacher name, as the store gives them,
            ``{"channels": int, "grid_hw": [rows, columns], "has_cls": bool}``.
        loss: Weight of each loss term: {cosine: 0.9, smooth_l1: 0.1} as in the paper by default, {mse: 1} as in its
            ablation; cosine_per_token takes the cosine of each token, not of an image's whole feature map.
        cls_loss: Loss of CLS tokens with distill_cls: "same" as that of patch tokens, or "angle", the squared angle
            between prediction and target, divided by the mean squared angle between the teacher's CLS tokens and their
            mean, as in C-RADIOv4.
        teacher_weights: Weight of each teacher in the loss, by name; equal weights by default.
        balance: "fixed" weights of the teachers, as in the paper, or "ada", which also divides each teacher's loss by
            its running mean.
        teacher_dropping: Probability with which a teacher is left out for an image, unless its loss is the highest for
            that image, such as 0.5; none by default.
        normalizer: What the student predicts of a teacher's patch tokens. "std": tokens normalised per channel, as in
            the paper. "scale": centred tokens, divided by one number. "phi_s", "whiten" and "power": also rotated, so
            that all channels have the same variance, and with the spectrum as it is (PHI-S), a flat one, or a power of
            it; they need covariances (theia store statistics).
        normalizer_exponent: Power of the spectrum that "power" keeps, between 0 (whiten) and 1 (phi_s).
        learning_rate: Learning rate after the warm-up, for a global batch of 128.
        scale_learning_rate: Whether to scale the learning rate linearly with the global batch.
        optimizer: Import path of the optimiser: AdamW as in the paper by default; timm.optim.Muon for matrices, with
            AdamW for the rest; or any other class of torch.optim.Optimizer.
        optimizer_options: Arguments of that class, such as {momentum: 0.9}, besides those that have options here.
        weight_decay: Weight decay of the optimiser.
        decay_rule: Rule for the parameters with weight decay: "matrices" (all but norms, biases, position embedding and
            tokens) or "authors" (all with more than one dimension).
        betas: Decay rates of AdamW's running means of the gradient and of its square.
        warmup: Share of all steps over which the learning rate rises linearly from 1 % to its full value.
        schedule: Learning rate after the warm-up: "constant" as in the paper; "cosine", which falls to zero; or "wsd"
            (warmup-stable-decay), constant and then linearly to zero over the last 20 % of all steps.
        ema: Decay of an exponential moving average of the weights, such as 0.9996, which is then validated, kept and
            exported instead of them; none by default.
        patch_dropout: Share of the patches of each training image that the student is not given, such as 0.5, for
            faster steps, as in FLIP (Li et al., 2022); 0 by default. Epoch and image decide which. Translators are
            given a learned token in their place, and all positions are compared. For vision transformers, and
            translators other than "ladder".
        shift: Probability, along each axis, with which a step moves the student's images by one cell of the teachers'
            grids, such as 0.3, so that patterns of fixed places in the teachers' features are not learned, as in
            C-RADIOv4; what both cover is compared. None by default. For teachers whose grids have cells in common.
        compile: Whether to compile with torch.compile: on a GPU the whole training step, which takes about a minute; on
            a CPU only the loss, which takes some seconds. By default on a GPU only.
        cuda_graphs: Whether a GPU replays forward and backward pass of the compiled step as CUDA graphs, which spares
            the host most of its work; validation is then not compiled. Experimental: it has not run on a GPU yet.
        options: Options of the student and its translators, as :class:`~theia.models.architecture.Architecture` names
            them.
    """

    def __init__(
        self,
        teachers: dict[str, dict[str, Any]],
        loss: dict[str, float] = PAPER,
        cls_loss: ClsLoss = "same",
        teacher_weights: dict[str, float] | None = None,
        balance: Balance = "fixed",
        teacher_dropping: float | None = None,
        normalizer: Normalizer = "std",
        normalizer_exponent: float = POWER,
        learning_rate: float = 5e-4,
        scale_learning_rate: bool = False,
        optimizer: str = ADAMW,
        optimizer_options: dict[str, Any] | None = None,
        weight_decay: float = 0.01,
        decay_rule: DecayRule = "matrices",
        betas: tuple[float, float] = BETAS,
        warmup: float = 0.1,
        schedule: Schedule = "constant",
        ema: float | None = None,
        patch_dropout: float = 0.0,
        shift: float | None = None,
        compile: bool | None = None,
        cuda_graphs: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        # jsonargparse finds the options of the command line in this call; the position rule is not among them.
        architecture = Architecture(teachers=teachers, positions="size", **options)
        self.feature_loss = FeatureLoss(loss)
        self.save_hyperparameters()
        self.hparams.update({**architecture.as_dict(), "loss": self.feature_loss.weights})
        check_number("model.warmup", warmup, 0, 1, below=True)  # a share of all steps
        check_number("model.learning_rate", learning_rate, 0, above=True)
        check_number("model.weight_decay", weight_decay, 0)
        for beta in betas:
            check_number("model.betas", beta, 0, 1, below=True)
        check_number("model.normalizer_exponent", normalizer_exponent, 0, 1)
        if normalizer != "power" and normalizer_exponent != POWER:
            raise ConfigError(
                f"--model.normalizer_exponent is of the normalizer 'power', and {normalizer!r} has none. Leave it out."
            )
        check_number("model.teacher_dropping", teacher_dropping, 0, 1)
        check_number("model.ema", ema, 0, 1, above=True, below=True)
        check_optimizer(optimizer, optimizer_options or {}, (betas[0], betas[1]))
        check_number("model.patch_dropout", patch_dropout, 0, 1, below=True)
        check_number("model.shift", shift, 0, 1)
        if schedule == "wsd" and warmup > 1 - DECAY:
            raise ConfigError(
                f"--model.warmup is {warmup}, but with model.schedule wsd the rate falls in the last {DECAY:.0%} of "
                f"all steps. Give at most {1 - DECAY}."
            )
        for name in ("width", "depth", "heads", "lift", "wide_last"):
            check_number(f"model.{name}", getattr(architecture, name), 1)
        # Pretrained weights are loaded when a training starts, as a checkpoint makes them needless.
        self.distiller = architecture.build().use_normalizer(normalizer, normalizer_exponent)
        student = self.distiller.student
        if patch_dropout and (architecture.translator == "ladder" or not student.backbone.takes_some_patches):
            raise ConfigError(
                "--model.patch_dropout is for a theia_* backbone or a plain vision transformer of timm, and for any "
                "translator but 'ladder'. Leave it out, or choose those."
            )
        # Beside the distiller, as no trained model needs it.
        self.mask_token = nn.Parameter(torch.zeros(student.width)) if patch_dropout else None
        self._grids = {name: (int(one["grid_hw"][0]), int(one["grid_hw"][1])) for name, one in teachers.items()}
        self._cells = common_cells(self._grids.values(), [architecture.image_size]) if shift else None
        self.needs_covariances = normalizer in NEED_COVARIANCE
        self.loss_weights = shares_of_teachers(teachers, teacher_weights)
        self.running = RunningLosses(len(teachers)) if balance == "ada" else None
        if cls_loss == "angle" and not architecture.distill_cls:
            raise ConfigError(
                "--model.cls_loss angle is a loss of CLS tokens. Set --model.distill_cls true, or leave it out."
            )
        by_angle = self.distiller.cls_teachers if cls_loss == "angle" else []
        self.dispersions = nn.ModuleDict({name: RunningMean() for name in by_angle})
        self.metrics = nn.ModuleDict(
            {stage: nn.ModuleDict({name: feature_metrics(stage, name) for name in teachers}) for stage in _HELD_OUT}
        )
        self.held_out_loss = MetricCollection(
            {name: SampleMean(self.feature_loss) for name in teachers}, compute_groups=False
        )
        self.norm_entropy = NormEntropy()
        self._bad = BadSteps(list(teachers))
        self._prepared = False
        self._seed = 0  # of what is drawn in a step
        self._course_record: dict[str, Any] = {}  # of a learning rate that decays
        of_images = teacher_dropping is not None
        self.objective = Objective(self.distiller, self.feature_loss.of_images if of_images else self.feature_loss)

    def setup(self, stage: str) -> None:
        """Takes the seed of the data, and tells them, before they make a loader, which CLS tokens need to be read."""
        data: _FeatureData | None = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is not None:
            data.cls_teachers, self._seed = self.distiller.cls_teachers, data.seed

    def check_steps(self, data: _FeatureData, device: torch.device) -> None:
        """Refuses training data of which the student, its objective or its compiled step cannot take every batch.

        Args:
            data: Training data.
            device: Device of the training.

        Raises:
            ConfigError: If some do not fit. For sizes of images, the message names the nearest ones that do.
        """
        sizes, every, drawn = set(data.image_sizes), len(self.loss_weights), data.teachers_per_step
        if drawn == 1 < every and self.hparams["teacher_dropping"] is not None:
            raise ConfigError(
                "With data.teachers_per_step 1, model.teacher_dropping has no teacher to leave out. Leave out one of "
                "the two."
            )
        if every == 1 and (self.running is not None or self.hparams["teacher_dropping"] is not None):
            logger.warning("With one teacher, model.teacher_dropping and model.balance have no effect.")
        idle = [name for name, weight in self.loss_weights.items() if weight == 0]
        if drawn is not None and idle:
            raise ConfigError(
                f"data.teachers_per_step would draw {idle[0]}, whose weight in the loss is 0. Leave that teacher out."
            )
        if self._cells is not None:
            common_cells(self._grids.values(), sizes)
        if drawn is not None and self._compiles(device):
            kinds = {"": 1}
            if device.type == "cuda":  # on a CPU, only the loss is compiled, which does not see the images
                kinds[f" and {len(sizes)} sizes of images"] = len(sizes)
            if self._cells is not None:  # how many tokens there are to compare depends on the axes of a shift
                count = 3 if all(rows == columns for rows, columns in self._grids.values()) else 4
                kinds[f" and {count} kinds of shifts"] = count
            more, count = max(kinds.items(), key=lambda kind: kind[1])
            versions = math.comb(every, drawn) * count
            if versions > _MOST_VERSIONS:
                raise ConfigError(
                    f"data.teachers_per_step {drawn} of {every} teachers{more} are {versions} steps to compile; at "
                    f"most {_MOST_VERSIONS} can be. Choose another number, or train without it: --model.compile false."
                )
        if sizes and self.mask_token is not None:
            raise ConfigError("data.image_sizes and model.patch_dropout do not go together. Leave one of them out.")
        for size in sizes:
            try:
                self.distiller.student.backbone.check_size(size, size)
            except ShapeError as error:
                raise ConfigError(f"data.image_sizes has {size}. {error}") from error

    def on_fit_start(self) -> None:
        """Loads weights and statistics into a new model, as the start of a validation or test does too."""
        self._bad.forget()
        self._prepare()
        graphs = self.hparams["cuda_graphs"]
        if graphs and (self.hparams["compile"] is False or self.trainer.accumulate_grad_batches > 1):
            raise ConfigError(
                "model.cuda_graphs needs a compiled step whose gradients last for one batch. Leave it out, or "
                "leave out model.compile: false and trainer.accumulate_grad_batches."
            )
        if self._compiles(self.device):
            self.objective.compile(self.device, graphs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes that weights and statistics come from the checkpoint, and renames entries of earlier versions."""
        older.checkpoint(checkpoint)
        self._prepared = True

    def configure_callbacks(self) -> list[L.Callback]:
        """What averages the weights of a training, if they are to be averaged."""
        averages = self.hparams["ema"] is not None and self.trainer.state.fn == TrainerFn.FITTING
        return [WeightAverage(self.hparams["ema"])] if averages else []

    def configure_optimizers(self) -> Any:
        """The optimiser with a linear warm-up, and the learning rate of the schedule."""
        options = self.hparams
        rate = options["learning_rate"]
        if options["scale_learning_rate"]:
            data: _FeatureData = self.trainer.datamodule  # type: ignore[attr-defined]
            rate = scale_learning_rate(rate, data.batch_size * self.trainer.accumulate_grad_batches)
        clips = bool(self.trainer.gradient_clip_val)
        decay, rule, betas = (options[name] for name in ("weight_decay", "decay_rule", "betas"))
        name, given = options["optimizer"], options["optimizer_options"]
        optimizer = build_optimizer(
            self, rate, decay, rule, fused=not clips, betas=tuple(betas), name=name, options=given
        )
        steps = int(self.trainer.estimated_stepping_batches)
        course = Course(options["schedule"], steps, round(options["warmup"] * steps))
        if course.schedule != "constant":
            batches, summed = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
            self._course_record = {"steps": steps, "steps_per_epoch": math.ceil(batches / summed)}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": learning_rate_schedule(optimizer, course), "interval": "step"},
        }

    @property
    def logs(self) -> bool:
        """Whether Lightning logs the current step. On other steps the host does not wait for the device."""
        return bool((self.global_step + 1) % self.trainer.log_every_n_steps == 0)  # type: ignore[attr-defined]

    def training_step(self, batch: FeatureBatch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        batch, overlaps = self._shifted(batch, batch_idx)
        by_teacher, predictions = self.objective(batch, self._some_patches(batch), self._dispersions(batch), overlaps)
        if self.logs:
            self._log_terms(self.distiller.per_channel(predictions), batch, overlaps)
        self._bad.note(by_teacher, self.global_step)
        total = self._total(by_teacher, batch)
        if self.logs:
            self._bad.stop(partial(self.trainer.strategy.reduce, reduce_op="min"))
            self.log("train/loss", total, prog_bar=shows_logged(self.trainer), sync_dist=True)
            rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
            self.log("train/learning_rate", rate, rank_zero_only=True)
        return total

    def validation_step(self, batch: FeatureBatch, batch_idx: int) -> None:
        """Adds one held-out batch to the metrics."""
        self._score(batch, "val")

    def test_step(self, batch: FeatureBatch, batch_idx: int) -> None:
        """Adds one batch of a test to the metrics."""
        self._score(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of all held-out samples, over all processes."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics of all held-out samples, over all processes."""
        self._log_scores("test")

    def on_validation_start(self) -> None:
        """Stops if a loss was not finite, so that such weights are never scored or kept as the best."""
        self._prepare()
        self._bad.stop(partial(self.trainer.strategy.reduce, reduce_op="min"))

    def on_test_start(self) -> None:
        """Loads weights and statistics into a new model."""
        self._prepare()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stops if a loss is not finite, so that the last checkpoint stays, and drops the folder of a weights file."""
        self._bad.stop(partial(self.trainer.strategy.reduce, reduce_op="min"))
        options = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        options["weights"] = weights_name(options["weights"])
        if self._course_record:
            checkpoint[COURSE] = self._course_record

    def start_untrained(self, checkpoint: Mapping[str, Tensor]) -> None:
        """Makes a new model comparable with a trained one: own initial weights, but the statistics of the trained one.

        Args:
            checkpoint: State dict of the trained model.

        Raises:
            WeightsError: If the pretrained weights to start from cannot be fetched or read.
        """
        try:
            self.distiller.student.load_weights()
        except WeightsError as error:
            raise WeightsError(f"{error} Or leave out the comparison: --compare_untrained false.") from error
        statistics = {name: value for name, value in checkpoint.items() if "scalers." in name}
        self.load_state_dict(statistics, strict=False)
        self._prepared = True

    def _prepare(self) -> None:
        """Loads pretrained weights and the statistics of the data, unless a checkpoint brought both."""
        if self._prepared:
            return
        self.distiller.student.load_weights()
        data: _FeatureData = self.trainer.datamodule  # type: ignore[attr-defined]
        covariances = data.covariances() if self.needs_covariances else {}
        for name, one in data.statistics().items():
            covariance = covariances.get(name)
            self.distiller.set_statistics(name, one.mean, one.std, one.cls_mean, one.cls_std, covariance)
        self._prepared = True

    def _some_patches(self, batch: FeatureBatch) -> SomePatches | None:
        """The patches that the student is given; ``None`` for all.

        Raises:
            ConfigError: If images without numbers are to lose patches.
        """
        if self.mask_token is None:
            return None
        if batch.rows is None:
            raise ConfigError("--model.patch_dropout needs batches with 'rows', by which patches are drawn. Give them.")
        rows, columns = self.distiller.student.grid_hw
        count = max(1, round((1 - self.hparams["patch_dropout"]) * rows * columns))
        draws = (np.random.default_rng([self._seed, self.current_epoch, row]) for row in batch.rows.tolist())
        drawn = [random.permutation(rows * columns)[:count] for random in draws]
        kept = torch.from_numpy(np.sort(drawn, 1)).to(self.device, non_blocking=True)
        return SomePatches(kept, self.mask_token)

    def _shifted(self, batch: FeatureBatch, number: int) -> tuple[FeatureBatch, dict[str, tuple[Tensor, Tensor]]]:
        """The batch with images that may be shifted, and the tokens to compare then, by teacher; of none for all."""
        if self._cells is None:
            return batch, {}
        shift = draw_shift(self._cells, self.hparams["shift"], self._seed, self.current_epoch, number)
        if shift is None:
            return batch, {}
        overlaps = {name: shift.overlap(self._grids[name], batch.images.device) for name in batch.patches}
        return replace(batch, images=shift.images(batch.images)), overlaps

    @torch.no_grad()
    def _dispersions(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """Mean squared angle so far between each teacher's CLS tokens and their mean, over all processes."""
        there = [name for name in self.dispersions if name in batch.cls]
        if not there:
            return {}
        means = [self.distiller.mean_cls(name) for name in there]
        angles = [
            angle(mean.expand_as(batch.cls[name]), batch.cls[name]) for name, mean in zip(there, means, strict=True)
        ]
        squares = self.trainer.strategy.reduce(torch.stack([one.square().mean() for one in angles]), reduce_op="mean")
        return {
            name: cast(RunningMean, self.dispersions[name]).update(square)
            for name, square in zip(there, squares, strict=True)
        }

    def _normalized(self, batch: FeatureBatch, name: str) -> Tensor:
        return self.distiller.normalize(name, batch.patches[name], batch.scales.get(name))

    def _compiles(self, device: torch.device) -> bool:
        wanted = self.hparams["compile"]
        return bool(device.type == "cuda" if wanted is None else wanted)

    def _log_terms(
        self,
        predictions: Mapping[str, Tensor],
        batch: FeatureBatch,
        overlaps: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        for name in self.distiller.teachers:
            # Lightning would repeat the last value of a teacher that the step did without.
            terms = dict.fromkeys(("cosine", "smooth_l1", "mse"), torch.full((), torch.nan, device=self.device))
            if name in predictions:
                prediction, target = predictions[name].detach(), self._normalized(batch, name)
                if name in overlaps:
                    seen, there = overlaps[name]
                    prediction, target = prediction[:, seen], target[:, there]
                terms = {
                    "cosine": 1 - losses.cosine_loss(prediction, target),
                    "smooth_l1": losses.smooth_l1_loss(prediction, target),
                    "mse": losses.mse_loss(prediction, target),
                }
            self.log_dict({f"train/{term}/{name}": value for term, value in terms.items()}, sync_dist=True)

    def _score(self, batch: FeatureBatch, stage: str) -> None:
        tokens, predictions, _ = self.objective.translate(batch.images)
        normalized = self.distiller.per_channel(predictions)
        for name, prediction in predictions.items():
            target = self._normalized(batch, name)
            # ModuleDict of ModuleDicts
            self.metrics[stage][name].update(normalized[name], target)  # type: ignore[index]
            self.held_out_loss[name].update(prediction, self.distiller.as_target(name, target))
        self.norm_entropy.update(tokens.patches)

    def _log_scores(self, stage: str) -> None:
        # torchmetrics has summed over the processes already; sync_dist only avoids a warning by Lightning.
        for metrics in self.metrics[stage].values():  # type: ignore[operator]  # ModuleDict of ModuleDicts
            self.log_dict(metrics.compute(), sync_dist=True)
            metrics.reset()
        loss = weighted_mean(self.held_out_loss.compute(), self.loss_weights)
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True)
        self.log(f"{stage}/norm_entropy", self.norm_entropy.compute(), sync_dist=True)
        self.held_out_loss.reset()
        self.norm_entropy.reset()

    def _total(self, by_teacher: dict[str, Tensor], batch: FeatureBatch) -> Tensor:
        """The loss of a step from those of the teachers, which are scalars, or ``(B,)`` if teachers are dropped."""
        over_processes = partial(self.trainer.strategy.reduce, reduce_op="mean")
        probability, seed, step = self.hparams["teacher_dropping"], self._seed, self.global_step
        return total_loss(
            by_teacher, self.loss_weights, self.running, probability, seed, step, batch.rows, over_processes
        )
