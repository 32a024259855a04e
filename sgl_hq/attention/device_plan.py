"""The plan of a forward on a GPU: which pages are read for which query rows, as the lists the kernels walk.

Packed pages: made on the host from the radix paths of the batch (`grouping.py`) and uploaded with one copy, only when the batch or
the packed runs changed. Dense pages of a decode batch: made on the device, before every forward. The plan of decode graphs has
buffers of fixed size and address; the one for eager forwards grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sgl_hq.attention.grouping import group_rows
from sgl_hq.kernels.grouped_attention.launcher import SCRATCH_PAGES, WorkOverflow, empty_work, make_grid, make_scratch
from sgl_hq.kernels.grouped_attention.launcher_dense import DenseWork, list_pages, make_dense_work, pages_of
from sgl_hq.kernels.grouped_attention.work import ITEM_WORDS, RowGroup, lay_out, tiles_of
from sgl_hq.metrics.bins import GROUP_REQUESTS, NO_GROUPS, Bins
from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.pool.packed_tier import PackedTier
from sgl_hq.records import PackedRun

# Parts a row of a decode graph may have on average: levels of sharing along its path, before splitting over programs.
LEVELS = 16
_STAGES = 3  # uploads that may be in flight: an earlier graph replay may not have taken its lists yet


class DevicePlan:
    """work, dense: what the layers give to the kernels, for packed and for dense pages. graph: decode graphs hold its launches.
    tokens_read, tokens_attended: packed tokens of the last `set`, once per group and once per request. group_requests: its groups by
    the number of their requests."""

    def __init__(
        self, tier: PackedTier, q_heads: int, max_rows: int, row_tokens: int = 0, *, graph: bool, scratch: torch.Tensor | None = None
    ):  # fmt: skip
        """max_rows: query rows of a forward (more are taken without `graph`). graph: allocate everything now, for good, for
        decode of requests of up to `row_tokens` tokens. scratch: that of another plan that never runs at the same time, to be shared."""
        self._tier, self._q_heads, self.graph = tier, q_heads, graph
        self.layout = tier.codecs[0].layout
        self._device = tier.records[0].device
        self._grid = make_grid(self.layout, q_heads, tier.shape.kv_heads, self._device)
        self.tokens_read = self.tokens_attended = 0
        self.group_requests = NO_GROUPS
        self._batch: tuple[list[PackedRun], list[int]] | None = None  # planned last: _lists, _parts, for _rows rows
        self._uploaded = False
        self._staging: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        expands = self.layout.fmt.kind != "bf16"
        room = min(SCRATCH_PAGES, tier.sizes.packed_pages) if expands else 0
        self._room = room if expands else None
        self._shares_scratch = scratch is not None
        self._scratch = make_scratch(self.layout, tier.shape.kv_heads, room, self._device) if scratch is None else scratch
        parts = LEVELS * max_rows + self._split_parts if graph else 0
        lists = tier.sizes.packed_pages + room + 2 * parts + ITEM_WORDS * (parts + self._grid.small + self._grid.large)
        self.work = empty_work(self._grid, max_rows, self._grid.header_words(max_rows) + lists if graph else 0, parts, self._scratch)
        self.dense = self._dense_work(max_rows if graph else 0, row_tokens)
        self.set([], [])

    @property
    def nbytes(self) -> int:
        """Device bytes, a shared scratch not counted."""
        return self.work.nbytes + self.dense.nbytes - (self._scratch.nbytes if self._shares_scratch else 0)

    def prepare(self, runs: Sequence[PackedRun], query_lens: Sequence[int]) -> bool:
        """Plan a batch on the host. False: a decode graph's buffers are too small for it, so it must run without the graph."""
        batch = list(runs), list(query_lens)
        if batch != self._batch:
            rows = max(sum(query_lens), self.work.max_rows)
            groups = self._groups(*batch)
            self._lists, self._parts = lay_out(groups, rows, self._grid, self.layout.fmt.sink_tokens, self._room)
            self._batch, self._rows, self._uploaded = batch, rows, False
        return not self.graph or self._fits

    def set(self, runs: Sequence[PackedRun], query_lens: Sequence[int]) -> None:
        """Plan a batch and upload the lists on the current stream, unless the batch is the last one again.

        runs, query_lens: packed run and query rows (1 in decode) of each request, in batch order. Rows after theirs, the
        padding of a graph, read nothing. Raises WorkOverflow where `prepare` says False.
        """
        if not self.prepare(runs, query_lens):
            raise WorkOverflow(f"{self._rows} rows make {self._parts} parts; a decode graph has room for {len(self.work.part_o)}")
        if self._uploaded:
            return
        if not self._fits:
            self.work = empty_work(self._grid, self._rows, len(self._lists), self._parts, self._scratch)
        self._upload(self._lists)
        self._uploaded = True
        if not self.graph:  # a graph launches what was captured, whatever the lists of a replay hold
            self.work.tiles = tiles_of(self._lists, self._rows, self._grid)

    def list_dense_pages(
        self, req_to_token: torch.Tensor, requests: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, rows: int
    ) -> None:
        """List the dense pages of a decode batch, on the current stream; arguments: `launcher_dense.list_pages`."""
        most_pages = len(lengths) * pages_of(req_to_token.shape[1])
        if not self.graph and (len(lengths) > self.dense.max_rows or most_pages > self.dense.max_pages):
            self.dense = self._dense_work(len(lengths), req_to_token.shape[1])
        list_pages(self.dense, req_to_token, requests, starts, lengths, rows)

    def _dense_work(self, max_rows: int, row_tokens: int) -> DenseWork:
        shape, head_dim = self._tier.shape, self.layout.head_dim
        return make_dense_work(max_rows, max_rows * pages_of(row_tokens), self._q_heads, shape.kv_heads, head_dim, self._device)

    @property
    def _fits(self) -> bool:
        """The buffers hold the lists and parts of the batch that was planned last."""
        room = self.work.max_rows, len(self.work.words), len(self.work.part_o)
        return all(need <= have for need, have in zip((self._rows, len(self._lists), self._parts), room))

    def _groups(self, runs: list[PackedRun], query_lens: list[int]) -> list[RowGroup]:
        starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int64)
        groups, sizes = [], []
        self.tokens_read = self.tokens_attended = 0
        for group in group_rows(runs):
            rows = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in group.rows])
            groups.append(RowGroup(np.asarray(group.pages, np.int32), rows, self._tier.sink_slot(group.pages[0])))
            sizes.append(len(group.rows))
            self.tokens_read += len(group.pages) * PAGE_TOKENS
            self.tokens_attended += len(group.pages) * PAGE_TOKENS * len(group.rows)
        self.group_requests = Bins.of(GROUP_REQUESTS, sizes)
        return groups

    @property
    def _split_parts(self) -> int:
        """Parts more than tiles have rows: every program cuts at most one tile."""
        return self._grid.small * self._grid.small_rows + self._grid.large * self._grid.large_rows

    def _upload(self, words: np.ndarray) -> None:
        # numpy copies on the host: torch would start its threads for the lists of a large prefill.
        if self._device.type != "cuda":
            self.work.words.numpy()[: len(words)] = words
            return
        if len(self._staging) < _STAGES:
            staged, event = torch.empty(0, dtype=torch.int32), torch.cuda.Event()
        else:
            staged, event = self._staging.pop(0)
            event.synchronize()  # long done, unless three plans were made within one forward
        if len(staged) < len(words):
            staged = torch.empty(max(len(words), len(self.work.words)), dtype=torch.int32, pin_memory=True)
        staged.numpy()[: len(words)] = words
        self.work.words[: len(words)].copy_(staged[: len(words)], non_blocking=True)
        event.record()
        self._staging.append((staged, event))
