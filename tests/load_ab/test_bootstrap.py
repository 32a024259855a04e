"""Intervals: what they hold, when there are none, and that they are the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgl_hq.launch.load_ab.bootstrap import mean, percentiles


def test_one_value_has_no_interval():
    assert mean([3.5]) == (3.5, None, None, 1)
    assert percentiles([3.5], [50, 99]) == [(3.5, None, None, 1), (3.5, None, None, 1)]


def test_equal_values_have_a_point():
    assert mean([2.0] * 3) == (2, 2, 2, 3)
    assert percentiles([2.0] * 9, [90]) == [(2, 2, 2, 9)]


@settings(max_examples=25, deadline=None)
@example([372324.07794666773] * 2)  # the mean of equal values is a last digit beside them
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=30))
def test_intervals_hold_the_value_and_stay_within_the_data(values):
    slack = 1e-9 * max(values)
    for estimate in (mean(values), *percentiles(values, [50, 90])):
        assert min(values) - slack <= estimate.low <= estimate.value <= estimate.high <= max(values) + slack
        assert estimate.n == len(values)


def test_the_same_every_time_and_narrower_with_more_requests():
    times = np.random.default_rng(3).exponential(100, 2000)
    few, many = percentiles(times[:50], [50])[0], percentiles(times, [50])[0]
    assert many == percentiles(times, [50])[0]
    assert many.high - many.low < (few.high - few.low) / 3
    assert many.low < 100 * np.log(2) < many.high, "the median of this distribution"


def test_coverage_of_the_mean():
    """Of 100 samples of 40 normal values, about 95 intervals hold the true mean; below 85 something is wrong."""
    rng = np.random.default_rng(5)
    estimates = [mean(rng.normal(10, 2, 40)) for _ in range(100)]
    assert 85 <= sum(e.low <= 10 <= e.high for e in estimates) < 100


def test_percentiles_together_equal_percentiles_apart():
    times = list(np.random.default_rng(4).exponential(100, 60))
    assert percentiles(times, [50, 90, 99]) == [pytest.approx(percentiles(times, [q])[0]) for q in (50, 90, 99)]
