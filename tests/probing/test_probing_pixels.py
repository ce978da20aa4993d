import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from theia.probing import matching
from theia.probing.cameras import Camera
from theia.probing.embedding import Features
from theia.probing.heads import (
    DepthTask,
    Fit,
    LinearHead,
    NormalTask,
    SegmentationTask,
    apply_head,
    fit_head,
    rate,
    whitening,
)
from theia.probing.rendering import render
from theia.probing.scenes import cameras_around, random_room

GRID, SIZE = (4, 4), 16
FIT = Fit(epochs=60, warmup=2, batch_size=4, learning_rate=0.05)


def test_a_head_gives_what_a_convolution_after_enlargement_gives() -> None:
    head = LinearHead(torch.zeros(6), torch.eye(6), 5)
    convolution = nn.Conv2d(6, 5, 1)
    convolution.weight.data, convolution.bias.data = head.linear.weight.data[..., None, None], head.linear.bias.data
    tokens = torch.randn(2, 16, 6)
    larger = F.interpolate(tokens.transpose(1, 2).reshape(2, 6, 4, 4), scale_factor=4, mode="bilinear")
    assert torch.allclose(head(tokens, GRID, 64), convolution(larger), atol=1e-5)


def test_the_rate_of_heads_is_that_of_probe3d() -> None:
    assert [rate(step, 100, 10) for step in (0, 5, 10, 100)] == pytest.approx([0.01, 0.505, 1, 0.01])
    assert rate(40, 100, 10) == pytest.approx(0.99 * math.cos(math.pi / 6) + 0.01)
    assert rate(0, 10, 0) == 1


def score(task, targets: torch.Tensor, tokens: Features) -> dict[str, float]:
    white = whitening(tokens.tokens)
    head = fit_head(tokens, white, targets.numpy(), task.channels, task.loss, FIT, 0, "cpu", "test")
    parts = apply_head(head, tokens, SIZE, 3)
    return task.summarise([task.measure(task.predict(maps, SIZE), targets[part]) for part, maps in parts])


