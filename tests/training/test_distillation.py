from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from theia.data.datamodule import FeatureData
from theia.errors import ConfigError
from theia.training.callbacks import Throughput, TrainingProgress
from theia.training.distillation import Distillation
from theia.training.losses import cosine_loss, smooth_l1_loss
from theia.types import FeatureBatch

SMALL = {"image_size": 32, "width": 16, "depth": 1, "heads": 2}


def fit(store: Path, data: dict[str, Any] | None = None, epochs: int = 1, **options: Any) -> Distillation:
    L.seed_everything(0)
    module = FeatureData(str(store), batch_size=16, workers=0, **(data or {}))
    model = Distillation(module.teacher_shapes, **{**SMALL, **options})
    trainer(max_epochs=epochs).fit(model, module)
    return model


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def test_the_loss_is_the_papers_on_features_normalised_over_the_training_split(store: Path) -> None:
    data = FeatureData(str(store), batch_size=80, workers=0)
    model = Distillation(data.teacher_shapes, **SMALL)
    L_trainer = trainer(max_epochs=1, limit_val_batches=0)
    L_trainer.fit(model, data)
    batch = next(iter(FeatureData(str(store), batch_size=80, workers=0).train_dataloader()))
    _, predictions, _ = model.distiller(batch.images)
    expected = 0.0
    for name, prediction in predictions.items():
        raw = batch.patches[name].double()  # the whole training split, so its own statistics are the store's
        target = (raw - raw.mean((0, 1))) / raw.std((0, 1), correction=0)
        expected += float(0.9 * cosine_loss(prediction, target) + 0.1 * smooth_l1_loss(prediction, target)) / 2

    model.trainer = L_trainer
    model.log = lambda *args, **kwargs: None

    assert float(model.training_step(batch, 0)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": {"mse": 1.0}}, {"loss": {"cosine_per_token": 1.0}}, {"translator": "linear"},
        {"translator": "mlp"}, {"translator": "ladder"}, {"translator": "transformer"},
        {"registers": 0}, {"registers": 4}, {"distill_cls": True}, {"patch_dropout": 0.5},
        {"lift": 24}, {"lift": 24, "patch_dropout": 0.5}, {"wide_last": 64}, {"wide_last": 64, "patch_dropout": 0.5},
        {"teacher_weights": {"alpha": 2.0}}, {"decay_rule": "authors"},
        {"scale_learning_rate": True},
    ],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)  # fmt: skip
def test_every_ablation_trains_and_learns(store: Path, options: dict[str, Any]) -> None:
    # Scaled, the learning rate is that of a batch of 16: an eighth.
    rate = 8e-2 if "scale_learning_rate" in options else 1e-2
    model = fit(store, epochs=6, learning_rate=rate, **options)
    data = FeatureData(str(store), batch_size=16, workers=0)
    untrained = Distillation(data.teacher_shapes, **{**SMALL, **options})

    before, after = (trainer().test(each, data, verbose=False)[0]["test/loss"] for each in (untrained, model))

    assert after < 0.98 * before


def test_int8_features_are_scaled_back(tmp_path: Path, store: Path, make_split: Any) -> None:
    for split, rows in (("train", 80), ("val", 20)):
        make_split(tmp_path / "int8", split, rows, "int8")

    exact, rounded = (fit(root, learning_rate=1e-2) for root in (store, tmp_path / "int8"))

    for name, value in exact.state_dict().items():
        torch.testing.assert_close(rounded.state_dict()[name], value, rtol=0.1, atol=0.05)


def test_weights_for_an_unknown_teacher_are_refused() -> None:
    shapes = {"alpha": {"channels": 8, "grid_hw": [4, 4], "has_cls": False}}

    with pytest.raises(ConfigError, match="gamma"):
        Distillation(shapes, **SMALL, teacher_weights={"gamma": 1.0})


def test_the_learning_rate_rises_from_a_hundredth_over_the_warm_up(store: Path) -> None:
    class Rates(L.Callback):
        seen: list[float]

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    rates.seen = []
    data = FeatureData(str(store), batch_size=16, workers=0)
    model = Distillation(data.teacher_shapes, **SMALL, learning_rate=1e-3, warmup=0.4)
    trainer(max_epochs=2, callbacks=[rates]).fit(model, data)

    assert rates.seen == pytest.approx([1e-5, 2.575e-4, 5.05e-4, 7.525e-4] + [1e-3] * 6)


