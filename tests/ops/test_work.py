"""Work lists: every page of a group is read once for each of its rows, by equal shares."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_hq.kernels.grouped_attention.launcher import plan_pages
from sgl_hq.kernels.grouped_attention.work import (
    LARGE_ROWS, MAX_SMALL_TILES, MIN_LARGE_PAGES, MIN_SMALL_PAGES, NO_SINK, Grid, RowGroup, Tiles, lay_out, tiles_of,
)  # fmt: skip
from sgl_hq.page_format import get_format
from work_lists import Lists

SINK_TOKENS = 4
STEPS = st.sampled_from([1, 2]), st.sampled_from([0, 0, 4])
GRIDS = st.builds(Grid, st.integers(1, 40), st.integers(1, 20), st.sampled_from([1, 2, 3, 4, 7, 8]), st.sampled_from([8, 16]), *STEPS) | (
    st.builds(Grid, st.integers(1, 40), st.integers(1, 20), st.just(16), st.just(16), *STEPS)
)


@st.composite
def batches(draw):
    """Groups with pages of their own; rows may be in several groups, or in none. (groups, max_rows)."""
    rows = draw(st.integers(1, 300))
    groups, page = [], draw(st.integers(0, 5))
    sinks = {}
    for slot in range(draw(st.integers(0, 5))):
        members = draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=60) | st.just(list(range(rows))))
        pages = list(range(page, page + draw(st.integers(0, 40))))
        page += len(pages)
        begins = bool(pages) and bool(members) and draw(st.booleans()) and not sinks.keys() & set(members)
        sinks |= dict.fromkeys(members, slot) if begins else {}
        groups.append(RowGroup(pages, sorted(members), slot if begins else NO_SINK))
    return groups, rows + draw(st.integers(0, 5))


def check(groups: list[RowGroup], max_rows: int, grid: Grid, room: int | None) -> Lists:
    words, parts = lay_out(groups, max_rows, grid, SINK_TOKENS, room)
    lists = Lists(words, max_rows, grid)
    found, rows = tiles_of(words, max_rows, grid), 1 + max((row for group in groups for row in group.rows), default=-1)
    assert found.both(grid.possible_tiles(rows)) == found, "a decode graph would lack a kernel"
    assert room is None or len(lists.expanded) <= room
    wanted, skipped = Counter(), Counter()
    for group in groups:
        for row in group.rows:
            wanted.update((row, page) for page in group.pages)
            if group.sink != NO_SINK and len(group.pages):
                skipped[row, group.pages[0]] = SINK_TOKENS

    got, got_skips, writer, part_rows = Counter(), Counter(), {}, {}
    for kind, most in (("small", grid.small_rows), ("large", grid.large_rows)):
        for pages, rows, part, skip, tile in lists.items(kind):
            assert len(rows) <= most and len(rows) * grid.group <= (grid.small_tile if kind == "small" else LARGE_ROWS)
            assert len(set(rows)) == len(rows)
            for i, row in enumerate(rows):
                got.update((row, page) for page in pages)
                if skip:
                    got_skips[row, pages[0]] += skip
                assert writer.setdefault(part + i, tile) == tile and part + i not in part_rows, "a part is written twice"
                part_rows[part + i] = row
    assert got == wanted, "a page is read twice for a row, or not at all"
    assert got_skips == skipped
    assert sorted(part_rows) == list(range(parts)), "parts are numbered without gaps"
    assert {(row, part) for row, own in enumerate(lists.parts) for part in own} == {(r, p) for p, r in part_rows.items()}
    assert sum(map(len, lists.parts)) == parts

    for kind, least, step in (("small", MIN_SMALL_PAGES, 1), ("large", MIN_LARGE_PAGES, grid.large_step)):
        shares = [sum(len(item[0]) for item in program) for program in lists.programs[kind]]
        used = [share for share in shares if share]
        assert shares[: len(used)] == used, "idle programs come last"
        assert all(abs(share - sum(used) / len(used)) < step for share in used), f"unequal shares {used}"
        assert len(used) == min(len(shares), -(-sum(used) // least)), "too many programs for the pages, or too few"
        tiles = len({item[4] for item in lists.items(kind)})
        assert len(lists.items(kind)) <= tiles + max(0, len(used) - 1), "cut where nothing asks for it"
    return lists


@settings(max_examples=150, deadline=None)
@given(batches(), GRIDS, st.none() | st.integers(0, 60))
def test_every_page_is_read_once_for_every_row(batch, grid, room):
    groups, max_rows = batch
    lists = check(groups, max_rows, grid, room)
    sinks = [NO_SINK] * max_rows
    for group in groups:
        for row in group.rows:
            sinks[row] = group.sink if group.sink != NO_SINK else sinks[row]
    assert lists.sinks == sinks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 20), GRIDS, st.integers(0, 30))
def test_groups_of_many_rows_go_to_large_tiles_and_are_expanded_while_there_is_room(rows, pages, grid, room):
    groups = [RowGroup(range(pages), range(rows)), RowGroup(range(pages, 2 * pages), range(rows))]
    lists = check(groups, rows, grid, room)
    many = -(-rows // grid.small_rows) > MAX_SMALL_TILES[grid.small_tile]
    direct = many and -(-rows // grid.large_rows) <= grid.direct_tiles
    fits = min(2, room // pages) if many and not direct else 0
    assert lists.expanded == list(range(fits * pages))
    large = 2 if direct or many and grid.direct_tiles else fits
    assert bool(lists.items("large")) == (large > 0) and bool(lists.items("small")) == (large < 2)
    assert {tuple(item[1]) for item in check(groups, rows, grid, None).items("large")} == (
        {tuple(range(a, min(a + grid.large_rows, rows))) for a in range(0, rows, grid.large_rows)} if many else set()
    )


@pytest.mark.parametrize("groups, rows", [
    ([], 0), ([], 7), ([RowGroup([], [0, 1])], 2), ([RowGroup([3], [])], 1), ([RowGroup([3], [0], 2)], 1), ([RowGroup([3], [4])], 5),
], ids=str)  # fmt: skip
def test_small_plans(groups, rows):
    for grid in (Grid(1, 1, 1), Grid(130, 30, 7)):
        check(groups, rows, grid, 10)


def test_large_plan():
    for group in (1, 7, 8):
        grid = Grid(264, 33, group)
        lists = check([RowGroup(range(600), range(300), 1), RowGroup(range(600, 1000), [5])], 310, grid, 1024)
        assert len(lists.expanded) == 600 and lists.sinks == [1] * 300 + [NO_SINK] * 10
        check([RowGroup(range(600), range(300), 1)], 300, grid, 599)


def test_flashinfer_lists_are_checked():
    layout, ints = get_format("hq4").layout(64), lambda *x: torch.tensor(x, dtype=torch.int32)
    shape = {"layout": layout, "q_heads": 4, "kv_heads": 2, "device": "cpu"}
    work = plan_pages(ints(0, 2, 3), ints(0, 2, 3), ints(7, 8, 9), ints(64, 64), **shape, sinks=[1, -1])
    lists = Lists(work.words.numpy(), 3, work.grid)
    assert {(tuple(i[0]), tuple(i[1]), i[3]) for i in lists.items("small")} == {((7, 8), (0, 1), 4), ((9,), (2,), 0)}
    with pytest.raises(ValueError, match="only whole pages"):
        plan_pages(ints(0, 2, 3), ints(0, 2, 3), ints(7, 8, 9), ints(64, 63), **shape)
    with pytest.raises(ValueError, match="no kernel|GPU kernel"):
        plan_pages(ints(0, 1), ints(0, 1), ints(7), ints(64), **shape | {"layout": get_format("K4tV4").layout(64)})
    with pytest.raises(ValueError, match="head_dim"):
        plan_pages(ints(0, 1), ints(0, 1), ints(7), ints(64), **shape | {"layout": get_format("hq4").layout(96)})


def test_few_rows_need_no_large_tiles_and_no_expanding():
    grid = Grid(40, 20, 7, 8, direct_tiles=4)
    assert grid.possible_tiles(0) == Tiles(False, False, False)
    assert grid.possible_tiles(4) == Tiles(True, False, False)
    assert grid.possible_tiles(72) == Tiles(True, True, False)
    assert grid.possible_tiles(73) == Tiles(True, True, True)
