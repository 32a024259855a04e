"""The `hq` block of /server_info: what is resident where, and what has happened so far. The metrics are read from it too.

Only msgpack-native values. `used` is what holds KV of live or cached tokens now; `allocated` is what was taken from
the machine at start. Comparisons of arms must use the same one of the two on both sides. Where memory moves between the tiers, what is
allocated to each is what it has at present, and the sum is that of the start; `lent` pages of the dense tier do not exist meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sgl_hq import __version__
from sgl_hq.audit.audit import NO_AUDIT
from sgl_hq.page_format import LAYOUT_VERSION, PAGE_TOKENS, STATED_PREFIX_TOKENS, mean_stored_bits


@dataclass(frozen=True)
class Sources:
    """tree: PackingRadixCache; allocator: SGLang's of the dense tier; backend: our attention backend; gate: `GateState.describe()`."""

    tree: Any
    allocator: Any
    backend: Any
    gate: dict[str, str]


def figures(sources: Sources, audit) -> dict[str, Any]:
    """All but the costly figures. audit: `Audit`, or None."""
    tree, backend, pool = sources.tree, sources.backend, sources.allocator.get_kvcache()
    config, packed = pool.config, pool.packed
    layouts = [codec.layout for codec in packed.codecs] if packed else []
    lent = tree.lent_tokens
    dense = _dense(pool, sources.allocator.available_size(), tree.evictable_size_, lent)
    in_packed = _packed(tree) if packed else dict.fromkeys(_PACKED, 0)
    packed_tokens = in_packed["pages_used"] * PAGE_TOKENS
    resident = packed_tokens + dense["tokens_total"] - dense["tokens_free"] - lent
    read, attended = backend.packed_tokens_read, backend.packed_tokens_attended
    return {
        "active": True,
        "gate": sources.gate,
        "version": __version__,
        "format": config.format,
        "pack": config.pack,
        "packed_fraction": config.packed_fraction if packed else 0.0,
        "page_tokens": PAGE_TOKENS,
        "layout_version": LAYOUT_VERSION,
        "stored_bits_per_value": mean_stored_bits(layouts, STATED_PREFIX_TOKENS) if layouts else 16.0,
        "dense": dense,
        "packed": in_packed,
        "packed_token_fraction": packed_tokens / resident if resident else 0.0,
        "workspace_bytes": backend.workspace_bytes,
        "live_requests": len(tree.live),
        "counters": {**tree.counters.totals(), "packed_tokens_read": read, "packed_tokens_attended": attended},
        "reuse_factor": attended / read if read else 0.0,
        "group_requests": backend.group_requests.describe(),
        "seconds": tree.counters.times(),
        "audit": audit.describe() if audit is not None else NO_AUDIT,
    }


def costly_figures(sources: Sources) -> dict[str, Any]:
    """What takes a walk over all packed nodes."""
    packed = sources.allocator.get_kvcache().packed
    return {"metadata_bytes": sources.tree.metadata_bytes + (packed.metadata_bytes if packed else 0)}


def packed_in_use(tree) -> dict[str, int]:
    """The figures of the packed tier that kv_accounts needs at every moment. Of pages that are being packed the bytes are used, and the
    tokens are still the dense tier's."""
    packed = tree.packed_tier
    pages = packed.pages_used - len(tree.pages_under_way)
    return {"pages_used": pages, "bytes_used": packed.bytes_used, "dense_pages_lent": tree.lent_tokens // PAGE_TOKENS}


def _dense(pool, free: int, cached: int, lent: int) -> dict[str, int]:
    """free, cached, lent: tokens; SGLang hands out whole pages. Live: read by running requests, cached: by none. The total is SGLang's,
    lent ones included."""
    per_token = pool.shape.dense_bytes_per_token
    tokens = {"free": free, "cached": cached, "live": pool.size - free - cached - lent}
    return {
        "tokens_total": pool.size,
        "tokens_free": free,
        "bytes_per_token": per_token,
        "bytes_allocated": pool.dense_bytes_allocated,
        "bytes_used": (tokens["cached"] + tokens["live"]) * per_token,
        **{f"pages_{state}": n // PAGE_TOKENS for state, n in tokens.items()},
        **{f"bytes_{state}": n * per_token for state, n in tokens.items()},
    }


def _packed(tree) -> dict[str, int]:
    """Live: pages that running requests read. pages_most: the largest total there can be."""
    packed, in_use, live = tree.packed_tier, packed_in_use(tree), tree.packed_live_pages
    page_bytes = packed.page_bytes
    writing, cached = packed.pages_used - in_use["pages_used"], in_use["pages_used"] - live
    pages = {"free": packed.pages_free, "writing": writing, "live": live, "cached": cached}
    values = {
        "pages_total": packed.pages_total,
        "pages_most": packed.sizes.packed_pages,
        **in_use,
        "page_bytes": page_bytes,
        "sinks_total": packed.sizes.sinks,
        "sinks_free": packed.sinks_free,
        "sinks_used": packed.sizes.sinks - packed.sinks_free,
        "sink_bytes": packed.sink_bytes,
        "bytes_allocated": packed.bytes_allocated,
        **{f"pages_{state}": n for state, n in pages.items()},
        **{f"bytes_{state}": n * page_bytes for state, n in pages.items()},
    }
    assert values.keys() == set(_PACKED)
    return values


_PACKED = (
    "pages_total", "pages_most", "dense_pages_lent", "pages_free", "pages_writing", "pages_live", "pages_cached", "pages_used",
    "page_bytes", "sinks_total", "sinks_free", "sinks_used", "sink_bytes", "bytes_allocated", "bytes_free", "bytes_writing", "bytes_live",
    "bytes_cached", "bytes_used",
)  # fmt: skip
