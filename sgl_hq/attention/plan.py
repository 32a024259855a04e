"""The plan of one forward: which packed pages are read for which query rows, and where each request's dense part begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch

from sgl_hq.attention.grouping import group_rows
from sgl_hq.metrics.bins import GROUP_REQUESTS, Bins
from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.records import PackedRun


@dataclass(frozen=True)
class PlannedGroup:
    """first_page: pages[0] on the host; pages: [n] int64; q_rows: [m] int64 rows of the flat query tensor."""

    first_page: int
    pages: torch.Tensor
    q_rows: torch.Tensor


@dataclass(frozen=True)
class PackedPlan:
    """groups, and dense_starts[i]: position of the first dense token of request i (a multiple of 64).

    tokens_read: packed tokens read once per group; tokens_attended: the same counted once per request. group_requests: groups by
    the number of their requests.
    """

    groups: tuple[PlannedGroup, ...]
    dense_starts: tuple[int, ...]
    tokens_read: int
    tokens_attended: int
    group_requests: Bins


def make_plan(runs: Sequence[PackedRun], query_lens: Sequence[int], device) -> PackedPlan | None:
    """runs[i] and query_lens[i] (1 in decode): packed run and new tokens of request i. None if nothing is packed."""
    if not any(run.tokens for run in runs):
        return None
    offsets = [0]
    for n in query_lens:
        offsets.append(offsets[-1] + n)
    groups, sizes, read, attended = [], [], 0, 0
    for group in group_rows(runs):
        q_rows = torch.cat([torch.arange(offsets[r], offsets[r + 1]) for r in group.rows])
        pages = torch.tensor(group.pages, dtype=torch.int64)
        groups.append(PlannedGroup(group.pages[0], pages.to(device), q_rows.to(device)))
        sizes.append(len(group.rows))
        read += len(group.pages) * PAGE_TOKENS
        attended += len(group.pages) * PAGE_TOKENS * len(group.rows)
    return PackedPlan(tuple(groups), tuple(run.tokens for run in runs), read, attended, Bins.of(GROUP_REQUESTS, sizes))
