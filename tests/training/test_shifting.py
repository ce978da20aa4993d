"""Shifted images and the tokens that are compared then: of the same places, whatever the grid."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from theia.data.datamodule import FeatureData
from theia.errors import ConfigError
from theia.models.backbone import StudentOptions
from theia.models.distiller import Distiller
from theia.models.student import Student
from theia.training.distillation import Distillation
from theia.training.losses import FeatureLoss, Objective, cosine_loss, smooth_l1_loss
from theia.training.optim import build_optimizer
from theia.training.shifting import Shift, common_cells, draw_shift
from theia.types import FeatureBatch

CPU = torch.device("cpu")


def cell_means(images: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Features of a teacher that sees each cell alone, ``(B, N, 3)``: exact for whole numbers of pixels."""
    return torch.nn.functional.adaptive_avg_pool2d(images.double(), grid_hw).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("right", [-1, 0, 1])
@pytest.mark.parametrize("down", [-1, 0, 1])
def test_tokens_of_a_shifted_image_are_those_of_the_same_places(down: int, right: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8, generator=generator)
    for grids in ([(16, 16), (32, 32)], [(16, 8), (16, 56)], [(14, 14)]):
        cells = common_cells(grids, [224])
        shift = Shift(cells, down, right)
        moved = shift.images(images)
        assert moved.dtype == torch.uint8
        assert moved.shape == images.shape
        for grid in grids:
            seen, stored = shift.overlap(grid, CPU)
            # One common cell is lost along each axis that is shifted, and nothing else.
            rows, columns = (
                size - abs(by) * size // of for size, by, of in zip(grid, (down, right), cells, strict=True)
            )
            assert len(seen) == len(stored) == len(set(seen.tolist())) == rows * columns
            assert torch.equal(cell_means(moved, grid)[:, seen], cell_means(images, grid)[:, stored])


def test_what_is_behind_the_edge_repeats_the_edge() -> None:
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(1, 3, 8, 8)
    moved = Shift((4, 4), 1, -1).images(images)
    assert torch.equal(moved[..., :2, :6], images[..., :1, 2:].expand(1, 3, 2, 6))
    assert torch.equal(moved[..., 2:, 6:], images[..., :6, -1:].expand(1, 3, 6, 2))


def test_the_papers_teachers_have_cells_of_14_pixels_in_common() -> None:
    assert common_cells([(16, 16), (64, 64), (16, 16)], [224, 160]) == (16, 16)