def planted(channels: int, out: int) -> tuple[Features, torch.Tensor]:
    """Tokens and a linear function of them, the same within every patch: ``(8, out, S, S)``."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(8, GRID[0] * GRID[1], channels, generator=generator)
    values = tokens @ torch.randn(channels, out, generator=generator) / channels**0.5
    return Features(tokens.numpy(), GRID), values.transpose(1, 2).reshape(8, out, *GRID).repeat_interleave(
        4, 2
    ).repeat_interleave(4, 3)


def inner(targets: torch.Tensor) -> torch.Tensor:
    """Only the middle of every patch counts: elsewhere the head mixes neighbours."""
    middle = torch.zeros(SIZE, dtype=torch.bool)
    middle[1::4] = middle[2::4] = True
    return torch.where(middle[:, None] & middle, targets, 0)


def test_whitened_tokens_have_no_mean_and_no_correlations() -> None:
    random = np.random.default_rng(0)
    tokens = (100 + random.normal(size=(40, 16, 6)) @ random.normal(size=(6, 6))).astype(np.float32)
    mean, matrix = (part.numpy() for part in whitening(tokens))
    white = (tokens - mean).reshape(-1, 6) @ matrix
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-3)
    variance = np.linalg.eigvalsh(np.corrcoef(tokens.reshape(-1, 6).T))
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.diag(variance / (variance + 1e-3)), atol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_neither_scale_nor_offset_of_channels_plays_a_part(scale: float) -> None:
    tokens, values = planted(6, 1)
    targets = 4 + values[:, 0].clamp(-3, 3)
    offset = np.arange(6, dtype=np.float32)
    changed = Features(scale * (tokens.tokens * (1 + offset) + offset), GRID)
    assert score(DepthTask(), targets, changed) == pytest.approx(score(DepthTask(), targets, tokens), abs=2e-3)


def test_channels_that_go_together_are_learned_as_well_as_others() -> None:
    tokens, values = planted(6, 3)
    targets = F.normalize(values, dim=1)
    # All channels are nearly the same: what differs between them has a hundredth of their variance.
    mixed = tokens.tokens @ (np.ones((6, 6)) + 0.25 * np.eye(6)).astype(np.float32)
    assert np.corrcoef(mixed.reshape(-1, 6).T).min() > 0.95
    expected = score(NormalTask(), targets, tokens)["angular_rmse"]
    assert score(NormalTask(), targets, Features(mixed, GRID))["angular_rmse"] == pytest.approx(expected, rel=0.05)


def test_depth_is_learned_where_it_can_be() -> None:
    tokens, values = planted(6, 1)
    targets = inner(4 + values[:, 0].clamp(-3, 3))
    found = score(DepthTask(), targets, tokens)
    blind = score(DepthTask(), targets, Features(np.random.default_rng(0).permuted(tokens.tokens, axis=1), GRID))
    assert found["rmse"] < 0.25 * blind["rmse"]
    assert found["delta1"] > 0.95


def test_normals_are_learned_where_they_can_be() -> None:
    tokens, values = planted(6, 3)
    targets = inner(F.normalize(values, dim=1))
    found = score(NormalTask(), targets, tokens)
    blind = score(NormalTask(), targets, Features(np.random.default_rng(0).permuted(tokens.tokens, axis=1), GRID))
    assert found["angular_rmse"] < 0.25 * blind["angular_rmse"]


def test_classes_are_told_as_by_logistic_regression() -> None:
    tokens, values = planted(6, 3)
    noise = torch.Generator().manual_seed(2)
    chosen = (values[..., ::4, ::4] + 0.3 * torch.randn(8, 3, *GRID, generator=noise)).argmax(1)
    flat = tokens.tokens.reshape(-1, 6)
    expected = LogisticRegression().fit(flat, chosen.flatten()).score(flat, chosen.flatten())
    middle = torch.full((8, SIZE, SIZE), 255, dtype=torch.uint8)
    for row in (1, 2):
        for column in (1, 2):
            middle[:, row::4, column::4] = chosen
    found = score(SegmentationTask(3), middle, tokens)
    assert 0.7 < expected < 0.95
    assert found["pixel_accuracy"] == pytest.approx(expected, abs=0.05)


def test_what_is_usual_is_known_without_an_encoder() -> None:
    depth = np.zeros((3, 2, 2), np.float32)
    depth[:, 0] = [[1, 4], [3, 0], [0, 50]]  # 50 m is too far to count
    assert DepthTask().usual(depth).tolist() == [[2, 4], [pytest.approx(8 / 3)] * 2]
    labels = np.array([[[0, 2]], [[1, 2]], [[1, 255]]], np.uint8)
    assert SegmentationTask(3).usual(labels).tolist() == [[1, 2]]
    normals = np.zeros((2, 3, 1, 1), np.float32)
    normals[0, 0], normals[1, 2] = 1, 1
    assert NormalTask().usual(normals).flatten().tolist() == [0.5, 0, 0.5]
    # Never known at the second place, and opposite at the third: the mean over all.
    normals = np.array([[[[1.0, 0, 0]], [[0, 0, 1]], [[0, 0, 0]]], [[[0, 0, 0]], [[0, 0, -1]], [[1, 0, 0]]]])
    usual = NormalTask().usual(normals.astype(np.float32))[:, 0].T
    assert usual.tolist() == [[0.5, 0, 0.5], *[[pytest.approx(1 / 6), 0, pytest.approx(1 / 6)]] * 2]


def test_the_usual_class_is_the_mode() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (9, 5, 6)).astype(np.uint8)
    assert (SegmentationTask(4).usual(labels).numpy() == scipy.stats.mode(labels, axis=0).mode).all()


def test_depth_of_a_head_is_a_weighted_mean_of_bins() -> None:
    task = DepthTask()
    flat = task.predict(torch.full((1, 256, 2, 2), -3.0), 8)
    assert torch.allclose(flat, torch.full((1, 8, 8), (10 + 1e-3) / 2), atol=1e-4)
    peak = torch.zeros(1, 256, 2, 2)
    peak[:, 255] = 1e6
    assert torch.allclose(task.predict(peak, 8), torch.full((1, 8, 8), 10.0), atol=1e-2)


@pytest.mark.parametrize(
    ("task", "target"),
    [
        (DepthTask(), torch.zeros(1, SIZE, SIZE)),
        (NormalTask(), torch.zeros(1, 3, SIZE, SIZE)),
        (SegmentationTask(3), torch.full((1, SIZE, SIZE), 255, dtype=torch.uint8)),
    ],
)
def test_images_where_nothing_is_known_teach_nothing(task, target: torch.Tensor) -> None:
    maps = torch.randn(1, task.channels, 4, 4, requires_grad=True)
    task.loss(maps, target).backward()
    assert (maps.grad == 0).all()


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Camera], np.ndarray, Features]:
    """A room whose features tell the world point behind every token."""
    size = 128
    monkeypatch.setattr(matching, "IMAGE_SIZE", size)
    random = np.random.default_rng(1)
    room, cameras = random_room(random), cameras_around(random, size)
    depth = np.stack([render(room, camera).depth for camera in cameras]).astype(np.float32)
    waves = random.normal(scale=3, size=(3, 256))
    side = size // 4
    middles = [
        np.cos(camera.points(one)[2::4, 2::4].reshape(-1, 3) @ waves + np.arange(256))
        for camera, one in zip(cameras, depth, strict=True)
    ]
    return cameras, depth, Features(np.stack(middles).astype(np.float32), (side, side))


def test_features_that_know_the_place_are_matched_and_others_are_not(views) -> None:
    cameras, depth, tokens = views
    pairs = [(0, 1), (0, 2), (0, 3), (0, 4)]
    found = matching.correspondence(tokens, depth, cameras, pairs, "cpu")
    near = matching.correspondence(tokens, depth, cameras, pairs[:1], "cpu")
    shuffled = Features(np.random.default_rng(0).permuted(tokens.tokens, axis=1), tokens.grid)
    worse = matching.correspondence(shuffled, depth, cameras, pairs, "cpu")
    # A cell is 20 pixels wide, so the nearest one is off by up to 14; some are hidden or outside of the second view.
    assert near["recall_20px"] > 0.5 > near["recall_5px"]
    assert found["recall_10px_0-15deg"] == near["recall_10px"] > found["recall_10px_60-180deg"]
    assert worse["recall_20px"] < 0.1


def test_a_view_matched_with_itself_is_right_everywhere(views) -> None:
    cameras, depth, tokens = views
    found = matching.correspondence(tokens, depth, cameras, [(0, 0)], "cpu")
    assert found["recall_5px"] == found["recall_5cm"] == found["recall_10px_0-15deg"] == 1
    assert "recall_10px_15-30deg" not in found


def test_the_most_distinct_matches_come_first() -> None:
    second = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    first = torch.tensor([[0.7, 0.69, 0], [0, 0.1, 1.0]])
    ours, theirs = matching.match(first, second, 5)
    assert (ours.tolist(), theirs.tolist()) == ([1, 0], [2, 0])
    assert matching.match(first, second, 1)[0].tolist() == [1]


def test_errors_are_pixels_of_a_picture_640_wide() -> None:
    camera = Camera(np.array([[100.0, 0, 160], [0, 100, 120], [0, 0, 1]]), np.eye(4), 320, 240)
    points = np.array([[0.0, 0, 2], [0, 0, 2], [0, 0, -2]])
    matched = np.array([[0.06, 0.08, 2], [0, 0, 5], [0, 0, 2]])
    # 3 and 4 pixels of 320; along the ray; behind the camera.
    assert matching.reprojection_error(points, matched, camera).tolist() == pytest.approx([10, 0, math.inf])


def test_bins_hold_their_lower_end() -> None:
    found = matching.binned([0, 14.9, 15, 60, 180], [1.0, 0.0, 0.3, 0.2, 0.4])
    assert found == {"0-15": 0.5, "15-30": 0.3, "60-180": pytest.approx(0.3)}
