"""SGLang's radix cache whose nodes may live in the packed tier.

Packed tokens are invisible to the scheduler: only dense nodes count as evictable or protected, so SGLang's own
invariant `available + evictable + protected + uncached == max_total_num_tokens` keeps holding for the dense tier
with the stock allocator (design.md section 0.1; `invariant_checker.py` `_check_full_pool`).

Packing is prefix-closed: a node is packed only below packed nodes, hence every request reads a packed leading run
followed by a dense rest. Nothing here depends on clocks or set order, so tensor-parallel ranks decide alike.

The policy says when a page is packed while there is room. When the dense tier is short, cold nodes are packed under every
policy, and a page is dropped only if it is the least valuable of both tiers and the packed tier is full.
"""

from __future__ import annotations

import heapq
import sys
import time
from array import array
from dataclasses import asdict, dataclass

import torch
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

from sgl_hq.cache import pack_policy
from sgl_hq.cache.live_requests import LiveRequests
from sgl_hq.cache.packed_room import PackedLeaves, Room
from sgl_hq.kernels.page_codec import UnpackablePageError
from sgl_hq.metrics import PackedTierGauges
from sgl_hq.pool.two_tier_pool import HQTokenToKVPool
from sgl_hq.records import EMPTY_RUN, PackedRun, Segment


@dataclass
class PackCounters:
    """Totals since start. `pages_demoted`, part of `pages_packed`: packed because the dense tier was short."""

    nodes_packed: int = 0
    pages_packed: int = 0
    pages_demoted: int = 0
    pages_dropped: int = 0
    dense_pages_dropped: int = 0
    refused_no_room: int = 0
    refused_unpackable: int = 0


