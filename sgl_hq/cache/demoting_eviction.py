"""What SGLang's eviction does here: cold dense nodes are packed, and only what is worth least in both tiers is lost."""

from __future__ import annotations

import time

from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult
from sglang.srt.mem_cache.radix_cache import TreeNode

from sgl_hq.cache.eviction_order import EvictionOrder
from sgl_hq.cache.packed_room import Room, find_room
from sgl_hq.cache.slab_lending import SlabLending


class DemotingEviction(SlabLending):
    """The part of PackingRadixCache that makes room, in either tier."""

    def _start_orders(self) -> None:
        """Nothing is cached yet."""
        self._dense_order = EvictionOrder(self.evictable_leaves, lambda n: n.id not in self._pages_of, self._eviction_key)
        self._packed_order = EvictionOrder(self.evictable_leaves, lambda n: n.id in self._pages_of, self._eviction_key)

    def _eviction_key(self, node: TreeNode) -> tuple:
        # The node id breaks ties, so that ranks whose clocks or sets differ evict in the same order.
        return self.eviction_strategy.get_priority(node), node.id

    def _update_leaf_status(self, node: TreeNode):
        super()._update_leaf_status(node)
        self._enter_order(node)

    def _enter_order(self, node: TreeNode) -> None:
        """Of its present tier, if it may be evicted."""
        if self._packed is not None and node in self.evictable_leaves:
            (self._packed_order if node.id in self._pages_of else self._dense_order).add(node)

    def evict(self, params: EvictParams) -> EvictResult:
        """Free at least `params.num_tokens` dense tokens if that many are evictable; packed nodes give none but by their slabs."""
        if self._packed is None or self.disable:
            return super().evict(params)
        start_time, freed = time.perf_counter(), self.settle()
        if freed < params.num_tokens and (spare := self._spare_tokens(params.num_tokens - freed)):
            gained = self._evict_dense(spare)
            freed += gained - (spare if gained >= spare and self._lend() else 0)
        freed += self._evict_dense(params.num_tokens - freed)
        while freed < params.num_tokens and (back := self._reclaim()):
            freed += back
        self.update_eviction_metrics(freed, start_time)
        return EvictResult(num_tokens_evicted=freed)

    def _evict_dense(self, wanted: int) -> int:
        """Pack or drop cold dense nodes until `wanted` dense tokens are free; returns how many are, fewer when no node is left."""
        freed = 0
        while freed < wanted and (leaf := self._dense_order.pop()):
            freed += self._demote(leaf, wanted - freed)
            if leaf.id in self._pages_of:
                continue
            if freed >= wanted:
                self._dense_order.add(leaf)
            else:
                freed += len(leaf.key)
                self._drop(leaf)
        return freed

    def _demote(self, leaf: TreeNode, wanted: int) -> int:
        """Pack the dense part of the path to `leaf`, from the top, until `wanted` dense tokens are free; returns how many are.

        Packed leaves that were to be evicted before `leaf` give way. A node that does not fit is split, so that the pages
        nearest to the root, which most requests can use, stay. Ancestors that running requests hold are packed too: no
        page of the tree is written again, except by a forward that is under way, and packing runs behind that.
        """
        freed, key, start_time = 0, self._eviction_key(leaf), time.perf_counter()
        for node in [n for n in self._path(leaf) if n.id not in self._pages_of]:
            if freed >= wanted or node.id in self._unpackable:
                break
            room, pages = self._room_for(node, key), len(node.key) // self.page_size
            if room.pages:
                self._begin(room, self._first_pages(node, room.pages))
                if not (packed := self.settle()):
                    break
                freed += packed
            if room.pages < pages:
                self.refusals.no_room(pages - room.pages, 1, self._packed, self.packed_live_pages)
                break
        if freed:
            self.counters.demoted(freed // self.page_size, time.perf_counter() - start_time)
        return freed

    def _room_for(self, node: TreeNode, key: tuple) -> Room:
        """Room in the packed tier for `node`, to which packed nodes give way whose eviction key is before `key`."""
        pages, needs_sink = len(node.key) // self.page_size, node.parent is self.root_node
        return find_room(self._packed, self._packed_order, self._pages_of, self._eviction_key, pages, needs_sink, key)

    def _first_pages(self, node: TreeNode, pages: int) -> TreeNode:
        """`node`, or of a longer one a new node of its first pages, no younger than it."""
        if pages * self.page_size == len(node.key):
            return node
        top = self._split_node(node.key, node, pages * self.page_size)
        # SGLang splits on a use, and so makes the new node the youngest of all.
        top.last_access_time, top.creation_time = node.last_access_time, node.creation_time
        return top

    def _drop(self, leaf: TreeNode) -> None:
        """Remove an unlocked leaf from the tree and free its pages in whichever tier they are."""
        pages, start_time = self._pages_of.get(leaf.id), time.perf_counter()
        if pages is None:
            self.token_to_kv_pool_allocator.free_segment(leaf.value, start_pos=0)
        else:
            if self.checksums is not None:
                self.checksums.check(pages)
            self._packed.free(pages)
            self.epoch += 1
            self._tell_tier_changed()
        self._delete_leaf(leaf)
        self._record_remove_event(leaf)
        self.counters.dropped(len(leaf.key) // self.page_size, pages is not None, time.perf_counter() - start_time)
