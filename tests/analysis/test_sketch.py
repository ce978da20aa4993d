import pytest
import torch

from theia.analysis.norms import EntropyOfNorms, NormSketch, RelativeNorms


def of(norms: torch.Tensor) -> RelativeNorms:
    sketch = NormSketch()
    for part in norms.split(3):
        sketch.update(part)
    return sketch.compute()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e5])
def test_the_median_is_that_of_all_norms_at_once_on_any_scale(scale: float) -> None:
    norms = scale * torch.rand(11, 101, generator=torch.Generator().manual_seed(0)).exp()
    assert of(norms).median == pytest.approx(float(norms.double().median()), rel=5e-4)


def test_outliers_are_tokens_of_more_than_three_medians() -> None:
    norms = torch.full((4, 50), 2.0)
    norms[0, :3] = 5.9
    norms[1, :5] = 6.1
    assert of(norms).outliers == 5 / 200


def test_the_entropy_is_that_of_norms_divided_by_their_median() -> None:
    norms = torch.rand(40, 200, generator=torch.Generator().manual_seed(0)) + 0.3
    expected = EntropyOfNorms()
    expected.update(norms / norms.median())

    assert of(norms).entropy == pytest.approx(expected.compute().value, abs=0.01)
    assert of(norms * 1000).entropy == pytest.approx(of(norms).entropy, abs=0.01)


def test_constant_norms_have_no_entropy_and_no_outliers() -> None:
    found = of(torch.full((3, 7), 12.34))
    assert (found.entropy, found.outliers) == (0, 0)


def test_where_most_tokens_are_0_nothing_is_relative_to_them() -> None:
    norms = torch.zeros(3, 7)
    norms[0, 0] = 1
    found = of(norms)
    assert (found.median, found.entropy, found.outliers, found.counts) == (0, None, None, None)
