"""From the packed runs of a batch to groups of rows that read the same pages. Pure: no torch, no sglang."""

from __future__ import annotations

from typing import Sequence

from sgl_hq.records import Group, PackedRun


def group_rows(runs: Sequence[PackedRun]) -> list[Group]:
    """Groups such that every (row, packed page) pair of the batch is covered exactly once.

    Runs are paths of one radix tree, so rows that share a segment share all segments before it: each distinct node
    gives one group of the rows below it (multi-level sharing for free), and a node whose rows are the same as its
    parent's joins the parent's group.
    """
    rows_of: dict[int, list[int]] = {}
    for row, run in enumerate(runs):
        for segment in run.segments:
            rows_of.setdefault(segment.node_id, []).append(row)

    groups: list[tuple[list[int], tuple[int, ...]]] = []
    group_of: dict[int, int] = {}
    for run in runs:
        parent = None
        for segment in run.segments:
            if segment.node_id not in group_of:
                rows = tuple(rows_of[segment.node_id])
                if parent is not None and groups[group_of[parent]][1] == rows:
                    group_of[segment.node_id] = group_of[parent]
                    groups[group_of[parent]][0].extend(segment.pages)
                else:
                    group_of[segment.node_id] = len(groups)
                    groups.append((list(segment.pages), rows))
            parent = segment.node_id
    return [Group(tuple(pages), rows) for pages, rows in groups]
