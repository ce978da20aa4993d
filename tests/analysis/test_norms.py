import math

import numpy as np
import pytest
import torch
from scipy import stats

from theia.analysis.norms import BIN_COUNTS, EntropyFigures, EntropyOfNorms, NormSketch, RelativeNorms, entropy
from theia.training.metrics import NormEntropy


def figures(norms: torch.Tensor, batch: int = 7, seed: int = 0) -> EntropyFigures:
    collected = EntropyOfNorms(seed)
    for part in norms.split(batch):
        collected.update(part)
    return collected.compute()


def test_the_value_is_that_of_the_metric_of_training() -> None:
    torch.manual_seed(0)
    patches = torch.randn(20, 50, 8) * torch.rand(20, 50, 1) * 3
    metric = NormEntropy()
    metric.update(patches)

    assert figures(patches.norm(dim=-1) / 8**0.5).value == pytest.approx(float(metric.compute()), abs=1e-6)


def test_equally_many_norms_in_k_bins_have_the_entropy_log_k() -> None:
    # 40 bins of 0.016 each, from 0.16 up; each number of bins that is 5 times smaller sees 5 times fewer.
    norms = (0.168 + 0.016 * torch.arange(40.0)).repeat(3, 1)
    found = figures(norms)

    assert found.value == pytest.approx(math.log(40))
    assert found.by_bins[250] == found.value
    assert found.by_bins[50] == pytest.approx(math.log(8))
    assert found.by_bins[750] == pytest.approx(math.log(40))
    assert found.beyond == 0
    assert found.counts.sum() == 120


@pytest.mark.parametrize("bins", BIN_COUNTS)
def test_every_number_of_bins_agrees_with_numpy(bins: int) -> None:
    norms = torch.rand(9, 300, generator=torch.Generator().manual_seed(1)) * 4.4
    counts, _ = np.histogram(norms.clamp(max=3.9999).double().numpy(), bins, (0, 4))

    assert figures(norms).by_bins[bins] == pytest.approx(stats.entropy(counts), abs=1e-3)
    assert figures(norms).beyond == pytest.approx(float((norms >= 4).double().mean()))


def test_constant_norms_have_no_entropy_and_an_interval_without_width() -> None:
    found = figures(torch.ones(5, 10))
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert all(value == 0 for value in found.by_bins.values())  # 1 is in the middle of a bin, not on an edge


def test_one_image_has_no_interval() -> None:
    found = figures(torch.rand(1, 100))
    assert (found.low, found.high) == (None, None)


def test_batches_change_nothing() -> None:
    norms = torch.rand(23, 40) * 2
    one, other = figures(norms, 1), figures(norms, 23)
    assert (one.value, one.low, one.high, one.by_bins) == (other.value, other.low, other.high, other.by_bins)


def test_the_interval_has_the_width_of_values_of_other_image_sets() -> None:
    """Each image has one norm, so that images decide everything: the entropy of a coin, thrown 200 times."""
    rng = np.random.default_rng(0)
    draws = [torch.from_numpy(rng.choice([0.5, 1.5], 200, p=[0.2, 0.8])).float() for _ in range(300)]
    values = [stats.entropy(np.unique(draw, return_counts=True)[1]) for draw in draws]
    found = figures(draws[0][:, None].expand(-1, 4), 200)
    assert found.low is not None
    assert found.high is not None

    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.std(values), rel=0.2)


def test_entropy_of_counts() -> None:
    assert entropy(np.array([5, 0, 0])) == 0
    assert entropy(np.array([1, 0, 3])) == pytest.approx(stats.entropy([0.25, 0.75]))


def relative(norms: torch.Tensor) -> RelativeNorms:
    sketch = NormSketch()
    for part in norms.split(3):
        sketch.update(part)
    return sketch.compute()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e5])
def test_the_median_is_that_of_all_norms_at_once_on_any_scale(scale: float) -> None:
    norms = scale * torch.rand(11, 101, generator=torch.Generator().manual_seed(0)).exp()
    assert relative(norms).median == pytest.approx(float(norms.double().median()), rel=5e-4)


def test_outliers_are_tokens_of_more_than_three_medians() -> None:
    norms = torch.full((4, 50), 2.0)
    norms[0, :3] = 5.9
    norms[1, :5] = 6.1
    assert relative(norms).outliers == 5 / 200


def test_the_entropy_is_that_of_norms_divided_by_their_median() -> None:
    norms = torch.rand(40, 200, generator=torch.Generator().manual_seed(0)) + 0.3
    expected = EntropyOfNorms()
    expected.update(norms / norms.median())

    assert relative(norms).entropy == pytest.approx(expected.compute().value, abs=0.01)
    assert relative(norms * 1000).entropy == pytest.approx(relative(norms).entropy, abs=0.01)


def test_constant_norms_have_no_relative_entropy_and_no_outliers() -> None:
    found = relative(torch.full((3, 7), 12.34))
    assert (found.entropy, found.outliers) == (0, 0)


def test_where_most_tokens_are_0_nothing_is_relative_to_them() -> None:
    norms = torch.zeros(3, 7)
    norms[0, 0] = 1
    found = relative(norms)
    assert (found.median, found.entropy, found.outliers, found.counts) == (0, None, None, None)
