"""Which packed pages give way to nodes that are to be packed. Decides only: nothing is dropped here."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

from sgl_hq.pool.packed_tier import NO_SINK, PackedTier

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode


class Room(NamedTuple):
    """pages: how many of the pages asked for fit once `victims` are dropped, in their order (leaves before their parents)."""

    pages: int
    victims: list[TreeNode]


class PackedLeaves:
    """Packed leaves in eviction order, for as long as one call of `evict` or `pack` lasts.

    leaves: the nodes that may be dropped, as they change; those in `pages_of` (node id -> packed pages) are ordered by `key_of`,
    once and only if the tier is full. The caller drops the victims of a room before it asks for the next one, and names what
    may have become a packed leaf meanwhile (`add`).
    """

    def __init__(
        self,
        tier: PackedTier,
        leaves: Set[TreeNode],
        pages_of: Mapping[int, Sequence[int]],
        key_of: Callable[[TreeNode], tuple],
    ):
        self._tier, self._leaves, self._pages_of, self._key_of = tier, leaves, pages_of, key_of
        self._heap: list[tuple[tuple, TreeNode]] | None = None

    def room(self, pages: int, needs_sink: bool, before: tuple) -> Room:
        """Room for `pages` pages, the first of which takes a sink slot if `needs_sink`.

        Only leaves with a key before `before` give way: their bytes are nowhere else, so they must be worth less than what comes.
        """
        tier = self._tier
        if tier.has_room(pages, needs_sink):
            return Room(pages, [])
        if self._heap is None:
            self._heap = [(self._key_of(n), n) for n in self._leaves if n.id in self._pages_of]
            heapq.heapify(self._heap)
        needs_sink = needs_sink and tier.sink_tokens > 0
        free, sinks, victims, children_left = tier.pages_free, tier.sinks_free, [], {}
        while self._heap and self._heap[0][0] < before and (free < pages or (needs_sink and not sinks)):
            victim = heapq.heappop(self._heap)[1]
            victims.append(victim)
            free += len(self._pages_of[victim.id])
            sinks += tier.sink_slot(self._pages_of[victim.id][0]) != NO_SINK
            parent = victim.parent
            children_left[parent.id] = children_left.get(parent.id, len(parent.children)) - 1
            if parent.id in self._pages_of and not parent.lock_ref and not children_left[parent.id]:
                heapq.heappush(self._heap, (self._key_of(parent), parent))
        if needs_sink and not sinks:
            self._heap = None  # the victims stay where they are
            return Room(0, [])
        return Room(min(free, pages), victims)

    def add(self, node: TreeNode) -> None:
        """`node` may have become a packed leaf that may be dropped."""
        if self._heap is not None and node.id in self._pages_of and node in self._leaves:
            heapq.heappush(self._heap, (self._key_of(node), node))
