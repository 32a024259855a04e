"""Our pool, CPU allocator and radix tree put together as SGLang's scheduler has them, small enough to look at every slot."""

from __future__ import annotations

import os
from array import array
from typing import NamedTuple
from unittest.mock import patch

import torch

from sgl_hq.config import HQConfig
from sgl_hq.page_format import PAGE_TOKENS as P

LAYERS, HEADS, DIM = 2, 1, 8
ROWS = 8  # requests at a time


class Parts(NamedTuple):
    pool: object  # HQTokenToKVPool
    allocator: object  # CPUPagedAllocator
    rows: object  # ReqToTokenPool
    tree: object  # PackingRadixCache

    def write(self, tokens: list[int]) -> torch.Tensor:
        """New dense pages with a K and V per token that only this call writes; [whole pages * 64] slots, as a prefill gives them."""
        slots = self.allocator.alloc(len(tokens) // P * P)
        for layer, (k, v) in enumerate(zip(self.pool.k_buffer, self.pool.v_buffer)):
            k[slots] = torch.rand(len(slots), HEADS, DIM).bfloat16() + layer
            v[slots] = torch.rand(len(slots), HEADS, DIM).bfloat16() - layer
        return slots

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """K and V [tokens, layers, 2, heads, head_dim] of token ids of either tier, in whole pages."""
        pages = []
        for page in ids.view(-1, P):
            if page[0] < self.pool.packed_base:
                kv = [torch.stack([k[page], v[page]], 1) for k, v in zip(self.pool.k_buffer, self.pool.v_buffer)]
            else:
                number = int(page[0] - self.pool.packed_base) // P
                kv = []
                for layer in range(len(self.pool.k_buffer)):
                    k, v = self.pool.packed.read(layer, torch.tensor([number]), number)  # views that the next read overwrites
                    kv.append(torch.stack([k.transpose(0, 1), v.transpose(0, 1)], 1))
            pages.append(torch.stack(kv, 1))
        return torch.cat(pages) if pages else torch.empty(0, len(self.pool.k_buffer), 2, HEADS, DIM, dtype=torch.bfloat16)


def build(
    fmt: str = "bf16", pack: str = "shared", pages: int = 24, packed_fraction: float = 0.5, layers: int = LAYERS, heads: int = HEADS,
    dim: int = DIM, requests: int = ROWS, **params,
) -> Parts:  # fmt: skip
    """pages: of the dense tier; requests: at a time; params: further fields of SGLang's CacheInitParams."""
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    from sgl_hq.cache.packing_radix_cache import PackingRadixCache
    from sgl_hq.platform_cpu.allocator import CPUPagedAllocator
    from sgl_hq.pool.two_tier_pool import HQTokenToKVPool

    with patch.dict(os.environ, HQConfig(fmt, pack, packed_fraction).to_env()):
        pool = HQTokenToKVPool(
            pages * P, page_size=P, dtype=torch.bfloat16, head_num=heads, head_dim=dim, layer_num=layers, device="cpu",
            enable_memory_saver=False,
        )  # fmt: skip
    allocator = CPUPagedAllocator(pages * P, page_size=P, dtype=torch.bfloat16, device="cpu", kvcache=pool, need_sort=False)
    rows = ReqToTokenPool(requests, pages * P, "cpu", False)
    given = {"disable": False, "req_to_token_pool": rows, "token_to_kv_pool_allocator": allocator, "page_size": P} | params
    return Parts(pool, allocator, rows, PackingRadixCache(CacheInitParams(**given), pool, pack))


def radix_key(tokens: list[int], extra_key: str | None = None):
    from sglang.srt.mem_cache.radix_cache import RadixKey

    return RadixKey(array("q", tokens), extra_key)
