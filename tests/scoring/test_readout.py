import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import explained_variance_score
from torchvision.transforms.functional import InterpolationMode, resize

from theia.data.datamodule import FeatureData
from theia.encoder.encoder import Encoder
from theia.errors import ConfigError, StoreError
from theia.models.architecture import Architecture
from theia.scoring.contract import Trained, find_scorers
from theia.scoring.readout import readout

Make = Callable[..., Trained]
METRICS = ("cosine", "smooth_l1", "mse", "explained_variance")


def tokens_on(encoder: Encoder, images: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """The student's tokens on another grid, float64 ``(B, H * W, C)``."""
    with torch.no_grad():
        maps = encoder.forward_features(images).as_map()
    if grid != tuple(maps.shape[-2:]):
        shrinks = grid[0] < maps.shape[-2] or grid[1] < maps.shape[-1]
        maps = F.interpolate(maps, grid, mode="bilinear", antialias=shrinks)
    return maps.permute(0, 2, 3, 1).flatten(1, 2).double().numpy()


def expected(tokens: np.ndarray, targets: np.ndarray, train: int) -> dict[str, float]:
    """Least squares with bias on all tokens at once, and its scores on the images after the first ``train``."""
    rows = np.concatenate([tokens, np.ones((*tokens.shape[:2], 1))], -1)
    flat = rows[:train].reshape(-1, rows.shape[-1]), targets[:train].reshape(-1, targets.shape[-1])
    # After a layer norm tokens move in one direction less than they have channels; there, they are rounding.
    weight = np.linalg.lstsq(*flat, rcond=1e-6)[0]
    prediction, target = torch.from_numpy(rows[train:] @ weight), torch.from_numpy(targets[train:])
    return {
        "cosine": float(F.cosine_similarity(prediction.flatten(1), target.flatten(1)).mean()),
        "smooth_l1": float(F.smooth_l1_loss(prediction, target)),
        "mse": float(F.mse_loss(prediction, target)),
        "explained_variance": float(
            explained_variance_score(target.flatten(0, 1), prediction.flatten(0, 1), multioutput="uniform_average")
        ),
    }


def features(images: torch.Tensor, grid: tuple[int, int], channels: int) -> torch.Tensor:
    """Something that depends on the image, not linearly: float16 ``(B, H * W, channels)``, of unlike scales."""
    generator = torch.Generator().manual_seed(channels)
    cells = F.adaptive_avg_pool2d(images.float() / 255, grid).flatten(2).transpose(1, 2)
    mixed = torch.sin(3 * cells @ torch.randn(3, channels, generator=generator))
    noise = torch.randn(mixed.shape, generator=generator)
    return ((mixed + 0.3 * noise) * torch.logspace(-1, 2, channels) + 5).half()


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (3, 7), (2, 2)])
def test_it_is_least_squares_over_all_tokens(
    make_trained: Make, images: torch.Tensor, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theia.scoring.readout._TOKENS", 70)  # parts of one to some images
    raw = features(images, grid, 5)
    trained = make_trained({"wolf": raw}, {"wolf": grid})

    scores = readout(trained)

    values = trained.statistics["wolf"]
    targets = (raw.double().numpy() - values.mean) / values.std
    want = expected(tokens_on(trained.encoder, images, grid), targets, 40)
    assert {metric: scores[f"{metric}/wolf"] for metric in METRICS} == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_a_linear_function_of_the_tokens_is_read_out_wholly(
    make_trained: Make, student: Encoder, images: torch.Tensor
) -> None:
    tokens = torch.from_numpy(tokens_on(student, images, (4, 4))).float()
    planted = tokens @ torch.randn(16, 9, generator=torch.Generator().manual_seed(3)) + 20

    scores = readout(make_trained({"planted": planted}, {"planted": (4, 4)}))

    assert scores["explained_variance/planted"] == pytest.approx(1, abs=1e-5)
    assert scores["cosine/planted"] == pytest.approx(1, abs=1e-5)


def test_teachers_share_a_pass_and_are_averaged(make_trained: Make, images: torch.Tensor) -> None:
    grids = {"fox": (4, 4), "wolf": (4, 4), "owl": (3, 7)}
    raw = {name: features(images, grid, 4 + index) for index, (name, grid) in enumerate(grids.items())}

    together = readout(make_trained(raw, grids))
    alone = {name: readout(make_trained({name: raw[name]}, grids)) for name in grids}

    assert set(together) == {f"{metric}/{name}" for metric in METRICS for name in grids} | {
        "cosine", "explained_variance",
    }  # fmt: skip
    for name in grids:
        for metric in METRICS:
            assert together[f"{metric}/{name}"] == pytest.approx(alone[name][f"{metric}/{name}"], rel=1e-6)
    for metric in ("cosine", "explained_variance"):
        mean = sum(together[f"{metric}/{name}"] for name in grids) / 3
        assert together[metric] == pytest.approx(mean)


@pytest.mark.parametrize(("scale", "shift"), [(0, 0), (0, 3), (0, -1e3)])
def test_tokens_that_do_not_move_predict_the_mean(
    make_trained: Make, student: Encoder, images: torch.Tensor, scale: float, shift: float
) -> None:
    norm: Any = student.distiller.student.backbone.model.norm
    norm.weight.fill_(scale)
    norm.bias.fill_(shift)
    raw = features(images, (4, 4), 5)

    scores = readout(make_trained({"wolf": raw}, {"wolf": (4, 4)}))

    assert all(map(math.isfinite, scores.values()))
    assert scores["explained_variance/wolf"] == pytest.approx(0, abs=1e-5)


def test_tokens_in_a_subspace_are_no_obstacle(make_trained: Make, student: Encoder, images: torch.Tensor) -> None:
    norm: Any = student.distiller.student.backbone.model.norm
    norm.weight.fill_(1)  # of one size: beside the outlier, the ridge shrinks what hardly moves
    norm.weight[::2] = 0
    norm.weight[1] = 1e3  # an outlier, beside channels that do not move
    raw = features(images, (4, 4), 5)
    trained = make_trained({"wolf": raw}, {"wolf": (4, 4)})

    scores = readout(trained)

    values = trained.statistics["wolf"]
    targets = (raw.double().numpy() - values.mean) / values.std
    want = expected(tokens_on(student, images, (4, 4)), targets, 40)
    assert {metric: scores[f"{metric}/wolf"] for metric in METRICS} == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_the_student_and_its_translators_stay_as_they_were(make_trained: Make, images: torch.Tensor) -> None:
    trained = make_trained({"wolf": features(images, (4, 4), 5)}, {"wolf": (4, 4)})
    before = {name: value.clone() for name, value in trained.encoder.state_dict().items()}

    readout(trained)

    after = trained.encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_store_is_read_as_it_was_stored(tmp_path: Path, make_split: Any, dtype: str) -> None:
    for split, rows in (("train", 80), ("val", 20)):
        make_split(tmp_path, split, rows, dtype)
    data = FeatureData(str(tmp_path), workers=0, val_batch_size=16)
    alpha = {"alpha": data.teacher_shapes["alpha"]}
    torch.manual_seed(0)
    encoder = Encoder(Architecture(teachers=alpha, image_size=32, width=16, depth=1, heads=2)).freeze()
    cpu = torch.device("cpu")
    trained = Trained(
        checkpoint=tmp_path, encoder=encoder, shapes=data.teacher_shapes, statistics=data.statistics(),
        train=lambda features=True: data.ordered_dataloader("train", cpu),
        held_out=lambda features=True: data.ordered_dataloader("held_out", cpu),
        device=cpu, seed=0, images=80,
    )  # fmt: skip

    scores = readout(trained)

    for name, grid in (("alpha", (4, 4)), ("beta", (3, 6))):
        images, targets = everything(data, name, cpu)
        want = expected(tokens_on(encoder, images, grid), targets, 80)
        assert {metric: scores[f"{metric}/{name}"] for metric in METRICS} == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_students_of_other_data_are_read_by_another_store(
    make_trained: Make, images: torch.Tensor, tmp_path: Path, make_split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, rows in (("train", 80), ("val", 20)):
        make_split(tmp_path / "store", split, rows, "float16")
    trained = make_trained({"wolf": features(images, (4, 4), 5)}, {"wolf": (4, 4)})
    monkeypatch.setenv("HOME", str(tmp_path))

    scores = readout(replace(trained, argument="~/store", images=30))

    data = FeatureData(str(tmp_path / "store"), workers=0)
    fitted = [batch.rows.tolist() for batch in data.ordered_dataloader("train", torch.device("cpu"), 30)]
    chosen = [*chain(*fitted), *range(80, 100)]
    assert len(chosen) == 50
    for name, grid in (("alpha", (4, 4)), ("beta", (3, 6))):
        pixels, targets = everything(data, name, torch.device("cpu"))
        # The store has images of 32 pixels, and the student was trained at 64.
        seen = resize(pixels[chosen], [64, 64], InterpolationMode.BICUBIC, antialias=True)
        want = expected(tokens_on(trained.encoder, seen, grid), targets[chosen], 30)
        assert {metric: scores[f"{metric}/{name}"] for metric in METRICS} == pytest.approx(want, rel=5e-3, abs=5e-4)
    assert "cosine/wolf" not in scores


def test_another_store_that_cannot_serve_is_refused_before_any_work(tmp_path: Path, make_split: Any) -> None:
    make_split(tmp_path, "train", 20, "float16")
    with pytest.raises(ConfigError, match=r"no split 'val'.*Extract one"):
        find_scorers(f"readout@{tmp_path}")
    with pytest.raises(StoreError, match="nowhere"):
        find_scorers(f"readout@{tmp_path / 'nowhere'}")
    with pytest.raises(ConfigError, match=r"readout has nothing after @\. Is a shell variable unset"):
        find_scorers("readout@")


def everything(data: FeatureData, name: str, device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
    """All images, those of training first, and a teacher's normalised features in float64."""
    images, features = [], []
    values = data.statistics()[name]
    for part in ("train", "held_out"):
        for batch in data.ordered_dataloader(part, device):
            raw = batch.patches[name].double()
            if name in batch.scales:
                step, middle = batch.scales[name].double().unbind(1)
                raw = raw * step[:, None] + middle[:, None]
            images.append(batch.images.clone())
            features.append((raw.numpy() - values.mean) / values.std)
    return torch.cat(images), np.concatenate(features)
