"""Every metric: name, labels, and where its value stands in the `hq` block of /server_info (`server_state.py`). Plain data.

The exporter, `sgl-hq top`, the Grafana dashboard and their tests all go by this list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"

# Set at once when pages are packed or dropped, the others at most once a second: `launch/kv_accounts.py` compares these three with
# SGLang's own gauge of dense tokens while requests run.
PACKED_PAGES = "sglang:hq_packed_pages_used"
PACKED_BYTES = "sglang:hq_packed_bytes_used"
LENT_PAGES = "sglang:hq_dense_pages_lent"

INFO = "sglang:hq_info"
PAGES = "sglang:hq_pages"
BYTES = "sglang:hq_bytes"
SINKS = "sglang:hq_sinks"
PACKED_FRACTION = "sglang:hq_packed_fraction"
REUSE_FACTOR = "sglang:hq_reuse_factor"
LIVE_REQUESTS = "sglang:hq_live_requests"
WORKSPACE_BYTES = "sglang:hq_workspace_bytes"
PAGES_MOVED = "sglang:hq_pages_moved_total"
SLABS_MOVED = "sglang:hq_slabs_moved_total"
REFUSALS = "sglang:hq_refusals_total"
TOKENS_READ = "sglang:hq_packed_tokens_read_total"
TOKENS_ATTENDED = "sglang:hq_packed_tokens_attended_total"
OPERATION_SECONDS = "sglang:hq_operation_seconds"
GROUP_SIZE = "sglang:hq_group_requests"
AUDITS = "sglang:hq_audits_total"
AUDIT_FINDINGS = "sglang:hq_audit_findings_total"
AUDIT_SECONDS = "sglang:hq_audit_seconds_total"

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """read(hq block) -> value by label values, `()` without labels. The value is a number, or of a histogram `Bins.describe()`.
    at_once: set whenever pages move, not only once a second."""

    name: str
    kind: str
    help: str
    read: Callable[[Mapping[str, Any]], dict[Labels, Any]]
    labels: Labels = ()
    at_once: bool = False


def _one(*path: str) -> Callable[[Mapping[str, Any]], dict[Labels, Any]]:
    def read(hq):
        for key in path:
            hq = hq[key]
        return {(): hq}

    return read


def _states(what: str) -> Callable[[Mapping[str, Any]], dict[Labels, Any]]:
    """Pages, or bytes, of both tiers by state."""
    return lambda hq: {(tier, state): hq[tier][f"{what}_{state}"] for tier in ("dense", "packed") for state in ("free", "live", "cached")}


def _by_key(*path: str) -> Callable[[Mapping[str, Any]], dict[Labels, Any]]:
    one = _one(*path)
    return lambda hq: {(key,): value for key, value in one(hq)[()].items()}


def _info(hq) -> dict[Labels, Any]:
    values = (hq["version"], hq["format"], hq["pack"], hq["gate"]["verdict"], str(hq["layout_version"]))
    return {values: 1}


def _moved(hq) -> dict[Labels, Any]:
    counters = hq["counters"]
    return {
        ("pack",): counters["pages_packed"] - counters["pages_demoted"],
        ("demote",): counters["pages_demoted"],
        ("drop_packed",): counters["pages_dropped"],
        ("drop_dense",): counters["dense_pages_dropped"],
    }


def _slabs_moved(hq) -> dict[Labels, Any]:
    return {("lend",): hq["counters"]["slabs_lent"], ("reclaim",): hq["counters"]["slabs_reclaimed"]}


CATALOGUE: tuple[Metric, ...] = (
    Metric(INFO, GAUGE, "1; what is served.", _info, ("version", "format", "pack", "gate", "layout_version")),
    Metric(PAGES, GAUGE, "Pages of 64 tokens: free, live (read by running requests) or cached; lent ones are left out.", _states("pages"), ("tier", "state")),
    Metric(BYTES, GAUGE, "The same in bytes, sink slots of packed pages left out.", _states("bytes"), ("tier", "state")),
    Metric(SINKS, GAUGE, "Sink slots of the packed tier.", lambda hq: {(s,): hq["packed"]["sinks_" + s] for s in ("free", "used")}, ("state",)),
    Metric(PACKED_PAGES, GAUGE, "Pages in the packed tier, but those that are being packed.", _one("packed", "pages_used"), at_once=True),
    Metric(PACKED_BYTES, GAUGE, "Bytes of the packed tier that hold KV, sink slots included.", _one("packed", "bytes_used"), at_once=True),
    Metric(LENT_PAGES, GAUGE, "Dense pages whose memory the packed tier has at present.", _one("packed", "dense_pages_lent"), at_once=True),
    Metric(PACKED_FRACTION, GAUGE, "Packed share of the resident tokens; 0 when none is.", _one("packed_token_fraction")),
    Metric(REUSE_FACTOR, GAUGE, "Packed tokens attended / read since the start; 0 before the first.", _one("reuse_factor")),
    Metric(LIVE_REQUESTS, GAUGE, "Requests that hold KV.", _one("live_requests")),
    Metric(WORKSPACE_BYTES, GAUGE, "Device bytes of plans and partial results.", _one("workspace_bytes")),
    Metric(PAGES_MOVED, COUNTER, "Pages packed, packed in place of an eviction (demote), dropped by tier.", _moved, ("operation",)),
    Metric(SLABS_MOVED, COUNTER, "Parts of memory lent to the packed tier, and had back under pressure.", _slabs_moved, ("operation",)),
    Metric(REFUSALS, COUNTER, "Nodes that were to be packed and were not.", _by_key("counters", "refused"), ("reason",)),
    Metric(TOKENS_READ, COUNTER, "Packed tokens read, once per group and forward.", _one("counters", "packed_tokens_read")),
    Metric(TOKENS_ATTENDED, COUNTER, "The same, once per request of the group.", _one("counters", "packed_tokens_attended")),
    Metric(OPERATION_SECONDS, HISTOGRAM, "Time the scheduler spent on one pack, demote or drop.", _by_key("seconds"), ("operation",)),
    Metric(GROUP_SIZE, HISTOGRAM, "Requests that read a group of packed pages together, per forward.", _one("group_requests")),
    Metric(AUDITS, COUNTER, "Audits done (--hq-audit).", _one("audit", "audits")),
    Metric(AUDIT_FINDINGS, COUNTER, "What audits found, by check.", _by_key("audit", "findings"), ("check",)),
    Metric(AUDIT_SECONDS, COUNTER, "Time the scheduler spent on audits.", _one("audit", "seconds")),
)
