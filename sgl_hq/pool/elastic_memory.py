"""The memory of both tiers, where slabs of it go from one to the other.

K and V of a layer have addresses for all slabs of the dense tier, each layer's records for as many as the packed tier can have; what is
backed of the records is always their beginning. Which slab is lent is decided in `cache/slab_lending.py`, what it holds is moved before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_hq.page_format import PAGE_TOKENS, PageLayout
from sgl_hq.pool.chunks import ChunkRange, ChunkStore, make_chunks
from sgl_hq.pool.sizing import KVShape
from sgl_hq.pool.slabs import Slabs


class ElasticMemory:
    """k_buffers, v_buffers: per layer [all dense slots, kv_heads, head_dim] bf16, which kernels and graphs may hold for good.
    records: per layer [largest number of packed pages, kv_heads, record_bytes] uint8; where all layers have one layout, views of `arena`
    [layers, pages, kv_heads, record_bytes]. lent: slabs whose dense pages do not exist at present, in ascending order.
    """

    def __init__(self, slabs: Slabs, layouts: Sequence[PageLayout], shape: KVShape, device: str):
        self.slabs, self.lent = slabs, []
        self._store: ChunkStore = make_chunks(device, slabs.chunk_bytes)
        self._layer_chunks = 2 * slabs.slabs  # of records, at most: the packed tier's own slab, and all but the first of the dense tier
        # Rows of `req_to_token` name pages of old behind what a request holds, and kernels may read ahead and mask.
        self._sides = [self._store.reserve(slabs.slabs, shared_holes=True) for _ in range(2 * slabs.layers)]
        self._arena = self._store.reserve(slabs.layers * self._layer_chunks)
        for side in self._sides:
            self._store.create(side, 0, slabs.slabs)
        for layer in range(slabs.layers):
            self._store.create(self._arena, layer * self._layer_chunks, 2)
        buffers = [self._dense(side, shape) for side in self._sides]
        self.k_buffers, self.v_buffers = buffers[: slabs.layers], buffers[slabs.layers :]
        self.records = self._records(layouts, shape)
        one_layout = len(set(layouts)) == 1
        self.arena = self._stacked(self.records) if one_layout else None

    @property
    def dense_bytes(self) -> int:
        """Backed, SGLang's padding page included."""
        return sum(side.mapped for side in self._sides) * self.slabs.chunk_bytes

    @property
    def packed_bytes(self) -> int:
        """Of records, backed."""
        return self._arena.mapped * self.slabs.chunk_bytes

    @property
    def bytes_created(self) -> int:
        """Never changes: `dense_bytes` + `packed_bytes`."""
        return self._store.bytes_created

    def lend(self, slab: int) -> None:
        """The dense pages of `slab` cease to be, and the records of every layer grow. No kernel under way may use them."""
        assert 0 < slab < self.slabs.slabs and slab not in self.lent, f"slab {slab} cannot be lent, {self.lent} are"
        for layer, (k, v) in enumerate(self._layers()):
            end = self._end(layer)
            self._store.move(k, slab, self._arena, end, 1)
            self._store.move(v, slab, self._arena, end + 1, 1)
        self.lent = sorted([*self.lent, slab])

    def give_back(self, slab: int) -> None:
        """The last chunks of the records become dense pages again, those of `slab`, zeros: what follows a request's last token in its page
        is read and masked, and as records it may be NaN. No kernel under way may use the chunks."""
        assert slab in self.lent, f"slab {slab} is given back, but {self.lent} are lent"
        for layer, (k, v) in enumerate(self._layers()):
            end = self._end(layer)
            self._store.move(self._arena, end - 2, k, slab, 1)
            self._store.move(self._arena, end - 1, v, slab, 1)
        self.lent.remove(slab)
        slots = self.slabs.pages * PAGE_TOKENS
        for buffer in (*self.k_buffers, *self.v_buffers):
            buffer[slab * slots : (slab + 1) * slots] = 0

    def _layers(self) -> list[tuple[ChunkRange, ChunkRange]]:
        return list(zip(self._sides[: self.slabs.layers], self._sides[self.slabs.layers :]))

    def _end(self, layer: int) -> int:
        """First chunk of the layer's records that is not backed."""
        return layer * self._layer_chunks + 2 * (1 + len(self.lent))

    def _dense(self, side: ChunkRange, shape: KVShape) -> torch.Tensor:
        slots = self.slabs.slabs * self.slabs.pages * PAGE_TOKENS
        return self._store.bytes_of(side).view(torch.bfloat16).view(slots, shape.kv_heads, shape.head_dim)

    def _records(self, layouts: Sequence[PageLayout], shape: KVShape) -> list[torch.Tensor]:
        pages = self.slabs.packed_pages(self.slabs.slabs - 1)
        layers = self._store.bytes_of(self._arena).view(self.slabs.layers, -1)
        sizes = [shape.kv_heads * layout.record_bytes for layout in layouts]
        return [layer[: pages * size].view(pages, shape.kv_heads, -1) for layer, size in zip(layers, sizes, strict=True)]

    def _stacked(self, records: list[torch.Tensor]) -> torch.Tensor:
        """All layers as one tensor; a layer is longer than its records, by what is left of its last chunk."""
        strides = (self._layer_chunks * self.slabs.chunk_bytes, *records[0].stride())
        return records[0].as_strided((self.slabs.layers, *records[0].shape), strides)
