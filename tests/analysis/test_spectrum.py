import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from theia.analysis.similarity import Spectrum, SpectrumFigures


def of(patches: torch.Tensor, batch: int = 3) -> SpectrumFigures:
    spectrum = Spectrum(patches.shape[-1])
    for part in patches.split(batch):
        spectrum.update(part)
    return spectrum.compute()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_agrees_with_scikit_learn_on_all_tokens_at_once(offset: float) -> None:
    torch.manual_seed(0)
    patches = torch.randn(10, 20, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + offset
    expected = PCA(svd_solver="full").fit(patches.flatten(0, 1).numpy()).explained_variance_ratio_

    assert of(patches).ratio == pytest.approx(expected, abs=1e-10)
    assert of(patches, 10).area == pytest.approx(of(patches, 1).area, abs=1e-12)


def test_alike_components_have_half_the_area() -> None:
    patches = torch.cat([torch.eye(8), -torch.eye(8)])[None]
    found = of(patches)
    assert found.ratio == pytest.approx(np.full(8, 1 / 8))
    assert found.area == pytest.approx(0.5)
    assert found.cumulative == pytest.approx(np.linspace(0, 1, 9))
    assert (found.for_90, found.for_99) == (8, 8)


def test_a_single_component_has_all_the_area_there_is() -> None:
    patches = torch.arange(10.0)[:, None] * torch.tensor([3.0, -4.0, 0.0, 1.0])
    found = of(patches[None])
    assert found.ratio == pytest.approx([1, 0, 0, 0])
    assert found.area == pytest.approx(1 - 1 / 8)
    assert (found.for_90, found.for_99) == (1, 1)


def test_fewer_tokens_than_components_leave_the_rest_without_variance() -> None:
    found = of(torch.randn(1, 5, 30))
    assert found.ratio is not None
    assert (found.ratio[:4] > 0).all()
    assert (found.ratio[4:] == 0).all()
    assert found.ratio.sum() == pytest.approx(1)


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567])
def test_constant_features_have_no_components(value: float) -> None:
    found = of(torch.full((4, 9, 6), value))
    assert (found.ratio, found.area, found.for_90, found.cumulative) == (None, None, None, None)


def test_rounding_is_no_spectrum() -> None:
    noise = torch.randn(4, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert of(1 + 1e-8 * noise).area is None
    assert of(1 + 1e-5 * noise).area == pytest.approx(of(noise).area, abs=1e-4)
