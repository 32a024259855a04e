"""What a server did in a phase: totals before and after it, from one /metrics answer each, and our plugin's hq block.

A Prometheus counter appears in /metrics with its first event. Absent means 0 only if its witness is there, a metric that the
same collector, made under the same --enable-metrics, sets without any event: then events would be counted too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sgl_hq.launch.kv_accounts import AccountsError
from sgl_hq.launch.prometheus_text import Sample
from sgl_hq.page_format import PAGE_TOKENS

EVICTED = "sglang:evicted_tokens_total"
EVICTION_TIMES = "sglang:eviction_duration_seconds_count"
RETRACTED = "sglang:num_retracted_requests_total"
# Counter -> witness (sglang 0.5.17, srt/observability/metrics_collector.py). The tree's collector has no metric that it sets
# without an event; the scheduler that owns the tree publishes its slots, and both are made under the one flag.
WITNESSES = {
    EVICTED: "sglang:kv_available_tokens",
    RETRACTED: "sglang:num_retracted_reqs",
    "sglang:num_requests_total": "sglang:startup_time_seconds",
    "sglang:prompt_tokens_total": "sglang:startup_time_seconds",
    "sglang:generation_tokens_total": "sglang:startup_time_seconds",
}


@dataclass(frozen=True)
class Counters:
    """Totals since the server's start, or between two readings. Tokens and requests."""

    evicted_tokens: int
    retractions: int
    requests: int
    prompt_tokens: int
    output_tokens: int

    def since(self, before: Counters) -> Counters:
        """What happened between the two readings; raises AccountsError when a counter fell, as after a restart."""
        passed = {f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        if fell := [name for name, value in passed.items() if value < 0]:
            raise AccountsError(f"Counters fell during the phase ({', '.join(fell)}): the server was restarted, measure the phase again")
        return Counters(**passed)


def read_counters(samples: Sequence[Sample], hq: dict[str, Any] | None) -> Counters:
    """From a /metrics answer and the `hq` block of /server_info (None: no plugin) of a moment without running requests."""
    if not _values(samples, EVICTED) and _values(samples, EVICTION_TIMES):
        raise AccountsError(f"/metrics has {EVICTION_TIMES} without {EVICTED}: look the counter up in this SGLang's metrics_collector.py")
    return Counters(
        evicted_tokens=total(samples, EVICTED) + packed_tier_evictions(hq),
        retractions=total(samples, RETRACTED),
        requests=total(samples, "sglang:num_requests_total"),
        prompt_tokens=total(samples, "sglang:prompt_tokens_total"),
        output_tokens=total(samples, "sglang:generation_tokens_total"),
    )


def total(samples: Sequence[Sample], name: str) -> int:
    """Sum over all label sets; 0 where the counter is absent and its witness present, AccountsError where both are absent."""
    values = _values(samples, name)
    if not values and not _values(samples, WITNESSES[name]):
        raise AccountsError(f"/metrics has neither {name} nor {WITNESSES[name]}: start the server with --enable-metrics")
    return int(sum(values))


def packed_tier_evictions(hq: dict[str, Any] | None) -> int:
    """Tokens to add to SGLang's count of evicted ones, which knows dense pages only.

    What the packed tier dropped is lost and counts. SGLang counts as evicted what was packed in place of being dropped
    (`pages_demoted`), although it stays on the device: it is taken off again.
    """
    if hq is None:
        return 0
    return (hq["counters"]["pages_dropped"] - hq["counters"]["pages_demoted"]) * PAGE_TOKENS


def _values(samples: Sequence[Sample], name: str) -> list[float]:
    return [s.value for s in samples if s.name == name]
