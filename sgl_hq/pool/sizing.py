"""How one KV byte budget is split into the dense and the packed tier. Integers only.

The packed tier is a pure function of the dense one, so that the pool, whose constructor SGLang calls with the
dense size alone (kv_cache_configurator.py `_build_oot_mha_kv_pool`), derives the same figures as the sizing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgl_hq.page_format import PAGE_TOKENS, PageLayout

# One sink slot (the bf16 K and V of the first tokens of a sequence) per this many packed pages: prefixes shorter
# than 8 pages (512 tokens) on average run out of sinks before pages, and then stay dense.
PAGES_PER_SINK = 8


@dataclass(frozen=True)
class KVShape:
    """Shape of the KV cache on one rank: layers, kv heads, head_dim of K and of V; bf16 elements."""

    layers: int
    kv_heads: int
    head_dim: int
    v_head_dim: int

    @property
    def dense_bytes_per_token(self) -> int:
        return self.layers * self.kv_heads * (self.head_dim + self.v_head_dim) * 2


@dataclass(frozen=True)
class TierSizes:
    """dense_tokens: capacity handed to SGLang; packed_pages, sinks: slots of the packed tier. Of elastic tiers, the largest of each."""

    dense_tokens: int
    packed_pages: int
    sinks: int


def packed_page_bytes(layouts: Sequence[PageLayout], shape: KVShape) -> int:
    """Bytes of one packed page over all layers and kv heads. layouts: one per layer."""
    return sum(layout.record_bytes for layout in layouts) * shape.kv_heads


def sink_slot_bytes(layouts: Sequence[PageLayout], shape: KVShape) -> int:
    """Bytes of one sink slot over all layers and kv heads."""
    return sum(layout.sink_bytes for layout in layouts) * shape.kv_heads


def split_budget(
    budget_bytes: int, packed_fraction: float, layouts: Sequence[PageLayout], shape: KVShape, workspace_bytes: int = 0
) -> TierSizes:
    """Tiers that fit into `budget_bytes` beside `workspace_bytes`, `packed_fraction` of what is left packed.

    Raises ValueError when the budget does not hold one page in each tier.
    """
    page_bytes = PAGE_TOKENS * shape.dense_bytes_per_token
    dense_pages = max(0, int((budget_bytes - workspace_bytes) * (1.0 - packed_fraction))) // page_bytes
    sizes = tiers_of_dense(dense_pages * PAGE_TOKENS, packed_fraction, layouts, shape)
    if not dense_pages or not sizes.packed_pages:
        raise ValueError(
            f"a KV budget of {budget_bytes / 2**20:.1f} MiB with packed fraction {packed_fraction:g} does not hold one page "
            f"in each tier (a dense page takes {page_bytes} bytes, workspaces {workspace_bytes}): "
            "raise --max-total-tokens or --mem-fraction-static"
        )
    return sizes


def tiers_of_dense(dense_tokens: int, packed_fraction: float, layouts: Sequence[PageLayout], shape: KVShape) -> TierSizes:
    """The packed tier that goes with `dense_tokens`: same fraction of bytes, rounded down."""
    dense_bytes = dense_tokens * shape.dense_bytes_per_token
    packed_bytes = int(dense_bytes * packed_fraction / (1.0 - packed_fraction))
    page, sink = packed_page_bytes(layouts, shape), sink_slot_bytes(layouts, shape)
    pages = packed_bytes // page
    if not sink:
        return TierSizes(dense_tokens, pages, 0)
    # pages * page + ceil(pages / PAGES_PER_SINK) * sink <= packed_bytes
    pages = max(0, (packed_bytes - sink) * PAGES_PER_SINK // (page * PAGES_PER_SINK + sink))
    return TierSizes(dense_tokens, pages, sinks_for(pages, layouts))


def sinks_for(packed_pages: int, layouts: Sequence[PageLayout]) -> int:
    """Sink slots of a packed tier; none where the format keeps no sink tokens."""
    return -(-packed_pages // PAGES_PER_SINK) if layouts[0].sink_bytes else 0
