"""How the bytes of elastic tiers are cut: a slab is one chunk of K and one of V in every layer. Integers only.

A slab of the dense tier is `pages` whole pages; lent to the packed tier, its chunks lengthen every layer's run of records. One slab more
belongs to the packed tier for good: for it, live packed pages pin no more dense pages than their own bytes (`Slabs.pinned_pages`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sgl_hq.page_format import PAGE_TOKENS, PageLayout
from sgl_hq.pool.sizing import KVShape, TierSizes, sink_slot_bytes, sinks_for

# Start-up creates 2 x layers chunks a slab, and moving one takes some milliseconds on a GPU whatever its size: no finer than this.
MOST_SLABS = 64
FEWEST_SLABS = 4  # a budget of fewer would move in steps too large to follow anything


@dataclass(frozen=True)
class Slabs:
    """slabs: of the dense tier when none is lent, the one with SGLang's padding page, which is never lent, included. pages: dense pages
    of a slab. chunk_bytes: of its K, or V, in one layer. record_bytes: of a packed page in the layer where it is largest."""

    layers: int
    slabs: int
    pages: int
    chunk_bytes: int
    record_bytes: int

    @property
    def dense_tokens(self) -> int:
        """Handed to SGLang: the largest size of the dense tier, without the padding page."""
        return (self.slabs * self.pages - 1) * PAGE_TOKENS

    @property
    def slab_bytes(self) -> int:
        return 2 * self.layers * self.chunk_bytes

    def packed_pages(self, lent: int) -> int:
        """Capacity of the packed tier with `lent` slabs."""
        return (1 + lent) * 2 * self.chunk_bytes // self.record_bytes

    def fewest_lent(self, packed_pages: int) -> int:
        """Slabs without which so many packed pages have no room."""
        return max(0, -(-packed_pages * self.record_bytes // (2 * self.chunk_bytes)) - 1)

    def pinned_pages(self, packed_pages: int) -> int:
        """Dense pages with the bytes of so many packed pages, rounded up: never fewer than the pages of `fewest_lent` slabs."""
        return -(-packed_pages * self.record_bytes * self.pages // (2 * self.chunk_bytes))

    def sizes(self, layouts: Sequence[PageLayout]) -> TierSizes:
        """Both tiers at their largest, which they cannot be at once; sink slots are for the largest packed tier."""
        packed = self.packed_pages(self.slabs - 1)
        return TierSizes(self.dense_tokens, packed, sinks_for(packed, layouts))


def slabs_of_dense(dense_tokens: int, layouts: Sequence[PageLayout], shape: KVShape, granularity: int) -> Slabs:
    """The slabs of a dense tier that `slabs_of_budget` has sized. granularity: bytes of which a chunk must be a multiple."""
    return _cut(dense_tokens // PAGE_TOKENS + 1, layouts, shape, granularity)


def slabs_of_budget(budget_bytes: int, layouts: Sequence[PageLayout], shape: KVShape, granularity: int) -> Slabs:
    """The most slabs that fit into `budget_bytes` with the packed tier's own one and all sink slots. Raises ValueError for too few."""
    page_bytes, sink = PAGE_TOKENS * shape.dense_bytes_per_token, sink_slot_bytes(layouts, shape)
    cut = _cut(max(0, budget_bytes) // page_bytes, layouts, shape, granularity)
    while cut.slabs >= FEWEST_SLABS:
        cut = _cut(cut.slabs * cut.pages, layouts, shape, granularity)  # whole slabs; of half the pages, if those are few enough
        if (cut.slabs + 1) * cut.slab_bytes + cut.sizes(layouts).sinks * sink <= budget_bytes:
            return cut
        cut = _cut((cut.slabs - 1) * cut.pages, layouts, shape, granularity)
    least = (FEWEST_SLABS + 1) * _page_unit(shape, granularity) * page_bytes
    raise ValueError(
        f"a KV budget of {budget_bytes / 2**20:.1f} MiB cannot be moved between the tiers: that takes {FEWEST_SLABS} parts, at least "
        f"{least / 2**20:.1f} MiB and sink slots: raise --max-total-tokens or --mem-fraction-static, or split it with --hq-packed-fraction 0.5"
    )


def _cut(pages: int, layouts: Sequence[PageLayout], shape: KVShape, granularity: int) -> Slabs:
    """`pages` dense pages, the padding page included, in whole slabs, at most MOST_SLABS. Slabs grow by doubling, so that whole slabs are
    whole in smaller ones too."""
    unit = _page_unit(shape, granularity)
    slab = unit << max(0, -(-pages // (unit * MOST_SLABS)) - 1).bit_length()
    record = max(layout.record_bytes for layout in layouts) * shape.kv_heads
    return Slabs(shape.layers, pages // slab, slab, slab * _side_bytes(shape), record)


def _page_unit(shape: KVShape, granularity: int) -> int:
    """Fewest pages whose K of one layer is a multiple of `granularity`."""
    return math.lcm(_side_bytes(shape), granularity) // _side_bytes(shape)


def _side_bytes(shape: KVShape) -> int:
    """K, or V, of a dense page of one layer; they are of one size, so that a chunk of either can back both."""
    assert shape.head_dim == shape.v_head_dim, "compat.check_model refuses other models"
    return PAGE_TOKENS * shape.kv_heads * shape.head_dim * 2