def test_pretrained_weights_are_read_for_a_new_run_but_not_for_a_checkpoint(store: Path, tmp_path: Path) -> None:
    deit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=3
    )
    weights = tmp_path / "deit.pth"
    torch.save(deit.state_dict(), weights)
    data = FeatureData(str(store), batch_size=16, workers=0)
    model = Distillation(data.teacher_shapes, **SMALL, weights=str(weights), learning_rate=1e-30)
    one = trainer(max_epochs=1)
    one.fit(model, data)
    one.save_checkpoint(tmp_path / "run.ckpt")
    weights.unlink()
    later = Distillation(data.teacher_shapes, **SMALL, weights=str(weights))

    trainer().test(later, data, ckpt_path=tmp_path / "run.ckpt", verbose=False)

    torch.testing.assert_close(
        later.distiller.student.backbone.model.patch_embed.proj.weight, deit.patch_embed.proj.weight
    )


class Steps(L.Callback):
    """Watches each step from its start to the start of the next: Lightning reads values after all callbacks.

    Args:
        begin: Function that is told the number of a step when it starts.
        end: Function to call when the step has ended.
    """

    def __init__(self, begin: Callable[[int], None], end: Callable[[], None]) -> None:
        self.begin, self.end = begin, end
        self.watching = False

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.stop()
        self.watching = True
        self.begin(trainer.global_step)

    def on_train_epoch_end(self, *args: Any) -> None:
        self.stop()

    def stop(self) -> None:
        if self.watching:
            self.watching = False
            self.end()


def watched_run(
    store: Path, folder: Path, resumed: bool, steps: Steps, accelerator: str = "cpu", **options: Any
) -> None:
    """Three epochs of five steps with a progress bar, which log every third; of a resumed run, only the last two."""

    def run(epochs: int, resume: Path | None, callbacks: list[L.Callback]) -> L.Trainer:
        data = FeatureData(str(store), batch_size=16, workers=0)
        model = Distillation(data.teacher_shapes, **SMALL, **options)
        if accelerator == "cpu":  # its AdamW asks for its own step counts; the GPU's does not
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            model.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
        whole = L.Trainer(
            accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
            max_epochs=epochs, limit_val_batches=0, log_every_n_steps=3,
            callbacks=[*callbacks, Throughput(), TrainingProgress()],
        )  # fmt: skip
        whole.fit(model, data, ckpt_path=resume)
        return whole

    if resumed:
        run(1, None, []).save_checkpoint(folder / "run.ckpt")
    run(3, folder / "run.ckpt" if resumed else None, [steps])


