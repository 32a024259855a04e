"""The packed tier: arena of page records, sink slots, and the host's books over both.

Page ids are known on the host, because the grouped plan is built there (design.md section 2). A page is packed
once and never re-quantised; it leaves the tier only by `free`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sgl_hq.kernels.page_codec import PageCodec, UnpackablePageError
from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.pool.packing import Packing, ids_on, unpackable_on
from sgl_hq.pool.sizing import KVShape, TierSizes

if TYPE_CHECKING:
    from sgl_hq.pool.elastic_memory import ElasticMemory

NO_SINK = -1


class PackedTier:
    """`packed_pages` page records and `sinks` sink slots per layer.

    codecs: one per layer; they differ in the widths of their codes only. records[layer]: [pages, kv_heads, record_bytes]
    uint8; sink_slots[layer]: [sinks, kv_heads, sink_bytes] uint8. On a GPU all layers have one layout, and these are views
    of `arena` [layers, pages, kv_heads, record_bytes] and `sink_arena` [layers, sinks, kv_heads, sink_bytes].

    memory: of elastic tiers, whose records these then are: `sizes` has the largest number of pages, `pages_total` the present one.
    """

    def __init__(self, codecs: Sequence[PageCodec], shape: KVShape, sizes: TierSizes, device: str, memory: ElasticMemory | None = None):
        self.codecs, self.shape, self.sizes, self._memory = list(codecs), shape, sizes, memory
        self.sink_tokens = codecs[0].fmt.sink_tokens
        self.pages_total = sizes.packed_pages if memory is None else memory.slabs.packed_pages(len(memory.lent))

        def arena(*dims: int) -> torch.Tensor:
            return torch.zeros(dims, dtype=torch.uint8, device=device)

        self.on_gpu = torch.device(device).type == "cuda"
        if self.on_gpu:
            layout = codecs[0].layout
            self.arena = arena(len(codecs), sizes.packed_pages, shape.kv_heads, layout.record_bytes) if memory is None else memory.arena
            self.sink_arena = arena(len(codecs), sizes.sinks, shape.kv_heads, layout.sink_bytes)
            self.records, self.sink_slots = list(self.arena), list(self.sink_arena)
        else:
            if memory is None:
                self.records = [arena(sizes.packed_pages, shape.kv_heads, codec.layout.record_bytes) for codec in codecs]
            else:
                self.records = memory.records
            self.sink_slots = [arena(sizes.sinks, shape.kv_heads, codec.layout.sink_bytes) for codec in codecs]
        self._k_buffer = self._v_buffer = torch.empty(0, device=device)  # grown by the first read
        self.clear()

    def clear(self) -> None:
        """Forget every page (flush). The bytes stay; nobody can name them any more."""
        self._free_pages = array("i", range(self.pages_total - 1, -1, -1))
        self._free_sinks = array("i", range(self.sizes.sinks - 1, -1, -1))
        self._sink_of_page = array("i", [NO_SINK]) * self.sizes.packed_pages

    # ---- books -------------------------------------------------------------------------------------------------

    @property
    def elastic(self) -> bool:
        """Its capacity changes."""
        return self._memory is not None

    @property
    def pages_free(self) -> int:
        return len(self._free_pages)

    @property
    def sinks_free(self) -> int:
        return len(self._free_sinks)

    @property
    def pages_used(self) -> int:
        return self.pages_total - len(self._free_pages)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers and heads."""
        return sum(layer[:1].nbytes for layer in self.records)

    @property
    def sink_bytes(self) -> int:
        return sum(layer[:1].nbytes for layer in self.sink_slots)

    @property
    def bytes_allocated(self) -> int:
        records = sum(layer.nbytes for layer in self.records) if self._memory is None else self._memory.packed_bytes
        return records + sum(layer.nbytes for layer in self.sink_slots)

    @property
    def bytes_used(self) -> int:
        return self.pages_used * self.page_bytes + (self.sizes.sinks - self.sinks_free) * self.sink_bytes

    @property
    def metadata_bytes(self) -> int:
        """Host bytes of the free lists and the page-to-sink table."""
        return sum(a.buffer_info()[1] * a.itemsize for a in (self._free_pages, self._free_sinks, self._sink_of_page))

    def sink_slot(self, page: int) -> int:
        """The sink slot of a page that begins a sequence, NO_SINK of any other."""
        return self._sink_of_page[page]

    def has_room(self, pages: int, needs_sink: bool) -> bool:
        return pages <= self.pages_free and not (needs_sink and self.sink_tokens and not self.sinks_free)

    def check_books(self, owned: list[int]) -> None:
        """`differences` as AssertionError."""
        found = self.differences(owned)
        assert not found, "; ".join(found)

    def differences(self, owned: list[int]) -> list[str]:
        """`owned`: every page id that radix nodes hold. One sentence for each way in which free + owned is not all, each once."""
        found = _not_each_once("packed page", self.pages_total, {"free": self._free_pages, "in the tree": owned})
        sink_of_page = np.array(self._sink_of_page, np.int64)[: self.pages_total]
        holders = np.flatnonzero(sink_of_page != NO_SINK)
        found += _not_each_once("sink slot", self.sizes.sinks, {"free": self._free_sinks, "of a page": sink_of_page[holders]})
        if len(astray := np.setdiff1d(holders, owned)):
            found.append(f"packed pages that no node owns hold sink slots: {some_ids(astray)}")
        return found

    # ---- pages ---------------------------------------------------------------------------------------------------

    def write(
        self, k_layers: list[torch.Tensor], v_layers: list[torch.Tensor], dense_slots: torch.Tensor, starts_sequence: bool
    ) -> Packing:
        """Begin to pack whole pages out of the dense tier. The pages are in use from now on; after an error the caller frees them.

        k_layers, v_layers: per layer [dense slots, kv_heads, head_dim] bf16; dense_slots: [n_pages * 64] int64.
        starts_sequence: the first page holds the first tokens of a sequence, whose sinks stay bf16. Caller checks `has_room`.
        """
        n_pages = len(dense_slots) // PAGE_TOKENS
        needs_sink = starts_sequence and self.sink_tokens > 0
        assert self.has_room(n_pages, needs_sink), "packed tier is full: caller must check has_room first"
        pages = [self._free_pages.pop() for _ in range(n_pages)]
        if needs_sink:
            self._sink_of_page[pages[0]] = self._free_sinks.pop()
        try:
            pack = self._pack_on_gpu if self.on_gpu else self._pack_on_cpu
            return Packing(pages, pack(k_layers, v_layers, dense_slots, pages))
        except Exception:
            self.free(pages)
            raise

    def _pack_on_cpu(self, k_layers, v_layers, dense_slots, pages: list[int]) -> Callable[[], UnpackablePageError | None]:
        where = ids_on(dense_slots.device, pages)
        sink_slot = self._sink_of_page[pages[0]]
        for layer, (k, v) in enumerate(zip(k_layers, v_layers)):
            k_pages = k[dense_slots].unflatten(0, (len(pages), PAGE_TOKENS))
            v_pages = v[dense_slots].unflatten(0, (len(pages), PAGE_TOKENS))
            try:
                records, sink = self.codecs[layer].pack(k_pages, v_pages, first_has_sink=sink_slot != NO_SINK)
            except UnpackablePageError as reason:
                return lambda error=reason: error
            self.records[layer][where] = records
            if sink_slot != NO_SINK:
                self.sink_slots[layer][sink_slot] = sink
        return lambda: None

    def _pack_on_gpu(self, k_layers, v_layers, dense_slots, pages: list[int]) -> Callable[[], UnpackablePageError | None]:
        from sgl_hq.kernels.page_codec.launcher import pack_pages

        where = ids_on(dense_slots.device, pages)
        dense_pages = dense_slots[::PAGE_TOKENS] // PAGE_TOKENS
        sink_slot = self._sink_of_page[pages[0]]
        layout = self.codecs[0].layout
        status = pack_pages(layout, k_layers, v_layers, dense_pages, self.arena, where, self.sink_arena, sink_slot)
        return unpackable_on(status, dense_slots, layout.fmt.name)

    def warm_up(self, k_layers: list[torch.Tensor], v_layers: list[torch.Tensor]) -> None:
        """Compile the kernels of `write`, with a sink and without: the first request to be packed must not wait for that.

        Packs the first page of the dense tier, which is SGLang's padding, and forgets it.
        """
        for starts_sequence in (True, False):
            slots = torch.arange(PAGE_TOKENS, device=k_layers[0].device)
            packing = self.write(k_layers, v_layers, slots, starts_sequence)
            packing.error()
            self.free(packing.pages)

    def read(self, layer: int, pages: torch.Tensor, first_page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a run of pages of one layer, unpacked.

        pages: [n] int64 page ids on the arena's device; first_page: pages[0] as an int (its sink is looked up).
        Returns k [kv_heads, n * 64, head_dim], v [kv_heads, n * 64, v_head_dim]; of the codec's `out_dtype`. Both are
        views of a buffer that the next `read` overwrites: fresh memory for each of them cost more than the unpacking.
        """
        sink_slot = self._sink_of_page[first_page]
        sink = None if sink_slot == NO_SINK else self.sink_slots[layer][sink_slot]
        return self.codecs[layer].unpack(self.records[layer].index_select(0, pages), sink, out=self._buffers(len(pages)))

    def _buffers(self, n_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Contiguous K and V outputs of `read` for `n_pages`."""
        rows = self.shape.kv_heads * n_pages * PAGE_TOKENS
        sizes = (rows * self.shape.head_dim, rows * self.shape.v_head_dim)
        if self._k_buffer.numel() < sizes[0]:
            dtype, device = self.codecs[0].out_dtype, self.records[0].device
            self._k_buffer, self._v_buffer = (torch.empty(n, dtype=dtype, device=device) for n in sizes)
        k, v = self._k_buffer[: sizes[0]], self._v_buffer[: sizes[1]]
        heads = self.shape.kv_heads
        return k.view(heads, -1, self.shape.head_dim), v.view(heads, -1, self.shape.v_head_dim)

    # ---- a capacity that changes -----------------------------------------------------------------------------------

    def set_capacity(self, pages: int) -> None:
        """From now on there are the pages [0, `pages`), those of them free that were not there before. A page that ceases is free."""
        before = np.array(self._free_pages, np.intc)
        free = before[before < pages]
        assert len(before) - len(free) == max(0, self.pages_total - pages), "a page in use would cease to be"
        self._set_free(np.concatenate([free, np.arange(self.pages_total, pages, dtype=np.intc)]))
        self.pages_total = pages

    def moves_below(self, pages: int) -> tuple[list[int], list[int]]:
        """Pages in use from `pages` on, and as many free ones below it, the lowest, where they may `move`."""
        free = np.sort(np.array(self._free_pages, np.intc))
        sources = np.setdiff1d(np.arange(pages, self.pages_total), free)
        targets = free[free < pages][: len(sources)]
        assert len(targets) == len(sources), "what is in use does not fit below"
        return sources.tolist(), targets.tolist()

    def move(self, sources: list[int], targets: list[int]) -> None:
        """The records of `sources` to the free pages `targets`, which are in use then, and `sources` are free. Sinks stay in their slots."""
        here, there = (ids_on(self.records[0].device, pages) for pages in (sources, targets))
        for layer in self.records:
            layer[there] = layer[here]
        for source, target in zip(sources, targets, strict=True):
            self._sink_of_page[target], self._sink_of_page[source] = self._sink_of_page[source], NO_SINK
        self._set_free(np.concatenate([np.setdiff1d(np.array(self._free_pages, np.intc), targets), np.array(sources, np.intc)]))

    def _set_free(self, pages: np.ndarray) -> None:
        """`write` takes from the end: low pages first, so that the last slab empties out."""
        self._free_pages = array("i", np.sort(pages)[::-1].astype(np.intc).tobytes())

    def free(self, pages: list[int]) -> None:
        for page in pages:
            if self._sink_of_page[page] != NO_SINK:
                self._free_sinks.append(self._sink_of_page[page])
                self._sink_of_page[page] = NO_SINK
            self._free_pages.append(page)


def _not_each_once(what: str, total: int, lists: dict[str, Sequence[int]]) -> list[str]:
    """One sentence for each kind of difference between the ids [0, total) and the ids in `lists` together."""
    ids = {name: np.array(listed, np.int64) for name, listed in lists.items()}
    known = {name: (0 <= listed) & (listed < total) for name, listed in ids.items()}
    count = {name: np.bincount(listed[known[name]], minlength=total) for name, listed in ids.items()}
    found = []
    if len(lost := np.flatnonzero(sum(count.values()) == 0)):
        found.append(f"{what}s lost, neither {' nor '.join(lists)}: {some_ids(lost)}")
    for name, of_list in count.items():
        if len(twice := np.flatnonzero(of_list > 1)):
            found.append(f"{what}s twice {name}: {some_ids(twice)}")
    if len(both := np.flatnonzero(np.minimum.reduce(list(count.values())))):
        found.append(f"{what}s both {' and '.join(lists)}: {some_ids(both)}")
    if len(unknown := np.unique(np.concatenate([listed[~known[name]] for name, listed in ids.items()]))):
        found.append(f"{what}s that do not exist: {some_ids(unknown)}")
    return found


def some_ids(ids: np.ndarray) -> str:
    """The first ids, and how many there are."""
    return ", ".join(map(str, ids[:8].tolist())) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
