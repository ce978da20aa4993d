import numpy as np
import pytest
from scipy import stats

from theia.utils.statistics import compare, holm, interval, sign_flip_p


def test_holm_is_that_of_the_textbook() -> None:
    # Holm's example of four p-values: 4 x 0.005, 3 x 0.01, 2 x 0.03, and the larger of 0.06 and 1 x 0.04.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("count", [8, 40])
def test_p_values_are_those_of_scipys_permutation_test(count: int) -> None:
    differences = np.random.default_rng(count).normal(0.3, 1, count)
    peer = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=2**8 if count == 8 else 20_000,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    assert sign_flip_p(differences) == pytest.approx(peer.pvalue, abs=0.02 if count > 8 else 1e-9)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        errors = rng.gamma(2, 1, (1, 40))
        _, low, high = interval(errors, np.ones(40))
        covered.append(low <= 2 <= high)
    assert 0.88 < np.mean(covered) < 0.99


def test_episodes_count_by_their_weight() -> None:
    assert interval(np.array([[1.0, 3.0]]), np.array([3.0, 1.0])).value == 1.5


def test_a_paired_difference_sees_what_episodes_hide() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(5, 3, (1, 30))
    found = compare(reference - 0.2 + rng.normal(0, 0.1, (1, 30)), reference, np.ones(30))
    assert found.difference.high < 0
    assert found.p < 0.001
    assert compare(reference, reference, np.ones(30)).p == 1