LOGGED = {2, 5, 8, 11, 14}


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_a_step_that_does_not_log_asks_the_device_for_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    counts: dict[int, int] = {}  # by step, values handed to the host: each would stall a GPU
    current: list[int] = []

    class Transfers(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._local_scalar_dense.default:
                note()
            return function(*args, **(kwargs or {}))

    transfers = Transfers()

    def note() -> None:
        if current:
            counts[current[0]] += 1

    def begin(step: int) -> None:
        current.append(step)
        counts[step] = 0
        transfers.__enter__()

    def end() -> None:
        current.clear()
        transfers.__exit__(None, None, None)

    for name in ("tolist", "cpu", "numpy"):
        plain = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *args: Any, plain: Any = plain, **options: Any) -> Any:
            note()
            return plain(tensor, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)

    watched_run(store, tmp_path, resumed, Steps(begin, end))

    steps = range(5 if resumed else 0, 15)
    assert {step: count > 0 for step, count in counts.items()} == {step: step in LOGGED for step in steps}


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_the_host_never_waits_for_a_gpu_in_a_step_that_does_not_log(
    store: Path, tmp_path: Path, resumed: bool, compiled: bool
) -> None:
    first_logged = 5 if resumed else 2  # until then, what is compiled or chosen by measurement may wait
    watched = []

    def begin(step: int) -> None:
        if step > first_logged and step not in LOGGED:
            watched.append(step)
            torch.cuda.set_sync_debug_mode("error")

    def end() -> None:
        torch.cuda.set_sync_debug_mode("default")

    one = torch.ones(1, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchroniz"):
            one.item()
        end()
        watched_run(store, tmp_path, resumed, Steps(begin, end), "gpu", compile=compiled)
    finally:
        end()

    assert watched == [step for step in range(first_logged, 15) if step not in LOGGED]


def test_the_scaled_learning_rate_is_linear_in_the_global_batch(store: Path) -> None:
    data = FeatureData(str(store), batch_size=16, workers=0)
    model = Distillation(data.teacher_shapes, **SMALL, learning_rate=8e-2, scale_learning_rate=True, warmup=0)
    one = trainer(max_epochs=1)
    one.fit(model, data)

    assert one.optimizers[0].param_groups[0]["lr"] == pytest.approx(8e-2 * 16 / 128)


class Cls(L.Callback):
    """Keeps the CLS tokens of each training step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: FeatureBatch, *_: Any) -> None:
        self.seen.append(batch.cls["beta"].double().clone())


def angles(tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return torch.arccos(torch.cosine_similarity(tokens, others, dim=-1))


@pytest.mark.parametrize("options", [{}, {"compile": True}, {"teacher_dropping": 0.0}], ids=str)
def test_a_cls_token_is_compared_by_its_angle_over_the_teachers_dispersion(
    store: Path, options: dict[str, Any]
) -> None:
    torch.compiler.reset()
    L.seed_everything(0)
    data = FeatureData(str(store), batch_size=16, workers=0)
    model = Distillation(
        data.teacher_shapes, **SMALL, learning_rate=1e-2, distill_cls=True, cls_loss="angle",
        loss={"mse": 1.0}, **options,
    )  # fmt: skip
    cls = Cls()
    model.trainer = trainer(max_epochs=2, limit_val_batches=0, callbacks=[cls])
    model.trainer.fit(model, data)
    model.log = lambda *args, **kwargs: None

    mean = torch.from_numpy(data.statistics()["beta"].cls_mean)
    squares = [angles(tokens, mean).square().mean() for tokens in cls.seen]
    assert list(model.dispersions) == ["beta"]
    dispersion = model.dispersions["beta"].mean
    assert float(dispersion) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-4)

    batch = next(iter(data.train_dataloader()))
    total = model.training_step(batch, 0)

    _, patches, cls_tokens = model.distiller(batch.images)
    std = torch.from_numpy(data.statistics()["beta"].cls_std)
    found = angles(cls_tokens["beta"].double() * std + mean, batch.cls["beta"].double()).square().mean()
    squares.append(angles(batch.cls["beta"].double(), mean).square().mean())
    errors = {
        name: (patches[name] - model.distiller.normalize(name, batch.patches[name])).square().mean() for name in patches
    }
    expected = (errors["alpha"] + (errors["beta"] + found / torch.stack(squares).mean()) / 2) / 2
    assert float(total) == pytest.approx(float(expected), rel=1e-3)


def test_a_student_that_knows_only_the_mean_has_the_cls_loss_one(store: Path) -> None:
    data = FeatureData(str(store), batch_size=80, workers=0)
    model = Distillation(data.teacher_shapes, **SMALL, distill_cls=True, cls_loss="angle")
    batch = next(iter(data.train_dataloader()))
    for name, one in data.statistics().items():
        model.distiller.set_statistics(name, one.mean, one.std, one.cls_mean, one.cls_std)
    model.trainer = trainer()
    dispersions = model._dispersions(batch)
    targets = {name: model.distiller.normalize(name, patches) for name, patches in batch.patches.items()}

    losses = model.objective.compare(targets, {"beta": torch.zeros(80, 5)}, batch, dispersions)

    assert float(losses["beta"]) == pytest.approx(1 / 2, rel=1e-4)  # the mean with that of perfect patches


def test_a_loss_of_cls_tokens_needs_some() -> None:
    shapes = {"alpha": {"channels": 8, "grid_hw": [4, 4], "has_cls": True}}
    with pytest.raises(ConfigError, match=r"cls_loss angle is a loss of CLS tokens\. Set --model\.distill_cls true"):
        Distillation(shapes, **SMALL, cls_loss="angle")
    assert not list(Distillation(shapes, **SMALL, distill_cls=True).dispersions)


def test_an_exponent_is_of_the_normalizer_that_has_one() -> None:
    shapes = {"alpha": {"channels": 8, "grid_hw": [4, 4], "has_cls": False}}
    with pytest.raises(ConfigError, match="normalizer_exponent is of the normalizer 'power', and 'whiten' has none"):
        Distillation(shapes, **SMALL, normalizer="whiten", normalizer_exponent=0.7)
    Distillation(shapes, **SMALL, normalizer="power", normalizer_exponent=0.7)


@pytest.mark.parametrize("option", [{"balance": "ada"}, {"teacher_dropping": 0.5}, {}])
def test_what_one_teacher_makes_idle_is_told(option: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    data: Any = SimpleNamespace(image_sizes=[], teachers_per_step=None)
    for names in ("a", "ab"):
        shapes = {name: {"channels": 8, "grid_hw": [4, 4], "has_cls": False} for name in names}
        Distillation(shapes, **SMALL, **option).check_steps(data, torch.device("cpu"))
        assert ("With one teacher" in caplog.text) == (names == "a" and bool(option))
        caplog.clear()


class Drawn(L.Callback):
    """Notes which teachers each step has, and which translators it changes."""

    def __init__(self) -> None:
        self.there: list[set[str]] = []
        self.changed: list[set[str]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: FeatureBatch, *_: Any) -> None:
        self.there.append(set(batch.patches))
        self.before = {name: value.clone() for name, value in module.distiller.translators.state_dict().items()}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        after = module.distiller.translators.state_dict()
        self.changed.append({name.partition(".")[0] for name, was in self.before.items() if was.ne(after[name]).any()})


def test_a_step_changes_the_translators_of_its_teachers_alone(store: Path) -> None:
    L.seed_everything(0)
    data = FeatureData(str(store), batch_size=16, workers=0, teachers_per_step=1)
    model = Distillation(data.teacher_shapes, **SMALL, learning_rate=1e-2)
    drawn = Drawn()
    trainer(max_epochs=2, callbacks=[drawn], gradient_clip_val=1.0).fit(model, data)

    assert [len(names) for names in drawn.there] == [1] * 10
    assert drawn.changed == drawn.there
    assert {name for names in drawn.there for name in names} == {"alpha", "beta"}


def test_the_loss_of_some_teachers_is_scaled_to_that_of_all(store: Path) -> None:
    data = FeatureData(str(store), batch_size=80, workers=0, teachers_per_step=1)
    model = Distillation(data.teacher_shapes, **SMALL, teacher_weights={"alpha": 3.0}, learning_rate=1e-30)
    model.trainer = trainer(max_epochs=1, limit_val_batches=0)
    model.trainer.fit(model, data)
    model.log = lambda *args, **kwargs: None
    batch = next(iter(FeatureData(str(store), batch_size=80, workers=0).train_dataloader()))

    of_all = model.training_step(batch, 0)
    of_one = [
        model.training_step(replace(batch, patches={name: patches}), 0) for name, patches in batch.patches.items()
    ]

    torch.testing.assert_close(torch.stack(of_one).mean(), of_all)


@pytest.mark.parametrize(
    ("device", "drawn", "sizes", "options", "said"),
    [
        ("cpu", 1, [], {}, None),
        ("cpu", 4, [32, 64], {"compile": True}, None),  # of which the loss alone is compiled, and sees no images
        ("cuda", 1, [32], {}, None),
        ("cuda", 2, [], {"compile": False}, None),
        ("cuda", 5, [], {}, None),
        ("cuda", 1, [32, 64], {}, "1 of 5 teachers and 2 sizes of images are 10 steps to compile"),
        ("cuda", 3, [], {}, "3 of 5 teachers are 10 steps to compile; at most 7 can be"),
        ("cpu", 3, [], {"compile": True}, "are 10 steps to compile"),
        ("cpu", 1, [32], {"compile": True, "shift": 0.3}, "1 of 5 teachers and 3 kinds of shifts are 15 steps"),
        ("cuda", 5, [32, 64], {"shift": 0.3}, None),
        ("cpu", 1, [], {"teacher_dropping": 0.5}, "teacher_dropping has no teacher to leave out"),
        ("cpu", 2, [], {"teacher_dropping": 0.5}, None),
        ("cpu", 2, [], {"teacher_weights": {"b": 0.0}}, "would draw b, whose weight in the loss is 0"),
    ],
)  # fmt: skip
def test_steps_that_cannot_be_are_refused(
    device: str, drawn: int, sizes: list[int], options: dict[str, Any], said: str | None
) -> None:
    shapes = {name: {"channels": 8, "grid_hw": [4, 4], "has_cls": False} for name in "abcde"}
    model = Distillation(shapes, **SMALL, **options)
    data: Any = SimpleNamespace(image_sizes=sizes, teachers_per_step=drawn)
    if said is None:
        model.check_steps(data, torch.device(device))
    else:
        with pytest.raises(ConfigError, match=said):
            model.check_steps(data, torch.device(device))


def test_heavy_teachers_count_more_over_the_steps_when_teachers_are_dropped() -> None:
    shapes = {name: {"channels": 8, "grid_hw": [4, 4], "has_cls": False} for name in "abc"}
    model = Distillation(shapes, **SMALL, teacher_weights={"a": 3.0}, teacher_dropping=0.0)
    whole: Any = SimpleNamespace(global_step=0, strategy=SimpleNamespace(reduce=lambda value, reduce_op: value))
    model.trainer = whole
    losses = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([10.0, 20.0]), "c": torch.tensor([100.0, 300.0])}
    batch = FeatureBatch(torch.empty(0), {})
    steps = [model._total({name: losses[name] for name in pair}, batch) for pair in ("ab", "bc", "ca")]
    # Nothing is dropped, so that each step has the mean of its two, by 3:1 or 1:1, times their part of the weights.
    assert steps[0].item() == pytest.approx((3 * 2 + 15) / 4 * (3 / 2) * (4 / 5))
    mean = (3 * 2 + 15 + 200) / 5
    assert torch.stack(steps).mean().item() == pytest.approx(mean)
    assert model._total(losses, batch).item() == pytest.approx(mean)


def test_seed_epoch_and_image_alone_decide_which_patches_are_left_out() -> None:
    shapes = {"alpha": {"channels": 8, "grid_hw": [4, 4], "has_cls": False}}
    model = Distillation(shapes, **{**SMALL, "image_size": 160}, patch_dropout=0.3)  # 100 patches

    def kept(epoch: int, *rows: int, seed: int = 2) -> torch.Tensor:
        data = SimpleNamespace(cls_teachers=None, seed=seed)
        model.trainer = SimpleNamespace(current_epoch=epoch, datamodule=data)  # type: ignore[assignment]
        model.setup("fit")
        some = model._some_patches(FeatureBatch(torch.empty(0), {}, rows=torch.tensor(rows)))
        assert some is not None
        return some.kept

    whole = kept(3, 5, 6, 7)
    assert whole.shape == (3, 70)
    assert all(len(set(row.tolist())) == 70 for row in whole)
    assert (whole.max(), whole.min()) == (99, 0)
    assert torch.equal(kept(3, 7, 5), whole[[2, 0]])
    assert not torch.equal(kept(4, 5), whole[:1])
    assert not torch.equal(kept(3, 5, seed=1), whole[:1])
    # Each patch is there in 70 % of the images: of 1,000, by four deviations of a binomial.
    counts = kept(0, *range(1000)).flatten().bincount(minlength=100)
    assert (counts - 700).abs().max() < 4 * (1000 * 0.7 * 0.3) ** 0.5


def test_no_patch_is_left_out_by_default_and_there_is_no_token_for_it() -> None:
    shapes = {"alpha": {"channels": 8, "grid_hw": [4, 4], "has_cls": False}}
    model = Distillation(shapes, **SMALL)

    assert model._some_patches(FeatureBatch(torch.empty(0), {}, rows=torch.arange(2))) is None
    assert "mask_token" not in model.state_dict()


@pytest.mark.parametrize("options", [{"translator": "ladder"}, {"backbone": "timm:test_convnext"}])
def test_patches_cannot_be_left_out_of_every_model(options: dict[str, Any]) -> None:
    shapes = {"alpha": {"channels": 8, "grid_hw": [4, 4], "has_cls": False}}
    size = {"image_size": 32} if "backbone" in options else SMALL
    with pytest.raises(ConfigError, match=r"patch_dropout is for .* but 'ladder'"):
        Distillation(shapes, **size, patch_dropout=0.5, **options)
