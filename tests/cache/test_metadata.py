"""Host memory of our tables for a pool of a million tokens, all of it packed in nodes of one page: the worst case."""

from __future__ import annotations

import uuid
from array import array

import torch

from sgl_hq.page_format import PAGE_TOKENS as P

MIB = 2**20
TOKENS = 1_000_000


def test_metadata_of_a_million_packed_tokens_stays_below_sixteen_mebibytes(monkeypatch):
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    from sgl_hq.cache.packing_radix_cache import PackingRadixCache
    from sgl_hq.platform_cpu.allocator import CPUPagedAllocator
    from sgl_hq.pool.two_tier_pool import HQTokenToKVPool

    pages = TOKENS // P
    monkeypatch.setenv("SGLANG_HQ_FORMAT", "bf16")
    monkeypatch.setenv("SGLANG_HQ_PACKED_FRACTION", "0.5")
    pool = HQTokenToKVPool(
        (pages + 16) * P, page_size=P, dtype=torch.bfloat16, head_num=1, head_dim=8, layer_num=1, device="cpu", enable_memory_saver=False
    )
    allocator = CPUPagedAllocator((pages + 16) * P, page_size=P, dtype=torch.bfloat16, device="cpu", kvcache=pool, need_sort=False)
    tree = PackingRadixCache(
        CacheInitParams(disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=allocator, page_size=P), pool, "insert"
    )
    for page in range(pages):
        key = RadixKey(array("q", [page] * P))
        node = tree.insert(InsertParams(key=key, value=allocator.alloc(P))).last_device_node
        tree._use(node, uuid.uuid4().hex)
        tree._use(node, uuid.uuid4().hex)
        tree.settle()
    assert pool.packed.pages_used == pages
    tree.check_books()
    assert MIB < tree.metadata_bytes + pool.packed.metadata_bytes < 16 * MIB
