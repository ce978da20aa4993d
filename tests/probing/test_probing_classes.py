import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from theia.analysis.classifiers import logistic_classes, nearest_classes
from theia.probing.comparison import PRESETS
from theia.probing.linear_probe import LinearProbe, Schedule, lars, rate_at, train_probe


def clusters(count: int, seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    centres = np.random.default_rng(0).normal(size=(5, 12))
    random = np.random.default_rng(seed)
    labels = random.integers(5, size=count)
    return (centres[labels] + spread * random.normal(size=(count, 12))).astype(np.float32), labels


def test_nearest_neighbours_vote_as_in_scikit_learn() -> None:
    (train, labels), (queries, _) = clusters(90, 1, 2), clusters(400, 2, 2)
    expected = KNeighborsClassifier(20, metric="cosine").fit(train, labels).predict(queries)
    found = nearest_classes(torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(queries), 20)
    assert (found.numpy() == expected).all()


def test_the_cosine_decides_not_the_length() -> None:
    train, labels = torch.tensor([[100.0, 100.0], [0.1, 0.0]]), torch.tensor([0, 1])
    assert nearest_classes(train, labels, torch.tensor([[9.0, 1.0]]), 1).tolist() == [1]


def mae_lars(weight: torch.Tensor, gradients: list[torch.Tensor], rate: float, adapt: bool) -> torch.Tensor:
    """You et al., eq. (6), with momentum as MAE has it: the momentum is of scaled gradients."""
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        scaled = gradient * 0.001 * weight.norm() / gradient.norm() if adapt else gradient
        velocity = 0.9 * velocity + scaled
        weight = weight - rate * velocity
    return weight


def test_lars_is_that_of_mae() -> None:
    torch.manual_seed(0)
    probe = LinearProbe(4, 3)
    with torch.no_grad():
        probe.linear.bias.fill_(0.5)
    parts = {"weight": (probe.linear.weight, True), "bias": (probe.linear.bias, False)}
    gradients = {name: [torch.randn_like(part) for _ in range(3)] for name, (part, _) in parts.items()}
    expected = {
        name: mae_lars(part.detach().clone(), gradients[name], 2.0, adapt) for name, (part, adapt) in parts.items()
    }
    optimizer = lars(probe, 2.0)
    for step in range(3):
        for name, (part, _) in parts.items():
            part.grad = gradients[name][step].clone()
        optimizer.step()
    for name, (part, _) in parts.items():
        assert torch.allclose(part, expected[name], rtol=1e-4)


def test_the_rate_rises_for_ten_epochs_then_falls_along_a_cosine() -> None:
    assert [rate_at(epoch, 6.4, 90, 10) for epoch in (0, 5, 10, 50, 90)] == pytest.approx([0, 3.2, 6.4, 3.2, 0])
    assert rate_at(30, 1, 90, 10) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_the_full_preset_is_that_of_mae() -> None:
    full = PRESETS["full"].probe
    assert full is not None
    assert (full.batch_size, full.base_rate, full.epochs, full.warmup) == (16384, 0.1, 90, 10)


def test_the_probe_starts_small_and_its_norm_has_no_weights() -> None:
    probe = LinearProbe(1000, 50)
    assert [name for name, _ in probe.named_parameters()] == ["linear.weight", "linear.bias"]
    assert probe.linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (probe.linear.bias == 0).all()
    assert probe.norm.eps == 1e-6


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_long_schedule_tells_what_logistic_regression_tells(scale: float) -> None:
    (train, labels), (queries, truth) = clusters(300, 1, 1.5), clusters(500, 2, 1.5)
    expected = make_pipeline(StandardScaler(), LogisticRegression()).fit(train, labels).score(queries, truth)
    schedule = Schedule(batch_size=32, base_rate=51.2)
    told = train_probe(scale * train, labels, 5, schedule, 0, "cpu", "test").classify(scale * queries)
    assert 0.6 < expected < 0.95
    assert (told == truth).mean() == pytest.approx(expected, abs=0.04)


def newton_probabilities(train: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Two classes on standardised channels: least of the summed log loss plus half the squared weights."""
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    padded, asked = (np.hstack([(part - mean) / std, np.ones((len(part), 1))]) for part in (train, queries))
    penalty = np.diag([*np.ones(train.shape[1]), 0.0])  # not of the offset
    weights = np.zeros(len(penalty))
    for _ in range(30):
        told = 1 / (1 + np.exp(-padded @ weights))
        slope = padded.T @ (told - labels) + penalty @ weights
        weights -= np.linalg.solve(padded.T @ (padded * (told * (1 - told))[:, None]) + penalty, slope)
    assert np.abs(slope).max() < 1e-9
    return 1 / (1 + np.exp(-asked @ weights))


def test_the_small_preset_converges_where_channels_nearly_agree() -> None:
    (train, labels), (queries, _) = clusters(300, 1, 1.0), clusters(600, 2, 1.0)
    # What tells classes apart is a hundredth of what all channels share.
    mixing = np.ones((12, 12)) + 0.05 * np.eye(12)
    train, queries, labels = 50 + train @ mixing, 50 + queries @ mixing, labels > 1
    probability = newton_probabilities(train, labels, queries)
    found = logistic_classes(train.astype(np.float32), labels.astype(np.int64), queries.astype(np.float32))
    clear = np.abs(probability - 0.5) > 0.01
    assert clear.mean() > 0.9
    assert (found == (probability > 0.5))[clear].all()
    assert 0.2 < found.mean() < 0.8
    assert PRESETS["small"].probe is None


def test_a_seed_gives_the_same_probe_and_leaves_torch_alone() -> None:
    (train, labels), schedule = clusters(40, 1, 1), Schedule(16, 6.4, epochs=3, warmup=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (train_probe(train, labels, 5, schedule, seed, "cpu", "test") for seed in (0, 0, 1))
    assert torch.equal(one.linear.weight, again.linear.weight)
    assert not torch.equal(one.linear.weight, other.linear.weight)
    assert torch.equal(before, torch.get_rng_state())
