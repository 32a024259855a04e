"""The `hq` block of /server_info: what is resident where, and what has happened so far.

Only msgpack-native values. `used` is what holds KV of live or cached tokens now; `allocated` is what was taken from
the machine at start. Comparisons of arms must use the same one of the two on both sides.
"""

from __future__ import annotations

from typing import Any

from sgl_hq import __version__
from sgl_hq.page_format import PAGE_TOKENS, STATED_PREFIX_TOKENS, mean_stored_bits


def describe(scheduler) -> dict[str, Any]:
    """`scheduler`: SGLang's Scheduler of this process."""
    tree, allocator = scheduler.tree_cache, scheduler.token_to_kv_pool_allocator
    pool, backend = allocator.get_kvcache(), scheduler.tp_worker.model_runner.attn_backend
    config, packed = pool.config, pool.packed
    per_token = pool.shape.dense_bytes_per_token
    free = allocator.available_size()
    state = {
        "active": True,
        "gate": scheduler.server_args._hq_gate,
        "version": __version__,
        "format": config.format,
        "pack": config.pack,
        "packed_fraction": config.packed_fraction if packed else 0.0,
        "page_tokens": PAGE_TOKENS,
        "stored_bits_per_value": 16.0,
        "dense": {
            "tokens_total": pool.size,
            "tokens_free": free,
            "bytes_per_token": per_token,
            "bytes_allocated": pool.dense_bytes_allocated,
            "bytes_used": (pool.size - free) * per_token,
        },
        "packed": {
            "pages_total": 0, "pages_free": 0, "pages_used": 0, "page_bytes": 0,
            "sinks_total": 0, "sinks_free": 0, "sink_bytes": 0, "bytes_allocated": 0, "bytes_used": 0,
        },
        "workspace_bytes": backend.workspace_bytes,
        "metadata_bytes": tree.metadata_bytes + (packed.metadata_bytes if packed else 0),
        "live_requests": len(tree.live),
        "counters": {
            **tree.counter_values(),
            "packed_tokens_read": backend.packed_tokens_read,
            "packed_tokens_attended": backend.packed_tokens_attended,
        },
    }
    if packed:
        layouts = [codec.layout for codec in packed.codecs]
        state["stored_bits_per_value"] = mean_stored_bits(layouts, STATED_PREFIX_TOKENS)
        state["packed"] = {
            "pages_total": packed.sizes.packed_pages,
            "pages_free": packed.pages_free,
            "pages_used": packed.pages_used,
            "page_bytes": packed.page_bytes,
            "sinks_total": packed.sizes.sinks,
            "sinks_free": packed.sinks_free,
            "sink_bytes": packed.sink_bytes,
            "bytes_allocated": packed.bytes_allocated,
            "bytes_used": packed.bytes_used,
        }
    return state
