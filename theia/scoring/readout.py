"""How well every teacher can be read out of a frozen student, whether or not it was distilled from that teacher."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from theia.data.datamodule import FeatureData
from theia.errors import ConfigError
from theia.models.backbone import StudentTokens, resized
from theia.models.distiller import Distiller
from theia.models.translators import Translator
from theia.plugins import checked_by
from theia.scoring.contract import Trained
from theia.scoring.scorers import Parts
from theia.training.metrics import feature_metrics
from theia.types import FeatureBatch
from theia.utils.files import at_home

_STAGE = "readout"
_AVERAGED = ("cosine", "explained_variance")
_TOKENS = 1 << 16  # in one product: float64 copies of a whole batch of 64x64 tokens would take gigabytes
# Relative to the mean square of the inputs. It is far below the variance of a channel and above the rounding of float32
# tokens, so that a direction without variance gets no weight.
_RIDGE = 1e-10


def _check(argument: str | None) -> str | None:
    data = _open_argument(argument)
    return None if data is None else data.store.manifest_sha256


def _open_argument(argument: str | None) -> FeatureData | None:
    if argument is None:
        return None
    data = FeatureData(at_home(argument))
    if data.val_split is None:
        raise ConfigError(
            f"--scorers readout@{argument}: that store has no split 'val', and the student may have learned from what "
            "would be held out of 'train'. Extract one."
        )
    return data.with_all_teachers()


@checked_by(_check)
@torch.no_grad()
def readout(trained: Trained) -> dict[str, float]:
    """Fits a linear translator to every teacher in the store, and scores it on held-out images.

    The translator is the one of ``translator: linear``: the student's patch tokens, resized bilinearly where the
    teacher has another grid, and one linear layer with bias to the teacher's normalised features. It is not trained
    but solved: least squares over all tokens of the training images, in float64. Memory grows with the square of the
    student's width and with the teachers' channels, not with the number of images.

    Images and teachers are those of the student's data or, with ``--scorers readout@STORE``, those of another feature
    store, so that students of different data are scored on the same. Its split ``val`` must hold no image that one of
    them was trained on. Images of another size than the student's are resized.

    Args:
        trained: The student.

    Returns:
        ``cosine/T``, ``smooth_l1/T``, ``mse/T`` and ``explained_variance/T`` of every teacher ``T``, as in
        ``theia test``; ``cosine`` and ``explained_variance``, their means over the teachers.

    Raises:
        StoreError: If the other store, or a part of it, is missing or damaged.
        ConfigError: If it has no split ``val``.
    """
    other = _open_argument(trained.argument)
    if other is None:
        return _read(trained)
    parts = Parts(other, trained.device, trained.images, labelled=False)
    try:
        return _read(
            replace(
                trained, shapes=other.teacher_shapes, statistics=other.statistics(),
                train=parts.of("train", _STAGE), held_out=parts.of("held_out", _STAGE),
            )
        )  # fmt: skip
    finally:
        parts.close()


def _read(trained: Trained) -> dict[str, float]:
    model = Distiller(trained.encoder.distiller.student, trained.shapes, translator="linear").to(trained.device)
    for name, values in trained.statistics.items():
        model.set_statistics(name, values.mean, values.std)
    _fit(model, trained)
    scores = _score(model, trained)
    for metric in _AVERAGED:
        scores[metric] = sum(scores[f"{metric}/{name}"] for name in model.teachers) / len(model.teachers)
    return scores


def _fit(model: Distiller, trained: Trained) -> None:
    heads: dict[str, Translator] = dict(model.translators.items())  # type: ignore[arg-type]  # a ModuleDict of them
    by_grid: dict[tuple[int, int], list[str]] = {}
    for name, shape in trained.shapes.items():
        by_grid.setdefault((shape["grid_hw"][0], shape["grid_hw"][1]), []).append(name)
    inputs = model.student.width + 1  # with a 1, for the bias

    def zeros(columns: int) -> Tensor:
        return torch.zeros(inputs, columns, dtype=torch.float64, device=trained.device)

    # Teachers of one grid have the same inputs.
    gram = {grid: zeros(inputs) for grid in by_grid}
    cross = {name: zeros(head.last.out_features) for name, head in heads.items()}
    for batch in trained.train():
        tokens = _tokens(trained, batch)
        for grid, names in by_grid.items():
            for part in _parts(len(tokens.patches), grid):
                rows = _rows(heads[names[0]].before_last(tokens.patches[part], tokens.grid))
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
                gram[grid] += rows.T @ rows
                for name in names:
                    cross[name] += rows.T @ _rows(_target(model, name, batch, part))
    for grid, names in by_grid.items():
        for name in names:
            weight, bias = _solve(gram[grid], cross[name])
            heads[name].last.weight.copy_(weight.T)
            heads[name].last.bias.copy_(bias)


def _score(model: Distiller, trained: Trained) -> dict[str, float]:
    metrics = {name: feature_metrics(_STAGE, name, alone=True).to(trained.device) for name in model.teachers}
    for batch in trained.held_out():
        tokens = _tokens(trained, batch)
        for name, metric in metrics.items():
            prediction = model.translators[name](tokens.patches, tokens.grid)
            metric.update(prediction, _target(model, name, batch, slice(None)))
    return {
        key.removeprefix(f"{_STAGE}/"): float(value)
        for metric in metrics.values()
        for key, value in metric.compute().items()
    }


def _tokens(trained: Trained, batch: FeatureBatch) -> StudentTokens:
    return trained.encoder.forward_features(resized(batch.images, trained.encoder.image_size))


def _parts(images: int, grid: tuple[int, int]) -> Iterator[slice]:
    """A batch, cut into pieces of a bounded number of tokens."""
    step = max(1, _TOKENS // (grid[0] * grid[1]))
    return (slice(start, start + step) for start in range(0, images, step))


def _target(model: Distiller, name: str, batch: FeatureBatch, part: slice) -> Tensor:
    scale = batch.scales.get(name)
    return model.normalize(name, batch.patches[name][part], None if scale is None else scale[part])


def _rows(tokens: Tensor) -> Tensor:
    """(B, N, C) to float64 (B * N, C)."""
    return tokens.flatten(0, 1).double()


def _solve(gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares from sums over rows ``x`` of inputs, the last of which is 1, and rows ``y`` of targets.

    Args:
        gram: Sum of ``x x^T``, shape ``(C + 1, C + 1)``.
        cross: Sum of ``x y^T``, shape ``(C + 1, D)``.

    Returns:
        Weight ``(C, D)`` and bias ``(D,)``.
    """
    count = gram[-1, -1]
    mean, target_mean = gram[:-1, -1] / count, cross[-1] / count
    second = gram[:-1, :-1] / count
    # If all tokens are zero, the ridge is the smallest number and the weight zero.
    ridge = _RIDGE * second.diagonal().mean() + torch.finfo(torch.float64).tiny
    # Around the means, so that the ridge does not shrink the bias.
    covariance = second - mean.outer(mean) + ridge * torch.eye(len(mean), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(covariance, cross[:-1] / count - mean.outer(target_mean))
    return weight, target_mean - mean @ weight
