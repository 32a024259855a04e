"""Which packed pages give way to a node that is to be packed. Decides only: nothing is dropped here."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sgl_hq.cache.eviction_order import EvictionOrder
from sgl_hq.pool.packed_tier import NO_SINK, PackedTier

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode


class Room(NamedTuple):
    """pages: how many of the pages asked for fit once `victims` are dropped, in their order (leaves before their parents)."""

    pages: int
    victims: list[TreeNode]


def find_room(
    tier: PackedTier, order: EvictionOrder, pages_of: Mapping[int, Sequence[int]], key_of, pages: int, needs_sink: bool, before: tuple
) -> Room:
    """Room for `pages` pages, the first of which takes a sink slot if `needs_sink`.

    order: packed leaves, left as it was; pages_of: node id -> packed pages. Only nodes with a key_of(node) before `before` give
    way: their bytes are nowhere else, so they must be worth less than what comes.
    """
    if tier.has_room(pages, needs_sink):
        return Room(pages, [])
    needs_sink = needs_sink and tier.sink_tokens > 0
    free, sinks, victims = tier.pages_free, tier.sinks_free, _Victims(order, pages_of, key_of, before)
    while (free < pages or (needs_sink and not sinks)) and (victim := victims.next()):
        free += len(pages_of[victim.id])
        sinks += tier.sink_slot(pages_of[victim.id][0]) != NO_SINK
    victims.put_back()
    if needs_sink and not sinks:
        return Room(0, [])
    return Room(min(free, pages), victims.taken)


class _Victims:
    """Packed nodes in the order in which they would be dropped: leaves, and parents that would be leaves by then."""

    def __init__(self, order: EvictionOrder, pages_of: Mapping[int, Sequence[int]], key_of, before: tuple):
        self._order, self._pages_of, self._key_of, self._before = order, pages_of, key_of, before
        self.taken: list[TreeNode] = []
        self._leaves: list[TreeNode] = []  # those of `taken` that are leaves already
        self._parents: list[tuple[tuple, TreeNode]] = []  # a heap
        self._children_left: dict[int, int] = {}

    def next(self) -> TreeNode | None:
        leaf = self._order.first()
        from_parents = self._parents and (leaf is None or self._parents[0] < leaf)
        key, node = self._parents[0] if from_parents else leaf or (self._before, None)
        if key >= self._before:
            return None
        if from_parents:
            heapq.heappop(self._parents)
        else:
            self._leaves.append(self._order.pop())
        self.taken.append(node)
        self._note_parent(node.parent)
        return node

    def put_back(self) -> None:
        for leaf in self._leaves:
            self._order.add(leaf)

    def _note_parent(self, parent: TreeNode) -> None:
        left = self._children_left[parent.id] = self._children_left.get(parent.id, len(parent.children)) - 1
        if not left and parent.id in self._pages_of and not parent.lock_ref:
            heapq.heappush(self._parents, (self._key_of(parent), parent))
