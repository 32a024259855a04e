"""Which packed pages give way to a node that is to be packed. Decides only: nothing is dropped here."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sgl_hq.pool.packed_tier import NO_SINK, PackedTier

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode


class Room(NamedTuple):
    """pages: how many of the pages asked for fit once `victims` are dropped, in their order (leaves before their parents)."""

    pages: int
    victims: list[TreeNode]


def find_room(
    tier: PackedTier,
    pages: int,
    needs_sink: bool,
    leaves: Iterable[TreeNode],
    pages_of: Mapping[int, Sequence[int]],
    key_of: Callable[[TreeNode], tuple],
    before: tuple,
) -> Room:
    """Room for `pages` pages, the first of which takes a sink slot if `needs_sink`.

    leaves: nodes that may be dropped; those in `pages_of` (node id -> packed pages) are considered, in the order of `key_of`
    and only up to the key `before`: the bytes of a victim are nowhere else, so it must be worth less than what comes.
    """
    if tier.has_room(pages, needs_sink):
        return Room(pages, [])
    needs_sink = needs_sink and tier.sink_tokens > 0
    free, sinks, victims = tier.pages_free, tier.sinks_free, []
    heap = [(key_of(n), n) for n in leaves if n.id in pages_of]
    heapq.heapify(heap)
    children_left: dict[int, int] = {}
    while heap and heap[0][0] < before and (free < pages or (needs_sink and not sinks)):
        victim = heapq.heappop(heap)[1]
        victims.append(victim)
        free += len(pages_of[victim.id])
        sinks += tier.sink_slot(pages_of[victim.id][0]) != NO_SINK
        parent = victim.parent
        children_left[parent.id] = children_left.get(parent.id, len(parent.children)) - 1
        if parent.id in pages_of and not parent.lock_ref and not children_left[parent.id]:
            heapq.heappush(heap, (key_of(parent), parent))
    if needs_sink and not sinks:
        return Room(0, [])
    return Room(min(free, pages), victims)
