"""Normalisers of the targets against closed forms: which covariance targets have, and that the way back is exact."""

import numpy as np
import pytest
import torch
from torch import nn

from theia.errors import ConfigError
from theia.models.scaler import FeatureScaler, Normalizer, equaliser, training_targets
from theia.training.losses import cosine_loss, mse_loss

CHANNELS = 6
SPECTRUM = np.array([0.0, 0.01, 0.5, 1.0, 3.0, 25.0])  # a dead direction and a loud one


@pytest.fixture
def covariance() -> np.ndarray:
    axes, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(CHANNELS, CHANNELS)))
    return (axes * SPECTRUM) @ axes.T


def spread(normalizer: Normalizer, covariance: np.ndarray, exponent: float = 1 / 3) -> np.ndarray:
    """Covariance of the targets of features with a known covariance."""
    std = np.sqrt(covariance.diagonal())
    forth, _ = training_targets(normalizer, std, covariance, exponent)
    change = (np.diag(forth) if forth.ndim == 1 else forth) / std
    return change @ covariance @ change.T


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 12, 32, 50, 112, 768, 1280])
def test_all_channels_get_the_mean_variance_for_any_number_of_channels(channels: int) -> None:
    variances = np.random.default_rng(channels).exponential(size=channels) ** 2

    turn = equaliser(variances)

    np.testing.assert_allclose(turn @ turn.T, np.eye(channels), atol=1e-12)
    np.testing.assert_allclose(((turn * variances) @ turn.T).diagonal(), variances.mean(), rtol=1e-9)


def test_a_hadamard_matrix_equalises_any_variances() -> None:
    first, second = (equaliser(np.random.default_rng(seed).exponential(size=320)) for seed in (0, 1))
    assert (first == second).all()
    np.testing.assert_allclose(np.abs(first), 320**-0.5)


@pytest.mark.parametrize(
    ("normalizer", "exponent", "eigenvalues"),
    [
        ("phi_s", 0.9, SPECTRUM),
        ("whiten", 0.9, SPECTRUM / (SPECTRUM + 1e-3 * SPECTRUM.mean())),
        ("power", 0.5, SPECTRUM / (SPECTRUM + 1e-3 * SPECTRUM.mean()) ** 0.5),
        ("power", 1.0, SPECTRUM),
    ],
)
def test_targets_have_the_spectrum_of_their_name_and_channels_of_variance_one(
    normalizer: Normalizer, exponent: float, eigenvalues: np.ndarray, covariance: np.ndarray
) -> None:
    targets = spread(normalizer, covariance, exponent)

    np.testing.assert_allclose(targets.diagonal(), 1, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.eigvalsh(targets), np.sort(eigenvalues / eigenvalues.mean()), atol=1e-9)


def test_a_scale_divides_by_one_number(covariance: np.ndarray) -> None:
    np.testing.assert_allclose(spread("scale", covariance), covariance / SPECTRUM.mean(), atol=1e-12)


def scaler(normalizer: Normalizer, covariance: np.ndarray) -> FeatureScaler:
    found = FeatureScaler("some", CHANNELS)
    found.use(normalizer)
    found.set(np.arange(CHANNELS) / 2, np.sqrt(covariance.diagonal()), covariance)
    return found


@pytest.mark.parametrize("normalizer", ["std", "scale", "phi_s", "whiten", "power"])
def test_predictions_go_back_as_they_came_and_so_does_a_folded_layer(
    normalizer: Normalizer, covariance: np.ndarray
) -> None:
    ours = scaler(normalizer, covariance)
    tokens, last = torch.randn(2, 5, CHANNELS), nn.Linear(3, CHANNELS)
    torch.testing.assert_close(ours.per_channel(ours.target(tokens)), tokens, rtol=1e-3, atol=1e-4)
    inputs = torch.randn(2, 5, 3)
    expected = ours.per_channel(last(inputs)).detach()

    ours.fold_into(last)

    torch.testing.assert_close(last(inputs), expected, rtol=1e-4, atol=1e-4)
    assert ours.target(tokens) is tokens
    assert set(ours.state_dict()) == {"mean", "std", "is_set"}


def test_a_rotation_leaves_cosine_and_squared_error_as_they_are(covariance: np.ndarray) -> None:
    scaled, turned = (scaler(name, covariance) for name in ("scale", "phi_s"))
    first, second = torch.randn(2, 4, 5, CHANNELS)
    for loss in (cosine_loss, mse_loss):
        torch.testing.assert_close(
            loss(turned.target(first), turned.target(second)), loss(scaled.target(first), scaled.target(second))
        )


def test_targets_stay_float32_in_a_model_that_is_converted_or_under_autocast(covariance: np.ndarray) -> None:
    ours = scaler("whiten", covariance)
    tokens = torch.randn(2, CHANNELS)
    expected = ours.target(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.target(tokens), expected)
    assert torch.equal(ours.bfloat16().target(tokens), expected)


def test_a_missing_covariance_is_refused() -> None:
    ours = FeatureScaler("some", CHANNELS)
    ours.use("phi_s")
    with pytest.raises(ConfigError, match="needs covariances"):
        ours.set(np.zeros(CHANNELS), np.ones(CHANNELS))
