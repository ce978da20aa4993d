"""Training towards targets of a normaliser: what is scored and exported stays in the one form that everybody knows."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import theia
from theia.cli.main import main
from theia.data.datamodule import FeatureData
from theia.errors import StoreError
from theia.store import second_moments
from theia.store.reader import FeatureStore
from theia.training.checkpoints import Checkpoints
from theia.training.distillation import Distillation
from theia.training.losses import PAPER, FeatureLoss

SMALL = ("--data.batch_size=16", "--model.width=16", "--model.depth=1", "--model.heads=2")
NORMALIZERS = ("scale", "phi_s", "whiten", "power")


@pytest.fixture(scope="module")
def measured(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("measured") / "store"
    shutil.copytree(store, copy)
    opened = FeatureStore(copy)
    for name in opened.teachers("train"):
        second_moments.measure(opened, name, None, torch.device("cpu"), lambda _: None)
    return copy


def fit(store: Path, folder: Path, resume: Path | None = None, epochs: int = 2, **recipe: Any) -> L.Trainer:
    L.seed_everything(0)
    torch.compiler.reset()
    data = FeatureData(str(store), batch_size=16, workers=0)
    small = {"image_size": 32, "width": 16, "depth": 1, "heads": 2, "learning_rate": 1e-2}
    module = Distillation(data.teacher_shapes, **(small | {"compile": False} | recipe))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Checkpoints(folder, 3)], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_loss_scores_and_a_loaded_encoder_follow_their_definitions(
    measured: Path, tmp_path: Path, normalizer: str, compile: bool
) -> None:
    trainer = fit(measured, tmp_path, normalizer=normalizer, compile=compile)

    encoder = theia.load(tmp_path / "last.ckpt")
    data, distiller = trainer.datamodule, trainer.lightning_module.distiller  # type: ignore[attr-defined]
    statistics, loss = data.statistics(), FeatureLoss(PAPER)
    batches = list(data.val_dataloader())
    losses, cosines = [], []
    for name in data.teacher_specs:
        targets, predicted, per_channel = [], [], []
        mean, std = (torch.from_numpy(getattr(statistics[name], part)).float() for part in ("mean", "std"))
        forth = distiller.scalers[name].forth
        for batch in batches:
            tokens = (batch.patches[name].float() - mean) / std
            targets.append(tokens * forth if forth.ndim == 1 else tokens @ forth.T)
            predicted.append(distiller(batch.images)[1][name].detach())
            per_channel.append(encoder.translate(batch.images)[name])
            cosines.append(torch.cosine_similarity(per_channel[-1].flatten(1), tokens.flatten(1)))
        losses.append(loss(torch.cat(predicted), torch.cat(targets)))
        found = trainer.callback_metrics[f"val/cosine/{name}"]
        torch.testing.assert_close(found, torch.cat(cosines[-len(batches) :]).mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(trainer.callback_metrics["val/loss"], torch.stack(losses).mean(), rtol=1e-3, atol=1e-4)


def test_a_normaliser_that_is_off_leaves_model_and_checkpoint_as_they_were(measured: Path, tmp_path: Path) -> None:
    fit(measured, tmp_path)
    names = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in names if name.endswith((".forth", ".back"))]


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_goes_on_with_its_targets_bit_for_bit(measured: Path, tmp_path: Path, compile: bool) -> None:
    recipe = {"normalizer": "phi_s", "compile": compile, "warmup": 0.0}  # a warm-up would depend on the epochs
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(measured, whole, **recipe)
    fit(measured, parts, epochs=1, **recipe)
    fit(measured, parts, parts / "last.ckpt", **recipe)

    theirs, ours = (torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, parts))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name


def test_missing_covariances_are_named_before_anything_is_written(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = FeatureData(str(store), batch_size=16)
    with pytest.raises(StoreError, match="theia store statistics"):
        data.covariances()

    run = tmp_path / "run"
    assert main(["fit", f"--data.store={store}", f"--run_folder={run}", *SMALL, "--model.normalizer=whiten"]) == 1
    assert "Run: theia store statistics" in capsys.readouterr().err
    assert not run.exists()


def test_a_test_with_other_targets_than_the_training_is_refused_by_name(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(measured, tmp_path, normalizer="phi_s", balance="ada")
    command = ["test", f"--data.store={measured}", f"--ckpt_path={tmp_path / 'last.ckpt'}", *SMALL[1:]]

    assert main([*command, f"--run_folder={tmp_path / 'run'}"]) == 1

    said = capsys.readouterr().err
    assert "normalizer is 'phi_s' there, 'std' here; balance is 'ada' there, 'fixed' here" in said
