"""The arithmetic of ceilings: published figures, limits, and the threshold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_hq.lab.errors import LabError
from sgl_hq.lab.projection import OVERHEADS, VERDICT_OVERHEAD, WORTH_BUILDING, Projection, is_open, project, speedup
from sgl_hq.page_format import get_format

SHARE = st.floats(0, 1)


@pytest.mark.parametrize(("overhead", "published"), [(0.0, 1.28), (0.05, 1.21), (0.10, 1.14)])
def test_published_arithmetic(overhead, published):
    """Earlier work on Qwen2.5-7B: attention 0.334 of a step, 0.337 of the tokens active."""
    assert round(speedup(0.334, 0.337, overhead), 2) == published
    assert overhead in OVERHEADS


@settings(deadline=None)
@given(SHARE, SHARE, st.floats(0, 2))
def test_old_time_over_new_time(p_attn, active, overhead):
    """Both steps written out in nanoseconds."""
    rest, attention = 1e9 * (1 - p_attn), 1e9 * p_attn
    new = rest + attention * active + 1e9 * overhead
    if new > 1:
        assert speedup(p_attn, active, overhead) == pytest.approx(1e9 / new)


def test_limits():
    assert speedup(0.5, 1) == 1
    assert speedup(0, 0.1, 0.25) == 0.8
    assert speedup(0.75, 0) == 4
    assert speedup(1, 0) == float("inf")


@pytest.mark.parametrize("numbers", [(-0.1, 0.5, 0), (1.1, 0.5, 0), (0.5, -0.1, 0), (0.5, 1.1, 0), (0.5, 0.5, -0.1), (float("nan"), 0, 0)])
def test_wrong_numbers_are_refused(numbers):
    with pytest.raises(LabError, match="give --"):
        speedup(*numbers)


def test_formats_and_grouping():
    found = {(p.kind, p.name.split(",")[0]): p for p in project(0.6, 64, 8192)}
    assert not [p for p in project(0.6, 64, 63) if p.kind == "format"]  # not one whole page
    (partly,) = (p for p in project(0.6, 64, 96) if p.name.startswith("hq4,"))
    assert partly.active == pytest.approx((64 * get_format("hq4").layout(64).stored_bits_per_value(64) + 32 * 16) / (96 * 16))
    assert found["grouping", "16 sharers"].active == 1 / 16
    assert found["format", "hq4"].active == get_format("hq4").layout(64).stored_bits_per_value(8192) / 16  # all of it whole pages
    assert ("format", "bf16") not in found and found["limit", "no attention at all"].active == 0
    hq4 = found["format", "hq4"]
    assert hq4.speedups == tuple(speedup(0.6, hq4.active, h) for h in OVERHEADS)


def test_a_target_is_open_if_no_attention_at_all_would_pay():
    for share in (0.05, 0.14, 0.15, 0.5):
        assert is_open(share) is (project(share, 64, 8192)[0].verdict == "worth building")
    assert [is_open(share) for share in (0.14, 0.15)] == [False, True]


def test_no_more_rows_share_a_prefix_than_a_batch_has():
    sharers = lambda batch: [p.name for p in project(0.6, 64, 8192, batch=batch) if p.kind == "grouping"]  # noqa: E731
    assert (sharers(1), sharers(16)) == ([], ["2 sharers", "4 sharers", "16 sharers"])


def test_the_threshold_is_met_or_not():
    at = lambda value: Projection("active", "x", 0.5, (), value).verdict  # noqa: E731
    assert (at(WORTH_BUILDING), at(WORTH_BUILDING - 1e-9)) == ("worth building", "closed")


def test_the_verdict_is_at_five_percent_whatever_columns_are_shown():
    (limit, *_) = project(0.13, 64, 1024, overheads=(0.0,))
    assert limit.speedups[0] > WORTH_BUILDING > speedup(0.13, 0, VERDICT_OVERHEAD) == limit.at_verdict
    assert limit.verdict == "closed"
