"""A step within bounds is a row; a verdict needs all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sgl_hq.lab.oracle_rows import StepRow, summarize_selector

ROW = StepRow(
    selector="quest:f=0.5:b=16", text="code", step=0, context_tokens=512, mse=0.25, topk=0.8, argmax_equal=True, argmax_judged=True,
    rel_l2=0.10, kl=0.01, kept_fraction=0.5, read_fraction=0.6,
)  # fmt: skip
BROKEN = [
    {"mse": 0.2500001}, {"mse": math.inf}, {"mse": math.nan}, {"topk": 0.7}, {"argmax_equal": False}, {"rel_l2": 0.1001}, {"rel_l2": math.inf},
]  # fmt: skip


def test_figures_at_their_bounds_are_within():
    assert ROW.keeps_bounds
    assert replace(ROW, argmax_equal=False, argmax_judged=False).keeps_bounds  # a lead that rounding alone could turn


@pytest.mark.parametrize("change", BROKEN, ids=str)
def test_one_broken_bound_in_one_step_fails_the_implementation(change):
    broken = replace(ROW, **change)
    assert not broken.keeps_bounds
    found = summarize_selector([*[ROW] * 15, broken])
    assert (found["implementation_verdict"], found["rows_within_bounds"], found["rows"]) == ("fail", 15, 16)


def test_every_step_within_bounds_passes():
    found = summarize_selector([ROW, replace(ROW, text="wikitext", read_fraction=0.8, mse=0.1)])
    assert (found["implementation_verdict"], found["rows_within_bounds"]) == ("pass", 2)
    assert (found["read_fraction"], found["mse_max"], found["argmax_judged"]) == (pytest.approx(0.7), 0.25, 2)
