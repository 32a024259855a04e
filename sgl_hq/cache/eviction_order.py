"""Leaves in the order in which they are to go, kept up from one eviction to the next.

SGLang orders all leaves anew in every eviction (`radix_cache.py` evict). The packed tier multiplies the leaves, and a full server
evicts in almost every decode step, so here an eviction costs what it evicts.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode

_SLACK = 1024  # entries of nodes that may no longer go, before they are cleared out


class EvictionOrder:
    """A heap with at most one entry a node, whose key may be out of date.

    leaves: all that nobody holds, as they change. belongs(node): it is in this order's tier. key_of(node): the first goes first, no
    two are equal. Keys must only grow, as those of all policies of `--radix-eviction-policy` do: an entry that has come to the top
    with an old key is put back with the new one, and whatever else is in the heap comes later than its entry says.
    """

    def __init__(self, leaves: Set[TreeNode], belongs: Callable[[TreeNode], bool], key_of: Callable[[TreeNode], tuple]):
        self._leaves, self._belongs, self._key_of = leaves, belongs, key_of
        self._heap: list[tuple[tuple, TreeNode]] = []
        self._entered: set[TreeNode] = set()

    def add(self, node: TreeNode) -> None:
        """`node` has become a leaf that may go, or was taken by `pop` and stays."""
        if node in self._entered:
            return
        if len(self._heap) > 2 * len(self._leaves) + _SLACK:
            self._clear_out()
        self._entered.add(node)
        heapq.heappush(self._heap, (self._key_of(node), node))

    def first(self) -> tuple[tuple, TreeNode] | None:
        """Key and leaf that are to go first; they stay here."""
        while self._heap:
            key, node = self._heap[0]
            if not self._may_go(node):
                heapq.heappop(self._heap)
                self._entered.remove(node)
            elif (now := self._key_of(node)) != key:
                heapq.heapreplace(self._heap, (now, node))
            else:
                return key, node
        return None

    def pop(self) -> TreeNode | None:
        found = self.first()
        if found is None:
            return None
        heapq.heappop(self._heap)
        self._entered.remove(found[1])
        return found[1]

    @property
    def metadata_bytes(self) -> int:
        """Host bytes; the numbers in the keys belong to the nodes."""
        entries = sum(sys.getsizeof(entry) + sys.getsizeof(entry[0]) for entry in self._heap)
        return sys.getsizeof(self._heap) + sys.getsizeof(self._entered) + entries

    def _may_go(self, node: TreeNode) -> bool:
        return node in self._leaves and self._belongs(node)

    def _clear_out(self) -> None:
        self._entered = set(filter(self._may_go, self._entered))
        self._heap = [(self._key_of(node), node) for node in self._entered]
        heapq.heapify(self._heap)
