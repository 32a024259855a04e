"""Differences of a server's counters, and when an absent one is 0."""

from __future__ import annotations

import pytest
from row_samples import metrics_samples

from sgl_hq.launch.kv_accounts import AccountsError
from sgl_hq.launch.load_ab.counters import WITNESSES, Counters, packed_tier_evictions, read_counters, total
from sgl_hq.launch.prometheus_text import Sample


def hq(demoted: int, dropped: int) -> dict:
    return {"counters": {"pages_packed": 20, "pages_demoted": demoted, "pages_dropped": dropped}}


def test_absent_counters_are_0_before_the_first_event():
    assert read_counters(metrics_samples({}), None) == Counters(0, 0, 0, 0, 0)


@pytest.mark.parametrize("counter", WITNESSES)
def test_absent_counters_are_unknown_without_their_witness(counter):
    samples = [s for s in metrics_samples({}) if s.name != WITNESSES[counter]]
    with pytest.raises(AccountsError, match=WITNESSES[counter]):
        total(samples, counter)
    assert total([*samples, Sample(counter, {}, 5.0)], counter) == 5, "present, it needs none"


def test_evictions_timed_but_not_counted_are_an_error():
    with pytest.raises(AccountsError, match="evicted_tokens_total"):
        read_counters(metrics_samples({"sglang:eviction_duration_seconds_count": 1}), None)


def test_totals_over_label_sets_and_their_difference():
    before = read_counters(metrics_samples({"sglang:prompt_tokens_total": 100, "sglang:num_requests_total": 1}), None)
    samples = metrics_samples({
        "sglang:evicted_tokens_total": 640, "sglang:num_retracted_requests_total": 2, "sglang:num_requests_total": 3,
        "sglang:generation_tokens_total": 7,
    })  # fmt: skip
    streamed = [Sample("sglang:prompt_tokens_total", {"is_streaming": label}, 200.0) for label in ("true", "false")]
    after = read_counters([*samples, *streamed], None)
    assert after.since(before) == Counters(evicted_tokens=640, retractions=2, requests=2, prompt_tokens=300, output_tokens=7)
    with pytest.raises(AccountsError, match="prompt_tokens"):
        before.since(after)


def test_what_the_packed_tier_adds():
    assert packed_tier_evictions(None) == 0
    assert packed_tier_evictions(hq(demoted=0, dropped=2)) == 128, "what was packed while there was room is no eviction"
    assert packed_tier_evictions(hq(demoted=9, dropped=2)) == (2 - 9) * 64
    counted = metrics_samples({"sglang:evicted_tokens_total": 10 * 64})  # nine of the ten pages were packed, two dropped since
    assert read_counters(counted, hq(demoted=9, dropped=2)).evicted_tokens == 3 * 64
