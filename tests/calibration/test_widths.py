"""Bits go where they take away most, and no more are given than asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_hq.calibration.widths import MAX_BITS, MIN_BITS, allocate_widths

_costs = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)


@given(_costs, st.floats(MIN_BITS, MAX_BITS + 1))
@settings(deadline=None)
def test_the_budget_is_kept_and_used(costs, mean_bits):
    widths = allocate_widths(torch.tensor(costs), mean_bits)
    assert MIN_BITS <= widths.min() and widths.max() <= MAX_BITS
    assert widths.sum() == min(int(len(costs) * (mean_bits - MIN_BITS)) + MIN_BITS * len(costs), MAX_BITS * len(costs))


@given(_costs)
@settings(deadline=None)
def test_descending_importance_gives_descending_widths(costs):
    widths = allocate_widths(torch.tensor(sorted(costs, reverse=True)), 4.0)
    assert (widths.diff() <= 0).all()


def test_greedy_equals_the_best_of_all_allocations():
    costs = torch.tensor([100.0, 7.0, 1.0, 0.3])
    error = lambda widths: sum(c / (2**b - 1) ** 2 for c, b in zip(costs.tolist(), widths))  # noqa: E731
    best = min((w for w in itertools.product(range(2, 9), repeat=4) if sum(w) == 16), key=error)
    assert allocate_widths(costs, 4.0).tolist() == list(best)


def test_fewer_bits_than_every_component_needs():
    with pytest.raises(ValueError, match="at least 2"):
        allocate_widths(torch.ones(4), 1.9)
