"""Which program reads which pages for which rows: one int32 buffer that the grouped kernels walk.

A *group* is a run of pages that the same query rows read (`attention/grouping.py`). Its rows are cut into tiles, small ones
for a few (request, query head) pairs, large ones for many, and the pages of all tiles of one kind are dealt out evenly to
a fixed number of programs, so a launch has the same grid whatever the batch: CUDA graphs replay it. Every kv head does the
same work, so the lists are made once for all.

The buffer, int32: header of fixed size, then lists; items, pages, rows and parts are named by their index in the buffer.

    small programs + 1  first item of each          |  large programs + 1  the same
    2                   pages to expand: their list, their number
    max_rows + 1        first part of each row      |  max_rows            sink slot of each row, -1 = none
    items: pages, number of pages, query rows, number of rows, part, tokens of the first page left out, 1 = expanded pages, 0

An item writes one *part* for each of its rows: the state of that row over the item's pages. `merge` joins a row's parts.
Pure: numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ITEM_WORDS = 8
SMALL_ROWS = 16  # most (request, query head) pairs of a small tile
CODED_ROWS = 8  # of one over affine or int8 pages, if that holds the query heads of a kv head
LARGE_ROWS = 128
# A group of more such tiles is read in large ones: every small tile reads and unpacks the pages again. By the pairs of a tile.
MAX_SMALL_TILES = {CODED_ROWS: 4, SMALL_ROWS: 3}
MIN_SMALL_PAGES, MIN_LARGE_PAGES = 4, 4  # pages that are worth an item of their own: its rows are read and its part written
NO_SINK = -1


@dataclass(frozen=True)
class RowGroup:
    """pages: packed page ids in sequence order. rows: rows of the query tensor. sink: slot of the first tokens of the
    sequence that pages[0] begins, or NO_SINK; these `sink_tokens` of the page are not read."""

    pages: Sequence[int] | np.ndarray
    rows: Sequence[int] | np.ndarray
    sink: int = NO_SINK


class Sections(NamedTuple):
    """Where the parts of the header begin: programs of small and of large tiles, pages to expand, rows, sinks."""

    small: int
    large: int
    expand: int
    rows: int
    sinks: int


class Tiles(NamedTuple):
    """What lists have: small and large tiles, pages to expand. The kernel of what is missing would find nothing to do."""

    small: bool
    large: bool
    expanded: bool

    def both(self, other: Tiles) -> Tiles:
        """What this and the other have."""
        return Tiles(*(a and b for a, b in zip(self, other)))


@dataclass(frozen=True)
class Grid:
    """Programs per kv head of the two kernels, the query heads that share a kv head, and the (request, query head) pairs of a
    small tile. large_step: pages a large tile attends at a time. direct_tiles: the large kernel unpacks pages itself, and does for
    groups of up to so many large tiles."""

    small: int
    large: int
    group: int
    small_tile: int = SMALL_ROWS
    large_step: int = 1
    direct_tiles: int = 0

    @property
    def small_rows(self) -> int:
        """Query rows of a small tile."""
        return max(1, self.small_tile // self.group)

    @property
    def most_small_rows(self) -> int:
        """Query rows of the largest group that is read in small tiles."""
        return MAX_SMALL_TILES[self.small_tile] * self.small_rows

    @property
    def large_rows(self) -> int:
        return LARGE_ROWS // self.group

    def possible_tiles(self, rows: int) -> Tiles:
        """What lists for so many query rows may have: no group has more rows."""
        return Tiles(rows > 0, rows > self.most_small_rows, -(-rows // self.large_rows) > self.direct_tiles)

    def header_words(self, max_rows: int) -> int:
        return self.small + 1 + self.large + 1 + 2 * max_rows + 1 + 2

    def sections(self, max_rows: int) -> Sections:
        """What kernels know when they are compiled comes before what depends on max_rows."""
        large = self.small + 1
        expand = large + self.large + 1
        return Sections(0, large, expand, expand + 2, expand + 2 + max_rows + 1)


def lay_out(
    groups: Sequence[RowGroup], max_rows: int, grid: Grid, sink_tokens: int, room: int | None = None
) -> tuple[np.ndarray, int]:
    """The buffer and the number of parts. room: pages that can be expanded for large tiles, which then read expanded pages by
    their number there; groups beyond it are read packed. None: pages need no expanding (bf16)."""
    header = grid.header_words(max_rows)
    expanded: list[np.ndarray] = []
    used = 0
    tiles: dict[str, list[tuple[int, int, int, int, int, int]]] = {"small": [], "large": []}
    lists, at = [], header
    for group in groups:
        pages, rows = np.asarray(group.pages, np.int32), np.asarray(group.rows, np.int32)
        if not len(pages) or not len(rows):
            continue
        kind = "small" if len(rows) <= grid.most_small_rows else "large"
        skip = sink_tokens if group.sink != NO_SINK else 0
        expand = 0
        if kind == "large" and room is not None and -(-len(rows) // grid.large_rows) > grid.direct_tiles:
            if used + len(pages) <= room:
                expanded.append(pages)
                pages = np.arange(used, used + len(pages), dtype=np.int32)
                used += len(pages)
                expand = 1
            elif not grid.direct_tiles:
                kind = "small"
        size = grid.small_rows if kind == "small" else grid.large_rows
        page_at, row_at = at, at + len(pages)
        lists += [pages, rows]
        at += len(pages) + len(rows)
        for first in range(0, len(rows), size):
            tiles[kind].append((page_at, len(pages), row_at + first, min(size, len(rows) - first), skip, expand))

    expand_at = at
    lists += expanded
    at += used
    small = _deal(tiles["small"], grid.small, MIN_SMALL_PAGES, 1)
    large = _deal(tiles["large"], grid.large, MIN_LARGE_PAGES, grid.large_step)
    items = np.concatenate([small[0], large[0]])
    items[:, 4] = np.concatenate([[0], items[:, 3].cumsum()[:-1]]) if len(items) else 0
    words = np.concatenate([np.zeros(header, np.int32), *lists, items.reshape(-1)]).astype(np.int32, copy=False)
    head = grid.sections(max_rows)
    words[head.small : head.large] = at + ITEM_WORDS * small[1]
    words[head.large : head.expand] = at + ITEM_WORDS * (len(small[0]) + large[1])

    part_rows = words[_spans(items[:, 2], items[:, 3])]  # the query row of every part
    parts_at = len(words)
    counts = np.bincount(part_rows, minlength=max_rows)
    words[head.rows : head.sinks] = parts_at + np.concatenate([[0], counts.cumsum()])
    words[head.sinks : header] = NO_SINK
    words[head.expand : head.rows] = expand_at, used
    for group in groups:
        if group.sink != NO_SINK:
            words[head.sinks + np.asarray(group.rows, np.int64)] = group.sink
    parts = np.argsort(part_rows, kind="stable").astype(np.int32)
    return np.concatenate([words, parts]), len(part_rows)


def tiles_of(words: np.ndarray, max_rows: int, grid: Grid) -> Tiles:
    """What the lists of `lay_out` hold."""
    at = grid.sections(max_rows)
    small, large = ((words[start] < words[start + programs]) for start, programs in ((at.small, grid.small), (at.large, grid.large)))
    return Tiles(bool(small), bool(large), bool(words[at.expand + 1]))


def _deal(tiles: list[tuple[int, int, int, int, int, int]], programs: int, least: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Items `[n, ITEM_WORDS]` and the first item of each of `programs` (+ 1): equal runs of pages, multiples of `step`, cut
    where tiles end."""
    if not tiles:
        return np.zeros((0, ITEM_WORDS), np.int32), np.zeros(programs + 1, np.int32)
    table = np.array(tiles, np.int64)
    starts = np.concatenate([[0], table[:, 1].cumsum()])
    workers = min(programs, max(1, -(-int(starts[-1]) // least)))
    bounds = np.arange(workers + 1) * starts[-1] // workers // step * step
    bounds[-1] = starts[-1]
    cuts = np.union1d(starts, bounds)
    begin = cuts[:-1]
    tile = np.searchsorted(starts, begin, "right") - 1
    into = begin - starts[tile]
    items = np.zeros((len(begin), ITEM_WORDS), np.int32)
    items[:, 0] = table[tile, 0] + into
    items[:, 1] = np.diff(cuts)
    items[:, 2], items[:, 3] = table[tile, 2], table[tile, 3]
    items[:, 5] = np.where(into == 0, table[tile, 4], 0)
    items[:, 6] = table[tile, 5]
    first = np.full(programs + 1, len(items), np.int32)
    first[: workers + 1] = np.searchsorted(begin, bounds)
    return items, first


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... for lengths[0] entries, and so on."""
    if not len(starts):
        return np.zeros(0, np.int64)
    before = lengths.cumsum() - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
