"""The metrics against numbers that can be worked out by hand."""

import math

import pytest
import torch

from langchain_aisp.evaluation.metrics import (
    Verdict,
    best_of_n_kl,
    best_so_far,
    bootstrap_interval,
    cosine,
    cost_to_reach,
    diversity,
    estimate,
    mean_curve,
    paired,
    preference,
    standard_error,
    value_at,
    win_rate,
    words,
)


def test_the_standard_error_is_the_deviation_over_the_root_of_the_count():
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3 / 4))
    assert math.isnan(standard_error([1.0]))


def test_the_bootstrap_interval_of_many_values_is_that_of_the_normal_distribution():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    found = estimate(values)
    assert found.low == pytest.approx(found.mean - 1.96 * found.standard_error, abs=0.02)
    assert found.high == pytest.approx(found.mean + 1.96 * found.standard_error, abs=0.02)
    assert bootstrap_interval(values) == (found.low, found.high)


def test_the_interval_of_two_values_spans_them():
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_pairing_removes_what_prompts_have_in_common():
    baseline = [0.0, 10.0, 100.0, 1000.0]
    found = paired([value + 1 for value in baseline], baseline)
    assert (found.mean, found.low, found.high, found.standard_error) == (1.0, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="3 and 4"):
        paired([1.0, 2.0, 3.0], baseline)
    with pytest.raises(ValueError, match="nothing to average"):
        estimate([])


def test_diversity_is_the_product_of_the_shares_of_distinct_n_grams():
    assert diversity(words("One two three four five")) == pytest.approx(4 / 5 * 3 / 4 * 2 / 3)
    assert diversity(words("a a a a")) == pytest.approx(1 / 4 * 1 / 3 * 1 / 2)  # 3, 2 and 1 n-grams, one distinct each
    assert diversity([7, 8, 7, 8], sizes=(2,)) == pytest.approx(2 / 4)
    assert diversity(words("a b a b")) < diversity(words("a b c d"))
    assert diversity([]) == 0.0


def test_the_cosine_of_parallel_orthogonal_and_opposite_vectors():
    assert cosine([3.0, 4.0], [6.0, 8.0]) == pytest.approx(1.0)
    assert cosine([1.0, 0.0], [0.0, 2.0]) == 0.0
    assert cosine([1.0, 2.0], [-1.0, -2.0]) == pytest.approx(-1.0)
    assert cosine([0.0, 0.0], [1.0, 0.0]) == 0.0


def test_the_kl_of_best_of_n_is_that_of_the_largest_of_n_uniform_numbers():
    assert best_of_n_kl(1) == 0.0
    for samples in (2, 8, 64):  # the largest has the density n x^(n-1) on [0, 1], the uniform has 1
        x = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
        density = samples * x ** (samples - 1)
        assert best_of_n_kl(samples) == pytest.approx(float(torch.xlogy(density, density).mean()), abs=1e-4)


def test_the_best_so_far_prefers_complete_answers_and_earlier_ones():
    assert best_so_far([1.0, 3.0, 2.0, 3.0], [True] * 4) == [0, 1, 1, 1]
    assert best_so_far([5.0, 1.0, 9.0, 2.0], [False, True, False, True]) == [0, 1, 1, 3]
    assert best_so_far([], []) == []


def test_a_curve_is_read_at_its_last_point_not_beyond_the_cost():
    costs, values = [32.0, 64.0, 96.0], [1.0, 2.0, 4.0]
    assert [value_at(costs, values, cost) for cost in (31, 32, 63.9, 64, 1e9)] == [None, 1.0, 1.0, 2.0, 4.0]


def test_the_cost_to_reach_a_reward_is_that_of_the_first_point_no_lower():
    costs, values = [32.0, 64.0, 96.0], [1.0, 2.0, 4.0]
    assert [cost_to_reach(costs, values, target) for target in (0.5, 2.0, 2.1, 4.1)] == [32.0, 64.0, 96.0, None]


def test_a_mean_curve_begins_where_all_curves_have_begun():
    curves = [([1.0, 2.0], [0.0, 4.0]), ([2.0, 3.0], [2.0, 6.0])]
    assert mean_curve(curves, [1, 2, 3, 4]) == ([2, 3, 4], [3.0, 5.0, 5.0])


def test_a_preference_is_one_half_for_equal_numbers():
    assert [preference(2.0, 1.0), preference(1.0, 2.0), preference(1.0, 1.0)] == [1.0, 0.0, 0.5]


def test_a_win_counts_both_orders_and_unreadable_verdicts_apart():
    won, lost, torn = Verdict(1.0, 1.0), Verdict(0.0, 0.0), Verdict(1.0, 0.0)
    half_read, unread = Verdict(1.0, None), Verdict(None, None)
    found = win_rate([won, won, lost, torn, half_read, unread])
    assert found.rate is not None
    assert found.rate.mean == pytest.approx((1 + 1 + 0 + 0.5 + 1) / 5)
    assert found.rate.count == 5
    assert found.unreadable == 3
    assert found.undecided == 1 / 4
    assert win_rate([unread]).rate is None


def test_seeds_of_a_prompt_are_averaged_before_the_interval():
    won, lost = Verdict(1.0, 1.0), Verdict(0.0, 0.0)
    found = win_rate([won, lost, won, lost], seeds=2)
    assert found.rate is not None
    assert (found.rate.low, found.rate.high, found.rate.count) == (0.5, 0.5, 2)


def test_an_exchanged_verdict_is_the_other_side_s():
    assert Verdict(1.0, None).exchanged == Verdict(None, 0.0)
    assert Verdict(0.5, 1.0).exchanged == Verdict(0.0, 0.5)
