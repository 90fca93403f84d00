"""Confidence intervals, held against enumerated samples and published numbers."""

import math
import statistics
from itertools import product

import pytest

from halos import intervals


def test_the_error_of_a_mean_is_that_of_all_samples_that_could_have_been_drawn() -> None:
    """Of 3 prompts drawn from 4 that answer differently well: over all 64 draws the mean of the squared error is the variance of
    the mean, exactly."""
    population = (0.0, 0.25, 0.25, 1.5)
    draws = list(product(population, repeat=3))
    errors = []
    for draw in draws:
        low, high = intervals.of_mean(draw) or (0.0, 0.0)
        assert (low + high) / 2 == pytest.approx(statistics.fmean(draw))
        errors.append((high - low) / 2 / 1.959963984540054)
    variance = statistics.pvariance([statistics.fmean(draw) for draw in draws])
    assert statistics.fmean(error**2 for error in errors) == pytest.approx(variance)
    assert intervals.of_mean([1.0]) is None


def test_the_interval_of_answers_right_or_wrong_is_wilsons() -> None:
    eight = intervals.of_rate([1.0] * 8 + [0.0] * 2, 10)
    assert eight == pytest.approx((0.4901625, 0.9433178), abs=1e-7)  # scipy.stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert intervals.of_rate([0.0] * 20, 20) == pytest.approx((0.0, 0.1611252), abs=1e-7)
    assert intervals.of_rate([1.0] * 20, 20) == pytest.approx((0.8388748, 1.0), abs=1e-7)
    for count in range(1, 60):  # a bound of 2e-17 beside a rate of 0 would leave it outside its own interval
        assert intervals.of_rate([0.0] * count, count)[0] == 0.0
        assert intervals.of_rate([1.0] * count, count)[1] == 1.0
    assert intervals.of_rate([], 0) is None


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_the_interval_of_a_rate_covers_it_where_the_normal_approximation_does_not(rate: float) -> None:
    """Enumerated: the probability, over all outcomes of 20 prompts, that the interval holds the true rate."""

    def coverage(kind: str) -> float:
        total = 0.0
        for right in range(21):
            values = [1.0] * right + [0.0] * (20 - right)
            low, high = (intervals.of_rate(values, 20) if kind == "rate" else intervals.of_mean(values)) or (0.0, 0.0)
            total += math.comb(20, right) * rate**right * (1 - rate) ** (20 - right) * (low <= rate <= high)
        return total

    assert coverage("rate") > 0.93
    if rate != 0.5:
        assert coverage("mean") < 0.9


def test_several_samples_of_a_prompt_are_worth_what_their_spread_says() -> None:
    """Equal samples of each prompt add nothing; samples that differ within prompts as much as between them are so many more."""
    once = intervals.of_rate([1.0] * 5 + [0.0] * 5, 10)
    assert intervals.of_rate([1.0] * 5 + [0.0] * 5, 40) == once, "four equal answers of each"
    mixed = intervals.of_rate([0.5] * 10, 40)
    assert mixed == pytest.approx(intervals.of_rate([1.0] * 20 + [0.0] * 20, 40)), "40 independent answers"
    halfway = intervals.of_rate([0.75, 0.25] * 5, 40)
    assert halfway == pytest.approx(intervals.of_rate([1.0] * 20 + [0.0] * 20, 40)), "10 x 0.25 / 0.0625 answers"
    wide, narrow = once or (0, 1), halfway or (0, 1)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
