"""A killed run goes on at the very next sample and ends with the same weights, bit for bit."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch._dynamo.utils import counters

from theia.data.datamodule import FeatureData
from theia.training.averaging import TRAINED
from theia.training.checkpoints import Checkpoints
from theia.training.distillation import Distillation

EPOCHS, STEPS = 3, 5  # 80 samples in batches of 16


class Killed(BaseException):
    """Stands for the moment at which a process is killed: only what is on disk survives it."""


class Recorder(L.Callback):
    """Notes the rows of each step and the losses of each validation; stops dead before a step or in a validation."""

    def __init__(self, kill_at: int | None = None, kill_in_validation_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.kill_in_validation_at = kill_in_validation_at
        self.rows: dict[int, list[int]] = {}
        self.validations: dict[int, float] = {}

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.kill_in_validation_at:
            raise Killed

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.validations[trainer.global_step] = float(trainer.callback_metrics["val/loss"])

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.kill_at:
            raise Killed
        self.rows[trainer.global_step] = batch.rows.tolist()


def fit(
    store: Path,
    folder: Path,
    recorder: Recorder,
    resume: Path | None = None,
    every: int = 3,
    compile: bool = False,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    **trainer: Any,
) -> Distillation:
    L.seed_everything(0)
    torch.compiler.reset()  # each fit stands for a process of its own, which compiles anew
    stored = FeatureData(str(store), batch_size=16, workers=1, **(data or {}))
    module = Distillation(
        stored.teacher_shapes, image_size=32, learning_rate=1e-2, compile=compile,
        **{"width": 16, "depth": 1, "heads": 2, **(recipe or {})},
    )  # fmt: skip
    L.Trainer(
        max_epochs=EPOCHS, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[recorder, Checkpoints(folder, every)], default_root_dir=folder, **{"accelerator": "cpu", **trainer},
    ).fit(module, stored, ckpt_path=resume)  # fmt: skip
    return module


@pytest.fixture(scope="module")
def uninterrupted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Distillation]:
    recorder = Recorder()
    return recorder, fit(store, tmp_path_factory.mktemp("whole"), recorder)


@pytest.mark.parametrize(("every", "kill_at"), [(3, 4), (3, 8), (5, 7), (5, 10)])
def test_a_killed_run_ends_like_an_uninterrupted_one(
    store: Path, tmp_path: Path, uninterrupted: tuple[Recorder, Distillation], every: int, kill_at: int
) -> None:
    with pytest.raises(Killed):
        fit(store, tmp_path, Recorder(kill_at), every=every)
    resumed = Recorder()

    module = fit(store, tmp_path, resumed, tmp_path / "last.ckpt")

    whole, reference = uninterrupted
    # The latest step before the kill at which a checkpoint was due: every so many, and after each epoch's validation.
    first = max(step for step in range(kill_at + 1) if step % every == 0 or step % STEPS == 0)
    assert resumed.rows == {step: rows for step, rows in whole.rows.items() if step >= first}
    for name, value in reference.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_a_killed_run_with_patches_left_out_ends_like_an_uninterrupted_one(
    store: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = {"patch_dropout": 0.5, "ema": 0.8}
    reference = fit(store, tmp_path_factory.mktemp("whole"), Recorder(), recipe=recipe)
    with pytest.raises(Killed):
        fit(store, tmp_path, Recorder(8), recipe=recipe)
    torch.rand(7)  # no draw of the process matters

    module = fit(store, tmp_path, Recorder(), tmp_path / "last.ckpt", recipe=recipe)

    assert module.mask_token is not None
    assert module.mask_token.any()
    for name, value in reference.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["mlp", "ladder", "transformer"])
def test_a_killed_run_with_another_translator_ends_like_an_uninterrupted_one(
    store: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    recipe = {"depth": 2, "translator": kind}
    reference = fit(store, tmp_path_factory.mktemp("whole"), Recorder(), recipe=recipe)
    with pytest.raises(Killed):
        fit(store, tmp_path, Recorder(8), recipe=recipe)

    module = fit(store, tmp_path, Recorder(), tmp_path / "last.ckpt", recipe=recipe)

    for name, value in reference.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


@pytest.mark.parametrize(
    ("recipe", "data", "options"),
    [
        ({}, {"teachers_per_step": 1}, {}),
        ({"balance": "ada", "ema": 0.8}, {"teachers_per_step": 1}, {"val_check_interval": 2}),
        ({"distill_cls": True, "cls_loss": "angle"}, {"teachers_per_step": 1}, {"compile": True}),
        ({"teacher_weights": {"alpha": 2.0}}, {"teachers_per_step": 1}, {"accumulate_grad_batches": 2}),
        ({"shift": 0.7}, {"teachers": "alpha"}, {"accumulate_grad_batches": 2}),
        ({"shift": 0.7}, {"teachers": "alpha"}, {"compile": True}),
    ],
    ids=str,
)
def test_a_killed_run_whose_steps_draw_teachers_or_shifts_ends_like_an_uninterrupted_one(
    store: Path, tmp_path: Path, recipe: dict[str, Any], data: dict[str, Any], options: dict[str, Any]
) -> None:
    reference = fit(store, tmp_path / "whole", Recorder(), recipe=recipe, data=data, **options)
    with pytest.raises(Killed):
        fit(store, tmp_path / "killed", Recorder(7), recipe=recipe, data=data, **options)

    last = tmp_path / "killed" / "last.ckpt"
    module = fit(store, tmp_path / "killed", Recorder(), last, recipe=recipe, data=data, **options)

    for name, value in reference.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_drawing_all_teachers_is_drawing_none(
    store: Path, tmp_path: Path, uninterrupted: tuple[Recorder, Distillation]
) -> None:
    module = fit(store, tmp_path, Recorder(), data={"teachers_per_step": 2})

    for name, value in uninterrupted[1].state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


# On a GPU the whole step is compiled. Some kernels add in the order in which they happen to end, unless this is on.
GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "deterministic": True, "limit_val_batches": 0}


@pytest.fixture
def _any_algorithm() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)  # Lightning leaves them on


@pytest.mark.usefixtures("_any_algorithm")
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({**GPU, "precision": "32-true"}, marks=pytest.mark.gpu),
        pytest.param({**GPU, "precision": "bf16-mixed"}, marks=pytest.mark.gpu),
    ],
    ids=["cpu", "gpu in float32", "gpu in bfloat16"],
)
def test_a_killed_run_that_is_compiled_ends_like_an_uninterrupted_one(
    store: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    reference = fit(store, tmp_path / "whole", Recorder(), compile=True, **options)
    with pytest.raises(Killed):
        fit(store, tmp_path / "killed", Recorder(8), compile=True, **options)
    counters.clear()

    module = fit(store, tmp_path / "killed", Recorder(), tmp_path / "killed" / "last.ckpt", compile=True, **options)

    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0
    for name, value in reference.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


@pytest.mark.parametrize(
    ("recipe", "kill_at", "options"),
    [
        ({"schedule": "cosine"}, 8, {}),
        ({"schedule": "wsd", "betas": (0.9, 0.95)}, 14, {}),  # while the rate falls
        ({"schedule": "cosine", "optimizer": "timm.optim.Muon"}, 8, {}),
        ({"balance": "ada", "teacher_dropping": 0.5}, 8, {}),
        ({"distill_cls": True, "cls_loss": "angle", "ema": 0.8, "lift": 24}, 8, {}),
        ({"schedule": "cosine", "wide_last": 24, "depth": 2, "patch_dropout": 0.5}, 8, {}),
        ({"teacher_dropping": 0.5, "normalizer": "scale"}, 7, {"compile": True}),
        ({"schedule": "cosine", "ema": 0.8}, 7, {"accumulate_grad_batches": 2}),
        ({"ema": 0.8}, 8, {"val_check_interval": 2}),
        ({"ema": 0.8}, 8, {"compile": True}),
        ({"ema": 0.8, "backbone": "timm:test_resnet"}, 8, {}),  # batch norms
    ],
    ids=str,
)
def test_a_killed_run_goes_on_with_its_learning_rate_and_its_average(
    store: Path, tmp_path: Path, recipe: dict[str, Any], kill_at: int, options: dict[str, Any]
) -> None:
    if "backbone" in recipe:
        recipe |= {"width": None, "depth": None, "heads": None}
    whole = Recorder()
    fit(store, tmp_path / "whole", whole, recipe=recipe, **options)
    with pytest.raises(Killed):
        fit(store, tmp_path / "killed", Recorder(kill_at), recipe=recipe, **options)
    resumed = Recorder()

    fit(store, tmp_path / "killed", resumed, tmp_path / "killed" / "last.ckpt", recipe=recipe, **options)

    assert resumed.validations == {step: whole.validations[step] for step in resumed.validations}
    for name in ("last", "best"):
        ours, theirs = (
            torch.load(tmp_path / folder / f"{name}.ckpt", weights_only=True) for folder in ("killed", "whole")
        )
        assert ours["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]
        assert ours["lr_schedulers"] == theirs["lr_schedulers"]
        assert (TRAINED in theirs) == ("ema" in recipe)
        for part in ("state_dict", *([TRAINED] if "ema" in recipe else [])):
            assert ours[part].keys() == theirs[part].keys()
            for weight, value in theirs[part].items():
                assert torch.equal(value, ours[part][weight]), weight


def test_a_run_killed_twice_in_validation_intervals_ends_the_same(
    store: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    intervals = {"val_check_interval": 2}
    whole = Recorder()
    reference = fit(store, tmp_path_factory.mktemp("whole"), whole, **intervals)
    with pytest.raises(Killed):
        fit(store, tmp_path, Recorder(4), **intervals)
    with pytest.raises(Killed):
        fit(store, tmp_path, Recorder(11), tmp_path / "last.ckpt", **intervals)
    resumed = Recorder()

    module = fit(store, tmp_path, resumed, tmp_path / "last.ckpt", **intervals)

    assert resumed.rows == {step: rows for step, rows in whole.rows.items() if step >= 9}
    assert resumed.validations == {step: loss for step, loss in whole.validations.items() if step > 9}
    for name, value in reference.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


@pytest.mark.parametrize("interval", [{}, {"check_val_every_n_epoch": 2}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_validation_that_was_killed_is_made_up_for(
    store: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, interval: dict[str, int]
) -> None:
    whole_folder = tmp_path_factory.mktemp("whole")
    whole = Recorder()
    reference = fit(store, whole_folder, whole, every=5, **interval)
    last_validation = max(whole.validations)
    with pytest.raises(Killed):
        fit(store, tmp_path, Recorder(kill_in_validation_at=last_validation), every=5, **interval)
    resumed = Recorder()
    last = tmp_path / "last.ckpt"

    module = fit(store, tmp_path, resumed, last if last.exists() else None, every=5, **interval)

    assert resumed.validations[last_validation] == whole.validations[last_validation]
    best, ours = (torch.load(folder / "best.ckpt", weights_only=True) for folder in (whole_folder, tmp_path))
    assert ours["global_step"] == best["global_step"]
    for name, value in reference.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_a_finished_run_can_be_prolonged(store: Path, tmp_path: Path) -> None:
    fit(store, tmp_path, Recorder())
    longer = Recorder()
    L.seed_everything(0)
    data = FeatureData(str(store), batch_size=16, workers=0)
    module = Distillation(data.teacher_shapes, image_size=32, width=16, depth=1, heads=2)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=EPOCHS + 1, logger=False, enable_progress_bar=False, callbacks=[longer],
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip

    trainer.fit(module, data, ckpt_path=tmp_path / "last.ckpt")

    assert sorted(longer.rows) == list(range(EPOCHS * STEPS, (EPOCHS + 1) * STEPS))


def test_a_checkpoint_loads_without_running_code(store: Path, tmp_path: Path) -> None:
    fit(store, tmp_path, Recorder())

    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)

    assert checkpoint["hyper_parameters"]["width"] == 16
    assert checkpoint["hyper_parameters"]["teachers"]["beta"] == {"channels": 5, "grid_hw": [3, 6], "has_cls": True}