@pytest.mark.parametrize(
    ("grids", "sizes", "said"),
    [
        ([(14, 14), (16, 16)], [224], r"grids of 14x14, 16x16 have 2x2 cells in common; at least 4x4"),
        ([(16, 16)], [224, 232], r"In one of 232 pixels, a cell has no whole number.* a multiple of 16"),
    ],
)
def test_grids_and_sizes_without_cells_in_common_are_refused(grids: Any, sizes: list[int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        common_cells(grids, sizes)


def test_seed_epoch_and_batch_alone_decide_and_each_axis_has_the_probability() -> None:
    draws = {(epoch, batch): draw_shift((8, 8), 0.3, 5, epoch, batch) for epoch in range(4) for batch in range(1000)}
    assert draws == {at: draw_shift((8, 8), 0.3, 5, *at) for at in draws}
    assert draws != {at: draw_shift((8, 8), 0.3, 6, *at) for at in draws}
    for axis in ("down", "right"):
        counts = Counter(0 if shift is None else getattr(shift, axis) for shift in draws.values())
        assert counts.keys() == {-1, 0, 1}
        for direction in (-1, 1):  # by four deviations of a binomial
            assert abs(counts[direction] - 600) < 4 * (4000 * 0.15 * 0.85) ** 0.5
    both = sum(shift is not None and bool(shift.down and shift.right) for shift in draws.values())
    assert abs(both - 360) < 4 * (4000 * 0.09 * 0.91) ** 0.5
    assert [draw_shift((8, 8), 0.0, 0, 0, batch) for batch in range(50)] == [None] * 50


@pytest.mark.parametrize("options", [{}, {"teacher_dropping": 0.0}, {"compile": True}, {"patch_dropout": 0.5}], ids=str)
def test_the_loss_is_that_of_what_image_and_features_both_cover(store: Any, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    L.seed_everything(0)
    data = FeatureData(str(store), "alpha", batch_size=16, workers=0, seed=3)
    model = Distillation(data.teacher_shapes, image_size=32, width=16, depth=1, heads=2, shift=1.0, **options)
    model.trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, limit_val_batches=0, log_every_n_steps=1,
    )  # fmt: skip
    model.trainer.fit(model, data)
    logged: dict[str, Any] = {}
    model.log = lambda *args, **kwargs: None
    model.log_dict = lambda terms, **kwargs: logged.update(terms)
    batch = next(iter(data.train_dataloader()))
    seen: dict[tuple[int, int], float] = {}

    for number in range(24):
        shift = draw_shift((4, 4), 1.0, data.seed, model.current_epoch, number)
        assert shift is not None
        loss = model.training_step(batch, number)

        # By cells of 8 pixels, as if cut out by hand.
        down, right = shift.down, shift.right
        padded = torch.nn.functional.pad(batch.images.float(), (8, 8, 8, 8), mode="replicate").to(torch.uint8)
        images = padded[:, :, 8 - 8 * down : 40 - 8 * down, 8 - 8 * right : 40 - 8 * right]
        some = model._some_patches(batch)
        predicted = model.distiller(images, some)[1]["alpha"].unflatten(1, (4, 4))
        target = model.distiller.normalize("alpha", batch.patches["alpha"]).unflatten(1, (4, 4))
        rows, columns = slice(max(down, 0), 4 + min(down, 0)), slice(max(right, 0), 4 + min(right, 0))
        of = slice(max(-down, 0), 4 + min(-down, 0)), slice(max(-right, 0), 4 + min(-right, 0))
        pair = predicted[:, rows, columns].flatten(1, 2), target[:, of[0], of[1]].flatten(1, 2)
        expected = 0.9 * cosine_loss(*pair) + 0.1 * smooth_l1_loss(*pair)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logged["train/cosine/alpha"], 1 - cosine_loss(*pair), rtol=1e-4, atol=1e-5)
        seen[down, right] = loss.item()
    assert len(seen) == 4


def test_no_image_is_shifted_by_default_and_grids_must_allow_it(store: Any) -> None:
    shapes = FeatureData(str(store), batch_size=16).teacher_shapes
    model = Distillation(shapes, image_size=32, width=16, depth=1, heads=2)
    batch = SimpleNamespace()
    assert model._shifted(batch, 0) == (batch, {})
    with pytest.raises(ConfigError, match="grids of 3x6, 4x4 have 1x2 cells in common"):
        Distillation(shapes, image_size=32, width=16, depth=1, heads=2, shift=0.3)
    alone = {"alpha": shapes["alpha"]}
    data: Any = SimpleNamespace(image_sizes=[32, 50], teachers_per_step=None)
    with pytest.raises(ConfigError, match="In one of 50 pixels"):
        Distillation(alone, image_size=32, width=16, depth=1, heads=2, shift=0.3).check_steps(data, CPU)


def learned_pattern(shift: float) -> tuple[float, float]:
    """What a student learns of a teacher who adds a chessboard of fixed places to what is there.

    Returns:
        The share of the chessboard that is in its predictions, and the explained share of what is there.
    """
    torch.manual_seed(0)
    cells, channels = 8, 8
    mixing = 2 * torch.randn(3, channels)
    rows, columns = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    board = (1.0 - 2 * ((rows + columns) % 2)).reshape(-1, 1).expand(-1, channels)

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        colours = torch.randint(256, (count, 3, cells, cells), dtype=torch.uint8)
        there = (colours.float() / 255 - 0.5).flatten(2).transpose(1, 2) @ mixing
        return colours.repeat_interleave(8, 2).repeat_interleave(8, 3), there

    shapes = {"planted": {"channels": channels, "grid_hw": [cells, cells], "has_cls": False}}
    distiller = Distiller(Student(StudentOptions(width=48, depth=2, heads=2, image_size=64)), shapes)
    features = batch(512)[1] + board
    distiller.set_statistics("planted", features.mean((0, 1)), features.std((0, 1)))
    objective = Objective(distiller, FeatureLoss())
    optimizer = build_optimizer(distiller, 2e-3)
    for step in range(600):
        images, there = batch(32)
        moved = draw_shift((cells, cells), shift, 0, 0, step)
        overlaps = {} if moved is None else {"planted": moved.overlap((cells, cells), CPU)}
        seen = FeatureBatch(images if moved is None else moved.images(images), {"planted": there + board})
        optimizer.zero_grad()
        objective(seen, overlaps=overlaps)[0]["planted"].backward()
        optimizer.step()

    images, there = batch(256)
    with torch.no_grad():
        predicted = distiller.denormalize("planted", distiller(images)[1]["planted"])
    fixed, varying = predicted.mean(0), predicted - predicted.mean(0)
    wanted = there - there.mean(0)
    explained = 1 - (varying - wanted).square().sum() / wanted.square().sum()
    return float((fixed * board).sum() / board.square().sum()), float(explained)


@pytest.mark.slow
def test_a_planted_pattern_of_fixed_places_is_learned_without_shifts_and_not_with_them() -> None:
    (before, plain), (after, shifted) = learned_pattern(0.0), learned_pattern(0.5)

    assert before > 0.9
    assert after < 0.4
    assert min(plain, shifted) > 0.85
