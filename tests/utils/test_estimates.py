import math

import numpy as np
import pytest
from scipy import stats

from theia.utils.estimates import (
    correlation,
    estimate,
    holm,
    over_episodes,
    paired_difference,
    paired_over_episodes,
)

# Of the t distribution, from a printed table: 97.5 % with 1 and 2 degrees of freedom.
T_1, T_2 = 12.706, 4.303


def test_the_interval_of_a_mean_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(T_2 / math.sqrt(3), abs=1e-3)  # standard deviation 1
    assert found.low == pytest.approx(2 - 2.484, abs=1e-3)
    assert found.high == pytest.approx(2 + 2.484, abs=1e-3)


def test_one_value_has_no_interval() -> None:
    found = estimate([0.7])
    assert (found.mean, found.low, found.high, found.half_width, found.n) == (0.7, None, None, None, 1)


def test_equal_values_have_an_interval_without_width() -> None:
    found = estimate([0.1, 0.1, 0.1])
    assert found.low == found.high == pytest.approx(0.1)
    assert estimate([0.0, 0.0]).half_width == 0


def test_differences_are_those_of_common_seeds() -> None:
    # Seeds 1 and 2 are common: differences 1 and 2, standard error 0.5.
    found = paired_difference({0: 100.0, 1: 3.0, 2: 5.0}, {2: 3.0, 1: 2.0, 7: -100.0})
    assert found is not None
    assert (found.mean, found.n) == (1.5, 2)
    assert found.half_width == pytest.approx(T_1 * 0.5, abs=1e-3)
    # With one degree of freedom Student's distribution is Cauchy's: t = 3.
    assert found.p == pytest.approx(1 - 2 * math.atan(3) / math.pi)


def test_one_common_seed_gives_a_difference_only() -> None:
    found = paired_difference({0: 0.5, 1: 9.0}, {0: 0.25})
    assert found is not None
    assert (found.mean, found.low, found.high, found.p, found.n) == (0.25, None, None, None, 1)


def test_without_common_seeds_there_is_no_difference() -> None:
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert paired_difference({}, {1: 1.0}) is None


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_equal_differences_have_no_p(shift: float) -> None:
    reference = {0: 0.1, 1: 0.2, 2: 0.7}
    # In floating point these differences of 0.1 are not the same.
    found = paired_difference({seed: value + shift for seed, value in reference.items()}, reference)
    assert found is not None
    assert found.p is None
    assert found.low == found.high == pytest.approx(shift)


def test_holms_correction() -> None:
    # By hand: the k-th smallest of n times n - k + 1, never less than the one before, at most 1.
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 4 * 0.005, "a": 3 * 0.01, "c": 2 * 0.03, "b": 2 * 0.03}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_the_interval_of_a_correlation_is_fishers() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0]
    found = correlation(x, y)
    assert found is not None
    assert found.r == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24), Spearman's formula for ranks
    width = 1.959964 / math.sqrt(5 - 3)
    assert found.low == pytest.approx(math.tanh(math.atanh(0.8) - width), abs=1e-6)
    assert found.high == pytest.approx(math.tanh(math.atanh(0.8) + width), abs=1e-6)
    assert found.n == 5


def test_three_points_have_no_interval_and_two_no_correlation() -> None:
    found = correlation([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
    assert found is not None
    assert found.r == pytest.approx(0.5)
    assert (found.low, found.high) == (None, None)
    assert correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert correlation([], []) is None


def test_a_constant_correlates_with_nothing() -> None:
    assert correlation([0.3, 0.1 + 0.2, 0.3, 0.3], [1.0, 2.0, 3.0, 4.0]) is None
    assert correlation([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]) is None


@pytest.mark.filterwarnings("error")
def test_points_on_a_line_have_an_interval_without_width() -> None:
    found = correlation([1.0, 2.0, 3.0, 4.0], [-2.0, -4.0, -6.0, -8.0])
    assert found is not None
    assert (found.r, found.low, found.high) == (pytest.approx(-1), pytest.approx(-1), pytest.approx(-1))


def test_agrees_with_scipy() -> None:
    ours, theirs = {0: 0.61, 1: 0.64, 2: 0.60, 3: 0.66}, {0: 0.58, 1: 0.63, 2: 0.61, 3: 0.62}
    found = paired_difference(ours, theirs)
    expected = stats.ttest_rel(list(ours.values()), list(theirs.values()))
    assert found is not None
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        found = over_episodes(rng.gamma(2, 1, (1, 40)), np.ones(40))
        assert found.low is not None
        assert found.high is not None
        covered.append(found.low <= 2 <= found.high)
    assert 0.88 < np.mean(covered) < 0.99


def test_episodes_count_by_their_weight() -> None:
    assert over_episodes(np.array([[1.0, 3.0]]), np.array([3.0, 1.0])).mean == 1.5


def test_a_paired_difference_sees_what_the_spread_of_episodes_hides() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(5, 3, (1, 30))
    found = paired_over_episodes(reference - 0.2 + rng.normal(0, 0.1, (1, 30)), reference, np.ones(30))
    assert found.high is not None
    assert found.high < 0
    assert found.p is not None
    assert found.p < 0.001
    assert paired_over_episodes(reference, reference, np.ones(30)).p == 1


def test_seeds_spread_as_much_against_a_reference_that_is_not_random() -> None:
    errors = np.repeat([[0.1], [0.5], [0.9]], 20, 1)
    one = paired_over_episodes(errors, np.full((1, 20), 0.7), np.ones(20))
    assert one == paired_over_episodes(errors, np.full((3, 20), 0.7), np.ones(20))
    assert (one.low, one.high) == pytest.approx((-0.6, 0.2))
    other = paired_over_episodes(np.full((1, 20), 0.7), errors, np.ones(20))
    assert (other.low, other.high) == pytest.approx((-0.2, 0.6))


def test_parts_that_were_chosen_do_not_widen_the_interval() -> None:
    apart = np.tile([[1.0, 0.0]], 25)
    found = over_episodes(apart, np.ones(50), ["push", "pull"] * 25)
    assert (found.low, found.mean, found.high) == (0.5, 0.5, 0.5)
    # One part of rate 0.5, one without spread: the error of the mean is half of the first one's.
    rng = np.random.default_rng(0)
    half = np.concatenate([rng.permutation(np.repeat([1.0, 0.0], 50)), np.zeros(100)])[None]
    found = over_episodes(half, np.ones(200), np.repeat([0, 1], 100).tolist())
    assert found.half_width == pytest.approx(1.96 * 0.05 / 2, rel=0.15)


def test_the_p_value_of_flipped_signs_is_exact_for_few_episodes() -> None:
    # All eight differences have one sign: of 256 ways to flip them, two are as extreme.
    found = paired_over_episodes(np.arange(1.0, 9)[None], np.zeros((1, 8)), np.ones(8))
    assert found.p == 2 / 256
