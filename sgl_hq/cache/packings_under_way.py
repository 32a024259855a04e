"""Nodes that are being packed. They stay dense, in all books, until the device is done: packing never makes the scheduler wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from sgl_hq.pool.packing import Packing

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode

# With the overlap schedule a packing may begin behind the forward of the next batch, before the present one is booked as done. When the
# batch after that one is done, so is the packing. Counted in batches, as tensor-parallel ranks must decide alike.
BATCHES_UNTIL_DONE = 3


class UnderWay(NamedTuple):
    """nodes: whose pages, from the top down, `packing` fills: one, until it is split. seconds: of the scheduler so far."""

    nodes: list[TreeNode]
    packing: Packing
    batch: int
    seconds: float


class PackingsUnderWay:
    """In the order in which they began, which is a parent's before its children's."""

    def __init__(self):
        self.batch = 0  # batches done
        self._queue: deque[UnderWay] = deque()
        self._of_node: dict[int, UnderWay] = {}

    def __contains__(self, node: TreeNode) -> bool:
        return node.id in self._of_node

    @property
    def pages(self) -> list[int]:
        """Packed pages that are taken, and no node's yet."""
        return [page for item in self._queue for page in item.packing.pages]

    def add(self, node: TreeNode, packing: Packing, seconds: float) -> None:
        self._of_node[node.id] = item = UnderWay([node], packing, self.batch, seconds)
        self._queue.append(item)

    def split(self, upper: TreeNode, lower: TreeNode) -> None:
        """`upper` is a new node of the first pages of `lower`."""
        item = self._of_node.get(lower.id)
        if item is not None:
            item.nodes.insert(item.nodes.index(lower), upper)
            self._of_node[upper.id] = item

    def take_done(self) -> Iterator[UnderWay]:
        """Those that no one need wait for."""
        while self._queue and self._queue[0].batch + BATCHES_UNTIL_DONE <= self.batch:
            yield self._take()

    def take_all(self) -> Iterator[UnderWay]:
        while self._queue:
            yield self._take()

    def _take(self) -> UnderWay:
        item = self._queue.popleft()
        for node in item.nodes:
            del self._of_node[node.id]
        return item
