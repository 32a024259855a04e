"""SGLang's radix cache whose nodes may live in the packed tier.

Packed tokens are invisible to the scheduler: only dense nodes count as evictable or protected, so SGLang's own
invariant `available + evictable + protected + uncached == max_total_num_tokens` keeps holding for the dense tier
with the stock allocator (design.md section 0.1; `invariant_checker.py` `_check_full_pool`).

Packing is prefix-closed: a node is packed only below packed nodes, hence every request reads a packed leading run
followed by a dense rest. Nothing here depends on clocks or set order, so tensor-parallel ranks decide alike.
"""

from __future__ import annotations

import heapq
import sys
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    InsertParams,
    InsertResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, TreeNode

from sgl_hq.cache import books, pack_policy
from sgl_hq.cache.live_requests import LiveRequests
from sgl_hq.cache.pack_counters import PackCounters
from sgl_hq.cache.refusals import RefusalLog
from sgl_hq.kernels.page_codec import UnpackablePageError
from sgl_hq.pool.two_tier_pool import HQTokenToKVPool
from sgl_hq.records import EMPTY_RUN, PackedRun, Segment

if TYPE_CHECKING:
    from sgl_hq.audit.checksums import PageChecksums


class PackingRadixCache(RadixCache):
    """RadixCache (`mem_cache/radix_cache.py`) plus `pack`. With `pool.packed` None (mode `exact`) it is the stock tree."""

    def __init__(self, params: CacheInitParams, pool: HQTokenToKVPool, pack_when: str):
        self._pool, self._packed, self._pack_when = pool, pool.packed, pack_when
        self.counters = PackCounters()
        self.refusals = RefusalLog(self.counters)
        self.tier_changed: Callable[[], None] | None = None  # told when pages come to or leave the packed tier
        self.checksums: PageChecksums | None = None  # of packed pages, while an audit runs
        self.epoch = 0
        self.live = LiveRequests(self.packed_run, lambda: self.epoch)
        super().__init__(params)

    def reset(self):
        if self.checksums is not None:
            self.checksums.check([page for pages in self._pages_of.values() for page in pages])
        super().reset()
        self._pages_of: dict[int, array] = {}  # node id -> packed page ids, int32; absent = dense
        self._users_of: dict[int, tuple[str, ...]] = {}
        self._unpackable: set[int] = set()  # node ids whose values the format cannot hold
        self._inserted: TreeNode | None = None
        self.packed_live_pages = 0  # of nodes that running requests lock
        self.live.clear()
        self.epoch += 1
        if self._packed is not None:
            self._packed.clear()
            self._tell_tier_changed()

    # ---- a request uses a path ---------------------------------------------------------------------------------

    def on_rows_allocated(self, requests) -> None:
        """Called when requests got their rows, before their forward: the pages they share may be packed now."""
        for request in requests:
            self.live.register(request)
            self._use(request.last_node, request.rid)

    def insert(self, params: InsertParams) -> InsertResult:
        result = super().insert(params)
        self._inserted = result.last_device_node
        return result

    def cache_unfinished_req(self, req, chunked=False):
        super().cache_unfinished_req(req, chunked=chunked)
        self._use(req.last_node, req.rid)

    def cache_finished_req(self, req, is_insert: bool = True, *, kv_len_to_handle: int):
        self._inserted = None
        super().cache_finished_req(req, is_insert=is_insert, kv_len_to_handle=kv_len_to_handle)
        if self._inserted is not None:
            self._use(self._inserted, req.rid)

    def _use(self, node: TreeNode, request_id: str) -> None:
        """Note `request_id` on the path to `node` and pack, from the root down, what the policy wants packed."""
        if self._packed is None:
            return
        path = self._path(node)
        for n in path:
            self._users_of[n.id] = pack_policy.add_user(self._users_of.get(n.id, ()), request_id)
        for n in path:
            if n.id in self._pages_of:
                continue
            if not (pack_policy.wants_pack(self._pack_when, self._users_of[n.id]) and self.pack(n)):
                break

    # ---- packing -------------------------------------------------------------------------------------------------

    def pack(self, node: TreeNode) -> bool:
        """Move a dense node into the packed tier, once and whole; its dense pages are freed at once.

        The parent must be packed or the root. Locked (running) nodes may be packed: running requests look their
        pages up through `live`. Returns False when the tier has no room or the values cannot be packed.
        """
        assert node.id not in self._pages_of and (node.parent is self.root_node or node.parent.id in self._pages_of)
        if node.id in self._unpackable:
            return False
        starts_sequence, start_time = node.parent is self.root_node, time.perf_counter()
        if not self._make_room(len(node.key) // self.page_size, starts_sequence):
            self.refusals.no_room(len(node.key) // self.page_size, self._packed, self.packed_live_pages)
            return False
        dense_slots = node.value
        try:
            pages = self._pool.pack_pages(dense_slots, starts_sequence)
        except UnpackablePageError as reason:
            self._unpackable.add(node.id)
            self.refusals.unpackable(len(node.key) // self.page_size, reason)
            return False
        if self.checksums is not None:
            self.checksums.take(pages)
        if node.lock_ref:
            self.packed_live_pages += len(pages)
            self.protected_size_ -= len(node.key)
        else:
            self.evictable_size_ -= len(node.key)
        self._pages_of[node.id] = array("i", pages)
        node.value = self._pool.packed_token_ids(pages)
        self.token_to_kv_pool_allocator.free_segment(dense_slots, start_pos=0)
        self.epoch += 1
        self.counters.packed(len(pages), time.perf_counter() - start_time)
        self._tell_tier_changed()
        return True

    def packed_run(self, node: TreeNode) -> PackedRun:
        """The packed leading run of the path that ends in `node`."""
        if self._packed is None:
            return EMPTY_RUN
        segments, tokens = [], 0
        for n in self._path(node):
            pages = self._pages_of.get(n.id)
            if pages is None:
                break
            segments.append(Segment(n.id, tuple(pages)))
            tokens += len(n.key)
        return PackedRun(tuple(segments), tokens)

    def _make_room(self, pages: int, needs_sink: bool) -> bool:
        """Drop least recently used packed leaves until `pages` fit. Their bytes are nowhere else: this is a real loss."""
        if pages > self._packed.sizes.packed_pages:
            return False
        while not self._packed.has_room(pages, needs_sink):
            leaves = [n for n in self.evictable_leaves if n.id in self._pages_of]
            if not leaves:
                return False
            self._drop(min(leaves, key=self._eviction_key))
        return True

    # ---- eviction ------------------------------------------------------------------------------------------------

    def evict(self, params: EvictParams) -> EvictResult:
        """Free at least `params.num_tokens` dense tokens if that many are evictable; packed nodes give none."""
        if self._packed is None or self.disable:
            return super().evict(params)
        start_time = time.perf_counter()
        heap = [(self._eviction_key(n), n) for n in self.evictable_leaves if n.id not in self._pages_of]
        heapq.heapify(heap)
        freed = 0
        while freed < params.num_tokens and heap:
            _, leaf = heapq.heappop(heap)
            parent, tokens = leaf.parent, self._demote(leaf)
            if not tokens:
                tokens = len(leaf.key)
                self._drop(leaf)
                if parent in self.evictable_leaves and parent.id not in self._pages_of:
                    heapq.heappush(heap, (self._eviction_key(parent), parent))
            freed += tokens
        self.update_eviction_metrics(freed, start_time)
        return EvictResult(num_tokens_evicted=freed)

    def _demote(self, leaf: TreeNode) -> int:
        """Pack `leaf` and its dense ancestors instead of dropping it; returns the dense tokens freed, 0 if impossible."""
        if not pack_policy.demotes(self._pack_when):
            return 0
        chain = [n for n in self._path(leaf) if n.id not in self._pages_of]
        pages = sum(len(n.key) for n in chain) // self.page_size
        if any(n.lock_ref or n.id in self._unpackable for n in chain):
            return 0
        start_time = time.perf_counter()
        if not self._make_room(pages, chain[0].parent is self.root_node):
            self.refusals.no_room(pages, self._packed, self.packed_live_pages)
            return 0
        freed = 0
        for n in chain:
            if not self.pack(n):
                break
            freed += len(n.key)
        if freed:
            self.counters.demoted(freed // self.page_size, time.perf_counter() - start_time)
        return freed

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

    def _eviction_key(self, node: TreeNode):
        # The node id breaks ties, so that ranks whose clocks or sets differ evict in the same order.
        return self.eviction_strategy.get_priority(node), node.id

    # ---- SGLang's bookkeeping, counting dense tokens only ----------------------------------------------------------

    def _dense_tokens(self, node: TreeNode) -> int:
        return 0 if node.id in self._pages_of else len(node.key)

    def inc_lock_ref(self, node: TreeNode) -> IncLockRefResult:
        if self._packed is None or self.disable:
            return super().inc_lock_ref(node)
        delta = 0
        for n in self._path(node):
            if n.lock_ref == 0:
                delta -= self._dense_tokens(n)
                self.packed_live_pages += len(self._pages_of.get(n.id, ()))
            n.lock_ref += 1
            self._update_leaf_status(n)
        self.evictable_size_ += delta
        self.protected_size_ -= delta
        return IncLockRefResult(delta=delta)

    def dec_lock_ref(self, node: TreeNode, params=None) -> DecLockRefResult:
        if self._packed is None or self.disable:
            return super().dec_lock_ref(node, params)
        delta = 0
        for n in reversed(self._path(node)):  # child first: a parent becomes a leaf candidate after its children
            if n.lock_ref == 1:
                delta += self._dense_tokens(n)
                self.packed_live_pages -= len(self._pages_of.get(n.id, ()))
            n.lock_ref -= 1
            self._update_leaf_status(n)
        self.evictable_size_ += delta
        self.protected_size_ -= delta
        return DecLockRefResult(delta=delta)

    def _split_node(self, key, child: TreeNode, split_len: int) -> TreeNode:
        upper = super()._split_node(key, child, split_len)
        if child.id in self._users_of:
            self._users_of[upper.id] = self._users_of[child.id]
        if child.id in self._unpackable:
            self._unpackable.add(upper.id)
        pages = self._pages_of.get(child.id)
        if pages is not None:
            at = split_len // self.page_size
            self._pages_of[upper.id], self._pages_of[child.id] = pages[:at], pages[at:]
            self.epoch += 1
        return upper

    def _delete_leaf(self, node: TreeNode):
        super()._delete_leaf(node)  # subtracts len(key) from the evictable size, also for packed nodes
        self.evictable_size_ += len(node.key) - self._dense_tokens(node)
        for table in (self._pages_of, self._users_of):
            table.pop(node.id, None)
        self._unpackable.discard(node.id)

    def _path(self, node: TreeNode) -> list[TreeNode]:
        """Nodes from below the root down to `node`."""
        path = []
        while node is not self.root_node:
            path.append(node)
            node = node.parent
        return path[::-1]

    # ---- books -----------------------------------------------------------------------------------------------------

    def check_books(self) -> None:
        """`books.differences` as AssertionError. The dense pool is checked by SGLang itself, and by the audit."""
        found = books.differences(self)
        assert not found, "; ".join(found)

    @property
    def packed_tier(self):
        """PackedTier, or None in mode `exact`."""
        return self._packed

    def packed_nodes(self) -> list[tuple[TreeNode, array]]:
        """Packed nodes of the tree, with their pages, from the root down."""
        return [(n, self._pages_of[n.id]) for n in self.nodes() if n.id in self._pages_of]

    def dense_nodes(self) -> list[TreeNode]:
        return [n for n in self.nodes() if n.id not in self._pages_of]

    def nodes(self) -> list[TreeNode]:
        """All nodes below the root, parents first."""
        found = list(self.root_node.children.values())
        for n in found:  # grows while it is read
            found.extend(n.children.values())
        return found

    def _tell_tier_changed(self) -> None:
        if self.tier_changed is not None:
            self.tier_changed()

    @property
    def metadata_bytes(self) -> int:
        """Host bytes of our tables: pages and users per node, and the registry of live requests."""
        pages = sys.getsizeof(self._pages_of) + sum(map(sys.getsizeof, self._pages_of.values()))
        users = sys.getsizeof(self._users_of) + sum(sys.getsizeof(u) + sum(map(sys.getsizeof, u)) for u in self._users_of.values())
        return pages + users + self.live.metadata_bytes
