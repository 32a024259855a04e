"""Every refusal to pack is counted by its reason, and said once a minute: what, why, how much is missing, what to change."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from sgl_hq.cache.pack_counters import REFUSALS, PackCounters
from sgl_hq.cache.refusals import RefusalLog
from sgl_hq.rate_limited_log import RateLimitedLog


@pytest.fixture
def said(caplog):
    """RefusalLog, its counters, its clock in seconds, the lines logged."""
    caplog.set_level(logging.WARNING)
    clock, counters = SimpleNamespace(now=1000.0), PackCounters()
    log = RefusalLog(counters, RateLimitedLog(logging.getLogger("sgl_hq.test"), clock=lambda: clock.now))
    return SimpleNamespace(log=log, counters=counters, clock=clock, lines=lambda: [r.getMessage() for r in caplog.records])


def _tier(pages: int, free: int, sinks: int = 4):
    return SimpleNamespace(sizes=SimpleNamespace(packed_pages=pages, sinks=sinks), pages_total=pages, pages_free=free, elastic=False)


@pytest.mark.parametrize(
    "pages, needed, tier, live, reason, words",
    [
        (50, 50, _tier(40, 40), 0, "too_large", ["50 pages (3200 tokens)", "has 40 pages in all, 10 too few", "raise --hq-packed-fraction"]),
        (12, 12, _tier(40, 3), 30, "no_pages", ["3 of 40 packed pages are free, 9 are missing", "30 are read", "7 were used later", "run fewer requests"]),
        (50, 1, _tier(40, 0), 30, "no_pages", ["50 pages (3200 tokens)", "0 of 40 packed pages are free, 1 are missing", "10 were used later"]),
        (2, 2, _tier(40, 20, 5), 10, "no_sinks", ["all 5 slots", "1 is missing", "20 of 40", "a format without sinks"]),
    ],
)
def test_a_shortage_says_what_is_missing_and_what_to_change(said, pages, needed, tier, live, reason, words):
    said.log.no_room(pages, needed, tier, live)
    assert said.counters.refused == dict.fromkeys(REFUSALS, 0) | {reason: 1}
    [line] = said.lines()
    assert all(word in line for word in words), line


def test_where_memory_moves_no_fraction_is_to_be_raised(said):
    tier = SimpleNamespace(sizes=SimpleNamespace(packed_pages=40, sinks=4), pages_total=10, pages_free=2, elastic=True)
    said.log.no_room(6, 6, tier, 8)
    said.log.no_room(50, 50, tier, 8)
    first, second = said.lines()
    assert "2 of 10 packed pages are free, and the dense tier can spare no memory for more now, 4 are missing" in first
    assert "has 40 pages in all, 10 too few" in second
    assert all("raise --max-total-tokens or" in line and "--hq-packed-fraction" not in line for line in (first, second))


def test_values_a_format_cannot_hold_are_named(said):
    said.log.unpackable(3, ValueError("format hq6 cannot hold NaN"))
    [line] = said.lines()
    assert "format hq6 cannot hold NaN" in line and "No room is missing; --hq-format bf16" in line
    assert said.counters.refused["unpackable"] == 1


def test_one_line_a_minute_and_reason_with_a_count(said):
    for _ in range(5):
        said.log.no_room(12, 12, _tier(40, 3), 30)
    said.log.no_room(50, 50, _tier(40, 40), 0)
    assert len(said.lines()) == 2 and said.counters.refused["no_pages"] == 5
    said.clock.now += 59.9
    said.log.no_room(12, 12, _tier(40, 3), 30)
    assert len(said.lines()) == 2
    said.clock.now += 0.2
    said.log.no_room(12, 12, _tier(40, 3), 30)
    assert said.lines()[2].endswith("(5 more of this kind since the last line)")
    said.clock.now += 61
    said.log.no_room(12, 12, _tier(40, 3), 30)
    assert "more of this kind" not in said.lines()[3]
