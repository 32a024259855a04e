"""SGLang's radix cache whose nodes may live in the packed tier.

Packed tokens are invisible to the scheduler: only dense nodes, and dense pages lent to the packed tier, count as evictable or
protected, so SGLang's own invariant `available + evictable + protected + uncached == max_total_num_tokens` keeps holding for the dense
tier with the stock allocator (design.md section 0.1; `invariant_checker.py` `_check_full_pool`).

Packing is prefix-closed: a node is packed only below packed nodes, hence every request reads a packed leading run
followed by a dense rest. Nothing here depends on clocks or set order, so tensor-parallel ranks decide alike.

The policy says when a page is packed while there is room. When the dense tier is short, cold nodes are packed under every
policy, and a page is dropped only if it is the least valuable of both tiers and the packed tier is full.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefResult,
    IncLockRefResult,
    InsertParams,
    InsertResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import TreeNode

from sgl_hq.cache import books, pack_policy
from sgl_hq.cache.demoting_eviction import DemotingEviction
from sgl_hq.cache.live_requests import LiveRequests
from sgl_hq.cache.pack_counters import PackCounters
from sgl_hq.cache.packed_room import Room
from sgl_hq.cache.packings_under_way import PackingsUnderWay, UnderWay
from sgl_hq.cache.refusals import RefusalLog
from sgl_hq.pool.two_tier_pool import HQTokenToKVPool
from sgl_hq.records import EMPTY_RUN, PackedRun, Segment

if TYPE_CHECKING:
    from sgl_hq.audit.checksums import PageChecksums


class PackingRadixCache(DemotingEviction):
    """RadixCache (`mem_cache/radix_cache.py`) plus `pack`. With `pool.packed` None (mode `exact`) it is the stock tree."""

    def __init__(self, params: CacheInitParams, pool: HQTokenToKVPool, pack_when: str):
        self._pool, self._packed, self._pack_when = pool, pool.packed, pack_when
        self.counters = PackCounters()
        self.refusals = RefusalLog(self.counters)
        self.tier_changed: Callable[[], None] | None = None  # told when pages come to or leave the packed tier
        self.checksums: PageChecksums | None = None  # of packed pages, while an audit runs
        self.epoch = 0
        self.live = LiveRequests(self.packed_run, lambda: self.epoch)
        self._under_way = PackingsUnderWay()
        super().__init__(params)

    def reset(self):
        for item in self._under_way.take_all():
            item.packing.error()  # until then the device writes their pages
        if self.checksums is not None:
            self.checksums.check([page for pages in self._pages_of.values() for page in pages])
        super().reset()
        self._pages_of: dict[int, array] = {}  # node id -> packed page ids, int32; absent = dense
        self._users_of: dict[int, tuple[str, ...]] = {}
        self._unpackable: set[int] = set()  # node ids whose values the format cannot hold
        self._inserted: TreeNode | None = None
        self._start_orders()
        self.packed_live_pages = 0  # of nodes that running requests lock
        self.live.clear()
        self.epoch += 1
        if self._packed is not None:
            self._packed.clear()
            self._give_all_back()
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
        for n in self._path(node):
            self._users_of[n.id] = pack_policy.add_user(self._users_of.get(n.id, ()), request_id)
        self.pack_path(node, lambda n: pack_policy.wants_pack(self._pack_when, self._users_of[n.id]))

    # ---- packing -------------------------------------------------------------------------------------------------

    def pack(self, node: TreeNode) -> bool:
        """Begin to move a dense node into the packed tier, once and whole. It is packed, and its dense pages are freed, some
        batches later (`batch_done`), or when `settle` is called.

        The parent must be packed, or begun before, or the root. Locked (running) nodes may be packed: running requests look their
        pages up through `live`. Returns False when the tier has no room for all of it, nodes that are to go before it
        counted as room, or when the values are known not to be packable.
        """
        assert node.id not in self._pages_of and node not in self._under_way
        assert self._will_be_packed(node.parent)
        if node.id in self._unpackable:
            return False
        pages = len(node.key) // self.page_size
        self._lend_for(pages)
        if not self._will_be_packed(node.parent):
            return False  # it has turned out not to be packable
        room = self._room_for(node, self._eviction_key(node))
        if room.pages < pages:
            self.refusals.no_room(pages, pages, self._packed, self.packed_live_pages)
            return False
        self._begin(room, node)
        return True

    def _will_be_packed(self, parent: TreeNode) -> bool:
        """Or is, or has nothing to pack."""
        return parent is self.root_node or parent.id in self._pages_of or parent in self._under_way

    def pack_path(self, node: TreeNode, wanted: Callable[[TreeNode], bool] = lambda n: True) -> None:
        """Begin to pack the dense part of the path to `node` from the top, down to the first that is not `wanted` or has no room."""
        for n in self._path(node):
            if n.id in self._pages_of or n in self._under_way:
                continue
            if not (wanted(n) and self.pack(n)):
                break

    def batch_done(self) -> None:
        """A batch has been processed: what began to be packed some batches ago is packed now."""
        self._under_way.batch += 1
        for item in self._under_way.take_done():
            self._finish(item)

    def settle(self) -> int:
        """Everything that has begun is packed, or known not to be packable, now; returns the dense tokens that came free. Waits for the device."""
        return sum(self._finish(item) for item in self._under_way.take_all())

    def _begin(self, room: Room, node: TreeNode) -> None:
        """`room` holds all of `node`; its victims are lost."""
        for victim in room.victims:
            self._drop(victim)
        start_time = time.perf_counter()
        packing = self._pool.pack_pages(node.value, node.parent is self.root_node)
        self._under_way.add(node, packing, time.perf_counter() - start_time)

    def _finish(self, item: UnderWay) -> int:
        """The nodes of `item` become packed, and the dense tokens that come free are returned: 0 if these or the values above cannot be packed."""
        start_time, pages, top = time.perf_counter(), item.packing.pages, item.nodes[0]
        error = item.packing.error()
        if error is not None or not (top.parent is self.root_node or top.parent.id in self._pages_of):
            self._packed.free(pages)
            if error is not None:
                self._unpackable.update(node.id for node in item.nodes)
                self.refusals.unpackable(len(pages), error)
            return 0
        if self.checksums is not None:
            self.checksums.take(pages)
        at = 0
        for node in item.nodes:
            end = at + len(node.key) // self.page_size
            self._become_packed(node, pages[at:end])
            at = end
        self.epoch += 1
        self.counters.packed(len(pages), item.seconds + time.perf_counter() - start_time)
        self._tell_tier_changed()
        return len(pages) * self.page_size

    def _become_packed(self, node: TreeNode, pages: list[int]) -> None:
        """The dense pages are freed at once: whoever writes into them is a forward that runs after those which read them."""
        dense_slots = node.value
        if node.lock_ref:
            self.packed_live_pages += len(pages)
            self.protected_size_ -= len(node.key)
        else:
            self.evictable_size_ -= len(node.key)
        self._hold_pages(node, pages)
        self.token_to_kv_pool_allocator.free_segment(dense_slots, start_pos=0)
        self._enter_order(node)

    def _hold_pages(self, node: TreeNode, pages: list[int]) -> None:
        """`node` is packed, in `pages`."""
        self._pages_of[node.id] = array("i", pages)
        node.value = self._pool.packed_token_ids(pages)

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
        self._under_way.split(upper, child)
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

    @property
    def pages_under_way(self) -> list[int]:
        """Packed pages that are being written; their nodes are still dense."""
        return self._under_way.pages

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
        """Host bytes of our tables: pages, users and place in the order of eviction per node, and the registry of live requests."""
        pages = sys.getsizeof(self._pages_of) + sum(map(sys.getsizeof, self._pages_of.values()))
        users = sys.getsizeof(self._users_of) + sum(sys.getsizeof(u) + sum(map(sys.getsizeof, u)) for u in self._users_of.values())
        orders = self._dense_order.metadata_bytes + self._packed_order.metadata_bytes
        return pages + users + orders + self.live.metadata_bytes
