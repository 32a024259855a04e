"""Has a started server the KV pool that it was asked for? SGLang takes a smaller one without failing when memory is short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.kv_accounts import gauge
from sgl_hq.launch.prometheus_text import Sample
from sgl_hq.page_format import PAGE_TOKENS

POOL_TOLERANCE = 0.01  # a page of padding, and a figure in GB


def allocated_bytes(samples: Sequence[Sample], hq: Mapping[str, Any] | None) -> int:
    """KV bytes taken from the machine: SGLang's own figure, or both tiers and the buffers that reading packed pages needs."""
    if hq is None:
        return int(gauge(samples, "sglang:kv_cache_memory_usage_gb") * 2**30)
    return hq["dense"]["bytes_allocated"] + hq["packed"]["bytes_allocated"] + hq["workspace_bytes"]


def check_pool(name: str, samples: Sequence[Sample], hq: Mapping[str, Any] | None, slots: int, budget: int, kv_dtype: str) -> int:
    """`allocated_bytes` of the server of arm `name`, after checking that it is the budget. Raises BenchError otherwise.

    slots: KV tokens that a server without our plugin must have; ours splits the budget as it likes. budget: bytes.
    """
    held = allocated_bytes(samples, hq)
    if hq is not None:
        if held > budget * (1 + POOL_TOLERANCE):
            raise BenchError(f"the server of arm {name} holds {held:,} bytes for KV, the budget is {budget:,}")
        return held
    found = int(gauge(samples, "sglang:max_total_num_tokens"))
    if abs(found - slots) > PAGE_TOKENS:
        raise BenchError(f"the server has {found:,} KV slots instead of {slots:,}: too little GPU memory is free")
    if abs(held / budget - 1) > POOL_TOLERANCE:
        raise BenchError(f"the server holds {held:.3g} bytes of KV, the budget is {budget:.3g}: is {kv_dtype} in force?")
    return held


def check_backend(name: str, server_info: Mapping[str, Any], backend: str) -> None:
    """Raises BenchError when the server of arm `name` attends with another backend than asked for."""
    if server_info.get("attention_backend") != backend:
        raise BenchError(f"the server of arm {name} has attention backend {server_info.get('attention_backend')}")