class PackingRadixCache(RadixCache):
    """RadixCache (`mem_cache/radix_cache.py`) plus `pack`. With `pool.packed` None (mode `exact`) it is the stock tree."""

    def __init__(self, params: CacheInitParams, pool: HQTokenToKVPool, pack_when: str):
        self._pool, self._packed, self._pack_when = pool, pool.packed, pack_when
        self.counters = PackCounters()
        self.epoch = 0
        self.live = LiveRequests(self.packed_run, lambda: self.epoch)
        self._gauges = PackedTierGauges() if params.enable_metrics and pool.packed is not None else None
        super().__init__(params)

    def reset(self):
        super().reset()
        self._pages_of: dict[int, array] = {}  # node id -> packed page ids, int32; absent = dense
        self._users_of: dict[int, tuple[str, ...]] = {}
        self._unpackable: set[int] = set()  # node ids whose values the format cannot hold
        self._inserted: TreeNode | None = None
        self.live.clear()
        self.epoch += 1
        if self._packed is not None:
            self._packed.clear()
            self._show()

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
        room = self._room_for(node, self._eviction_key(node), self._packed_leaves())
        if room.pages * self.page_size < len(node.key):
            self.counters.refused_no_room += 1
            return False
        return self._pack_into(room, node)

    def _packed_leaves(self) -> PackedLeaves:
        return PackedLeaves(self._packed, self.evictable_leaves, self._pages_of, self._eviction_key)

    def _room_for(self, node: TreeNode, key: tuple, leaves: PackedLeaves) -> Room:
        """Room in the packed tier for `node`, to which nodes give way whose eviction key is before `key`."""
        return leaves.room(len(node.key) // self.page_size, node.parent is self.root_node, key)

    def _pack_into(self, room: Room, node: TreeNode) -> bool:
        """`room` holds all of `node`; its victims are lost."""
        for victim in room.victims:
            self._drop(victim)
        dense_slots = node.value
        try:
            pages = self._pool.pack_pages(dense_slots, node.parent is self.root_node)
        except UnpackablePageError:
            self._unpackable.add(node.id)
            self.counters.refused_unpackable += 1
            return False
        if node.lock_ref:
            self.protected_size_ -= len(node.key)
        else:
            self.evictable_size_ -= len(node.key)
        self._pages_of[node.id] = array("i", pages)
        node.value = self._pool.packed_token_ids(pages)
        self.token_to_kv_pool_allocator.free_segment(dense_slots, start_pos=0)
        self.counters.nodes_packed += 1
        self.counters.pages_packed += len(pages)
        self.epoch += 1
        self._show()
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

    # ---- eviction ------------------------------------------------------------------------------------------------

    def evict(self, params: EvictParams) -> EvictResult:
        """Free at least `params.num_tokens` dense tokens if that many are evictable; packed nodes give none."""
        if self._packed is None or self.disable:
            return super().evict(params)
        start_time = time.perf_counter()
        heap = [(self._eviction_key(n), n) for n in self.evictable_leaves if n.id not in self._pages_of]
        heapq.heapify(heap)
        freed, packed_leaves = 0, self._packed_leaves()
        while freed < params.num_tokens and heap:
            _, leaf = heapq.heappop(heap)
            freed += self._demote(leaf, params.num_tokens - freed, packed_leaves)
            if freed >= params.num_tokens or leaf.id in self._pages_of:
                continue
            parent = leaf.parent
            freed += len(leaf.key)
            self._drop(leaf)
            packed_leaves.add(parent)
            if parent in self.evictable_leaves and parent.id not in self._pages_of:
                heapq.heappush(heap, (self._eviction_key(parent), parent))
        self.update_eviction_metrics(freed, start_time)
        return EvictResult(num_tokens_evicted=freed)

    def _demote(self, leaf: TreeNode, wanted: int, packed_leaves: PackedLeaves) -> int:
        """Pack the dense part of the path to `leaf`, from the top, until `wanted` dense tokens are free; returns how many are.

        Packed leaves that were to be evicted before `leaf` give way. A node that does not fit is split, so that the pages
        nearest to the root, which most requests can use, stay. Ancestors that running requests hold are packed too: no
        page of the tree is written again, except by a forward that is under way, and packing runs behind that.
        """
        freed, key = 0, self._eviction_key(leaf)
        for node in [n for n in self._path(leaf) if n.id not in self._pages_of]:
            if freed >= wanted or node.id in self._unpackable:
                break
            room = self._room_for(node, key, packed_leaves)
            if not room.pages:
                self.counters.refused_no_room += 1
                break
            fits = room.pages * self.page_size
            top = node if fits == len(node.key) else self._split_node(node.key, node, fits)
            if not self._pack_into(room, top):
                break
            self.counters.pages_demoted += room.pages
            freed += fits
            if top is not node:
                break
        packed_leaves.add(leaf)
        return freed

    def _drop(self, leaf: TreeNode) -> None:
        """Remove an unlocked leaf from the tree and free its pages in whichever tier they are."""
        pages = self._pages_of.get(leaf.id)
        if pages is None:
            self.token_to_kv_pool_allocator.free_segment(leaf.value, start_pos=0)
            self.counters.dense_pages_dropped += len(leaf.key) // self.page_size
        else:
            self._packed.free(pages)
            self.counters.pages_dropped += len(pages)
            self.epoch += 1
            self._show()
        self._delete_leaf(leaf)
        self._record_remove_event(leaf)

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
        """Every packed page has exactly one owner, packing is prefix-closed, sizes agree with a walk of the tree.

        Raises AssertionError. The dense tier is checked by SGLang itself.
        """
        owned, dense_evictable, dense_protected, seen = [], 0, 0, set()
        stack = list(self.root_node.children.values())
        while stack:
            n = stack.pop()
            seen.add(n.id)
            stack.extend(n.children.values())
            pages = self._pages_of.get(n.id)
            if pages is not None:
                assert n.parent is self.root_node or n.parent.id in self._pages_of, "packed below a dense node"
                assert len(pages) * self.page_size == len(n.key) == len(n.value), "page list does not match the key"
                assert torch.equal(n.value, self._pool.packed_token_ids(list(pages))), "node value does not name its pages"
                owned += pages
            elif n.lock_ref:
                dense_protected += len(n.key)
            else:
                dense_evictable += len(n.key)
        assert set(self._pages_of) <= seen and set(self._users_of) <= seen, "table names a node outside the tree"
        assert (dense_evictable, dense_protected) == (self.evictable_size_, self.protected_size_), "dense sizes drifted"
        if self._packed is not None:
            self._packed.check_books(owned)

    def _show(self) -> None:
        if self._gauges is not None:
            self._gauges.set(self._packed.pages_used, self._packed.bytes_used)

    def counter_values(self) -> dict[str, int]:
        return asdict(self.counters)

    @property
    def metadata_bytes(self) -> int:
        """Host bytes of our tables: pages and users per node, and the registry of live requests."""
        pages = sys.getsizeof(self._pages_of) + sum(map(sys.getsizeof, self._pages_of.values()))
        users = sys.getsizeof(self._users_of) + sum(sys.getsizeof(u) + sum(map(sys.getsizeof, u)) for u in self._users_of.values())
        return pages + users + self.live.metadata_bytes
