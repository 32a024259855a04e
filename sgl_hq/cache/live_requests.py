"""Which packed pages each running request reads.

The rows of `req_to_token` below a request's packed length are "don't care": they may hold ids of dense pages that
were packed and reused since. The truth is the request's radix path, kept here by request slot (design.md 0.4).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Callable

from sgl_hq.records import EMPTY_RUN, PackedRun

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class LiveRequests:
    """Requests that hold a row of `req_to_token`, by row index, with their packed run cached per tree epoch.

    run_of_node(node) -> PackedRun walks the tree; epoch() changes whenever a walk may give another result. ended: requests that held a
    row and gave it back, since the start.
    """

    def __init__(self, run_of_node: Callable[[object], PackedRun], epoch: Callable[[], int]):
        self._run_of_node, self._epoch = run_of_node, epoch
        self.ended = 0
        self.clear()

    def __len__(self) -> int:
        return len(self._requests)

    def clear(self) -> None:
        self._requests: dict[int, Req] = {}
        self._runs: dict[int, tuple[tuple[int, int], PackedRun]] = {}
        self._forward: tuple[list[int], list[PackedRun]] = ([], [])

    def requests(self) -> list[Req]:
        return list(self._requests.values())

    def register(self, request: Req) -> None:
        self._requests[request.req_pool_idx] = request

    def unregister(self, request: Req) -> None:
        self.ended += self._requests.pop(request.req_pool_idx, None) is not None
        self._runs.pop(request.req_pool_idx, None)

    def start_forward(self, rows: list[int]) -> None:
        """Take the packed runs of the batch that is about to run: the attention backend asks for them right after.

        They cannot travel on SGLang's ForwardBatch, which is copied field by field on the way (`eager_runner.py`
        load_batch, `decode_cuda_graph_runner.py` build_replay_fb_view).
        """
        self._forward = (rows, [self.run(row) for row in rows])

    def forward_runs(self) -> tuple[list[int], list[PackedRun]]:
        """Rows and packed runs of the current forward, in batch order."""
        return self._forward

    def run(self, row: int) -> PackedRun:
        """The packed run of the request in `row`. Raises KeyError if no live request owns that row."""
        if row == 0:  # SGLang's padding row
            return EMPTY_RUN
        node = self._requests[row].last_node
        key = (self._epoch(), node.id)
        cached = self._runs.get(row)
        if cached is None or cached[0] != key:
            cached = self._runs[row] = (key, self._run_of_node(node))
        return cached[1]

    @property
    def metadata_bytes(self) -> int:
        tables = sys.getsizeof(self._requests) + sys.getsizeof(self._runs)
        return tables + sum(sys.getsizeof(s) for _, run in self._runs.values() for s in run.segments)
