"""The boundary between the tiers follows the load: dense pages are lent to the packed tier in slabs, and come back when they are wanted.

For SGLang the dense tier always has its largest size (`max_total_num_tokens`). Pages of lent slabs are out of the allocator's free list;
they count as evictable as far as `evict` can have them back by dropping packed pages that nobody reads, as protected beyond that. Packed
pages that running requests read pin as many dense pages as they have bytes (`pool/slabs.py`), hence packing them, which frees more, never
takes from what SGLang was promised. Lending a slab may, by up to that slab, when its room is for pages that are read at once: batches are
made smaller then, and a request that is alone still ends, as `long_requests.py` has counted its packed pages as pinned from the start.

All decisions are functions of the books on the host: no clock, no order of a set. Where the split is fixed, nothing here does anything.
"""

from __future__ import annotations

import numpy as np
import torch
from sglang.srt.mem_cache.radix_cache import RadixCache

from sgl_hq.page_format import PAGE_TOKENS

# Lending leaves one dense page of so many free or cold. Running requests grow into them, so their growth does not call a slab back at once.
RESERVE_SHARE = 16


class SlabLending(RadixCache):
    """The part of PackingRadixCache that moves slabs. A slab is moved when its dense pages are free, which copying cold pages away may
    bring about, and when nothing is packed in the last one of the packed tier."""

    # ---- what SGLang is told ---------------------------------------------------------------------------------------

    def evictable_size(self) -> int:
        return self.evictable_size_ + self.lent_tokens - self._pinned_tokens

    def protected_size(self) -> int:
        return self.protected_size_ + self._pinned_tokens

    @property
    def elastic(self) -> bool:
        """Memory moves between the tiers."""
        return self._memory is not None

    @property
    def lent_tokens(self) -> int:
        """Dense tokens that are not there at present."""
        return len(self._memory.lent) * self._slab_tokens if self.elastic else 0

    def pinned_tokens(self, packed_pages: int) -> int:
        """Dense tokens whose memory so many packed pages hold, if no other is packed; 0 where packed pages have memory of their own."""
        return self._memory.slabs.pinned_pages(packed_pages) * PAGE_TOKENS if self.elastic else 0

    @property
    def _pinned_tokens(self) -> int:
        """Lent ones that cannot be had back."""
        return min(self.lent_tokens, self.pinned_tokens(self.packed_live_pages))

    # ---- to the packed tier ----------------------------------------------------------------------------------------

    def _lend_for(self, pages: int) -> None:
        """Lend until the packed tier has `pages` free ones, or as many slabs as may be. What is being packed is settled before, as its dense
        pages come free and may be lent: that waits for the device, and so does lending."""
        if pages > self._packed.sizes.packed_pages:
            return
        allocator = self.token_to_kv_pool_allocator
        while self._packed.pages_free < pages:
            coming = len(self.pages_under_way) * PAGE_TOKENS
            if not self._may_lend(allocator.available_size() + self.evictable_size_ + coming):
                return
            if coming:
                self.settle()
            elif not self._lend():
                return

    def _spare_tokens(self, wanted: int) -> int:
        """Dense tokens to evict before the `wanted` ones, for a slab to lend. Packing them takes room, so a slab is lent while there is
        some left, and for the `wanted` ones there is more then."""
        if not self.elastic or self._packed.pages_free - wanted // PAGE_TOKENS >= self._memory.slabs.pages:
            return 0
        return self._slab_tokens if self._may_lend(self.evictable_size_ - wanted) else 0

    def _may_lend(self, unused: int) -> bool:
        """Another slab, out of `unused` dense tokens, free or cold."""
        if not self.elastic or len(self._memory.lent) + 1 >= self._memory.slabs.slabs or self.live.ended < self._no_slab_before:
            return False
        return (unused - self._slab_tokens) * RESERVE_SHARE >= self.token_to_kv_pool_allocator.size

    def _lend(self) -> bool:
        """Lend a slab, if one is or can be made empty. Waits for the device. If there is none, the search, a walk of the tree, is not
        repeated until as many requests have ended as hold pages now."""
        allocator, per_slab = self.token_to_kv_pool_allocator, self._memory.slabs.pages
        if allocator.available_size() < self._slab_tokens:
            return False
        allocator.merge_and_sort_free()
        free = np.sort(allocator.free_pages.cpu().numpy())
        whole = np.flatnonzero(np.bincount(free // per_slab, minlength=self._memory.slabs.slabs) == per_slab)
        if whole.size:
            slab = int(whole[-1])
        else:
            slab, free = self._emptied_slab(free)
            if slab is None:
                self._no_slab_before = self.live.ended + len(self.live)
                return False
        self._pool.lend(slab)
        self._set_free_pages(free[free // per_slab != slab])
        self.counters.slabs_lent += 1
        self._tell_tier_changed()
        return True

    def _emptied_slab(self, free: np.ndarray) -> tuple[int | None, np.ndarray]:
        """Copy what is cached and cold in one slab to free pages of others; of those slabs where nothing else is, one with the least to
        copy. Returns it, None if there is none, and the free pages. free: free pages in order, as many as a slab has at least."""
        per_slab = self._memory.slabs.pages
        nodes = [n for n in self.dense_nodes() if not n.lock_ref]
        if not nodes:
            return None, free
        pages = torch.cat([n.value[:: self.page_size] for n in nodes]).cpu().numpy() // PAGE_TOKENS
        free_in, cold_in = (np.bincount(ids // per_slab, minlength=self._memory.slabs.slabs) for ids in (free, pages))
        candidates = np.flatnonzero(free_in + cold_in == per_slab)
        if not candidates.size:
            return None, free
        slab = int(candidates[np.argmin(cold_in[candidates])])
        inside = pages // per_slab == slab
        sources, targets = pages[inside], free[free // per_slab != slab][: inside.sum()]
        self._pool.move_dense_pages(sources.tolist(), targets.tolist())
        pages[inside] = targets
        ends = np.cumsum([len(n.key) // self.page_size for n in nodes])
        for node, own, moved in zip(nodes, np.split(pages, ends[:-1]), np.split(inside, ends[:-1]), strict=True):
            if moved.any():
                node.value = self._token_ids(own)
        return slab, np.sort(np.concatenate([np.setdiff1d(free, targets), sources]))

    # ---- and back ----------------------------------------------------------------------------------------------------

    def _reclaim(self) -> int:
        """The packed tier's last slab becomes dense pages: what is worth least is dropped until the rest has room without it, and what
        stands in it is moved. Returns the dense tokens, 0 if running requests read too much. All dense nodes must be locked."""
        if not self.elastic or len(self._memory.lent) <= self._memory.slabs.fewest_lent(self.packed_live_pages):
            return 0
        left = self._memory.slabs.packed_pages(len(self._memory.lent) - 1)
        while self._packed.pages_used > left:
            self._drop(self._packed_order.pop())
        self._move_below(left)
        self._give_back()
        self.counters.slabs_reclaimed += 1
        self._tell_tier_changed()
        return self._slab_tokens

    def _move_below(self, capacity: int) -> None:
        """Packed pages from `capacity` on go to free ones below. Requests that read them look them up anew (`epoch`)."""
        sources, targets = self._packed.moves_below(capacity)
        if not sources:
            return
        self._pool.move_packed_pages(sources, targets)
        if self.checksums is not None:
            self.checksums.moved(sources, targets)
        now = dict(zip(sources, targets, strict=True))
        for node, pages in self.packed_nodes():
            if max(pages) >= capacity:
                self._hold_pages(node, [now.get(page, page) for page in pages])
        self.epoch += 1

    def _give_back(self) -> None:
        """The lowest lent slab, so that the high ones are lent and the dense pages in use lie together."""
        slab, per_slab = self._memory.lent[0], self._memory.slabs.pages
        self._pool.give_back(slab)
        free = self.token_to_kv_pool_allocator.free_pages.cpu().numpy()
        self._set_free_pages(np.sort(np.concatenate([free, np.arange(slab * per_slab, (slab + 1) * per_slab)])))

    def _give_all_back(self) -> None:
        """Nothing is packed or cached."""
        self._no_slab_before = 0  # requests that must have ended before a slab is searched for again
        while self.elastic and self._memory.lent:
            self._give_back()

    # ---- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _memory(self):
        """ElasticMemory, or None where the split is fixed."""
        return self._pool.memory

    @property
    def _slab_tokens(self) -> int:
        return self._memory.slabs.pages * PAGE_TOKENS

    def _set_free_pages(self, pages: np.ndarray) -> None:
        """pages: in ascending order, in which they are allocated: high slabs empty out."""
        self.token_to_kv_pool_allocator.free_pages = torch.from_numpy(pages.astype(np.int64)).to(self.device)

    def _token_ids(self, pages: np.ndarray) -> torch.Tensor:
        """[len(pages) * 64] int64: ids of the tokens of dense pages."""
        ids = pages[:, None].astype(np.int64) * PAGE_TOKENS + np.arange(PAGE_TOKENS)
        return torch.from_numpy(ids.flatten()).to(self.device)
