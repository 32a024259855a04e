"""Work lists and device plans, on the host: every page of a group is read once for each of its rows, by equal shares."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_hq.attention.device_plan import DevicePlan
from sgl_hq.kernels.grouped_attention.launcher import WorkOverflow, plan_pages
from sgl_hq.kernels.grouped_attention.work import (
    ITEM_WORDS, LARGE_ROWS, LARGE_STEP, MAX_SMALL_TILES, MIN_LARGE_PAGES, MIN_SMALL_PAGES, NO_SINK, SMALL_ROWS, Grid, RowGroup, lay_out,
)  # fmt: skip
from sgl_hq.page_format import get_format
from sgl_hq.pool.sizing import KVShape, TierSizes
from sgl_hq.records import EMPTY_RUN, PackedRun, Segment

SINK_TOKENS = 4
GRIDS = st.builds(Grid, st.integers(1, 40), st.integers(1, 20), st.sampled_from([1, 2, 3, 4, 7, 8, 16]))


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


class Lists:
    """The buffer as the kernels walk it. `programs[kind][program]` are items (pages, rows, part, skip, where of their pages)."""

    def __init__(self, words: np.ndarray, max_rows: int, grid: Grid) -> None:
        small, large, expand, rows, sinks = grid.sections(max_rows)
        assert words.dtype == np.int32 and small == 0
        self.parts = [words[words[rows + r] : words[rows + r + 1]].tolist() for r in range(max_rows)]
        assert words[rows + max_rows] == len(words), "the lists of parts end the buffer"
        self.sinks = words[sinks : grid.header_words(max_rows)].tolist()
        at, count = words[expand : expand + 2]
        self.expanded = words[at : at + count].tolist()
        self.programs = {
            kind: [
                [self._item(words, at) for at in range(words[start + p], words[start + p + 1], ITEM_WORDS)]
                for p in range(programs)
            ]
            for kind, start, programs in (("small", small, grid.small), ("large", large, grid.large))
        }

    @staticmethod
    def _item(words: np.ndarray, at: int) -> tuple[list[int], list[int], int, int, int]:
        pages, n_pages, rows, n_rows, part, skip, *unused = words[at : at + ITEM_WORDS].tolist()
        assert n_pages > 0 and n_rows > 0 and unused == [0, 0]
        return words[pages : pages + n_pages].tolist(), words[rows : rows + n_rows].tolist(), part, skip, rows

    def items(self, kind: str) -> list:
        return [item for program in self.programs[kind] for item in program]


def check(groups: list[RowGroup], max_rows: int, grid: Grid, room: int | None) -> Lists:
    words, parts = lay_out(groups, max_rows, grid, SINK_TOKENS, room)
    lists = Lists(words, max_rows, grid)
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
            if kind == "large" and room is not None:
                pages = [lists.expanded[page] for page in pages]
            assert len(rows) <= most and len(rows) * grid.group <= (SMALL_ROWS if kind == "small" else LARGE_ROWS)
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

    for kind, least, step in (("small", MIN_SMALL_PAGES, 1), ("large", MIN_LARGE_PAGES, LARGE_STEP)):
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
def test_groups_of_many_rows_go_to_large_tiles_while_there_is_room(rows, pages, grid, room):
    groups = [RowGroup(range(pages), range(rows)), RowGroup(range(pages, 2 * pages), range(rows))]
    lists = check(groups, rows, grid, room)
    many = -(-rows // grid.small_rows) > MAX_SMALL_TILES
    fits = min(2, room // pages) if many else 0
    assert lists.expanded == list(range(fits * pages))
    assert bool(lists.items("large")) == (fits > 0) and bool(lists.items("small")) == (fits < 2)
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


# ---- sgl_hq/attention/device_plan.py --------------------------------------------------------------------------------

KV_HEADS, Q_HEADS, MAX_ROWS = 2, 4, 12


def plan_of(graph: bool, name: str = "hq4", pages: int = 80, max_rows: int = MAX_ROWS) -> DevicePlan:
    tier = SimpleNamespace(
        codecs=[SimpleNamespace(layout=get_format(name).layout(64))], records=[torch.empty(0)],
        shape=KVShape(1, KV_HEADS, 64, 64), sizes=TierSizes(0, pages, 2), sink_slot=lambda page: 1 if page == 0 else NO_SINK,
    )  # fmt: skip
    return DevicePlan(tier, Q_HEADS, max_rows, graph)


def run_of(*segments: tuple[int, range]) -> PackedRun:
    return PackedRun(tuple(Segment(node, tuple(pages)) for node, pages in segments), 64 * sum(len(p) for _, p in segments))


ROOT, LEFT, RIGHT = (0, range(3)), (1, range(3, 5)), (2, range(5, 9))
BATCH = [run_of(ROOT), run_of(ROOT, LEFT), EMPTY_RUN, run_of(ROOT, RIGHT), run_of(ROOT, LEFT)]


def uploads(plan: DevicePlan, monkeypatch) -> list[int]:
    sizes, upload = [], plan._upload
    monkeypatch.setattr(plan, "_upload", lambda words: (sizes.append(len(words)), upload(words)))
    return sizes


@pytest.mark.parametrize("graph", [True, False])
def test_a_plan_reads_each_level_once_and_tells_how_much(graph):
    plan = plan_of(graph)
    plan.set(BATCH, [1, 2, 1, 1, 1])
    assert plan.tokens_read == 64 * 9 and plan.tokens_attended == 64 * (4 * 3 + 2 * 2 + 4)
    words = plan.work.words.numpy()
    end = words[plan.work.grid.sections(plan.work.max_rows)[3] + plan.work.max_rows]
    lists = Lists(words[:end], plan.work.max_rows, plan.work.grid)
    read = Counter((row, page) for pages, rows, *_ in lists.items("small") for row in rows for page in pages)
    left, right = [*range(5)], [0, 1, 2, 5, 6, 7, 8]
    rows = {0: [0, 1, 2], 1: left, 2: left, 3: [], 4: right, 5: left}  # request 1 has two query rows
    assert read == Counter((row, page) for row, pages in rows.items() for page in pages)
    assert lists.sinks[:6] == [1, 1, 1, NO_SINK, 1, 1] and set(lists.sinks[6:]) == {NO_SINK}
    plan.set([], [])
    assert plan.tokens_read == plan.tokens_attended == 0


def test_the_same_batch_again_uploads_nothing(monkeypatch):
    plan = plan_of(True)
    sizes = uploads(plan, monkeypatch)
    plan.set(BATCH, [1] * 5)
    plan.set(tuple(BATCH), (1,) * 5)
    assert len(sizes) == 1
    plan.set(BATCH, [1, 1, 1, 1, 2])
    plan.set(BATCH[::-1], [1] * 5)
    plan.set(BATCH, [1] * 5)
    assert len(sizes) == 4


def test_buffers_of_a_graph_never_move():
    plan = plan_of(True)
    work, where = plan.work, [x.data_ptr() for x in (plan.work.words, plan.work.part_o, plan.work.part_lse, plan.work.scratch)]
    held = plan.nbytes
    for lens in ([1] * 5, [2, 1, 3, 1, 1], [0, 0, 0, 0, 0], [8, 1, 1, 1, 1]):
        plan.set(BATCH, lens)
        assert plan.work is work and plan.nbytes == held
        assert [x.data_ptr() for x in (work.words, work.part_o, work.part_lse, work.scratch)] == where


def test_an_eager_plan_grows():
    plan = plan_of(False)
    plan.set([run_of(ROOT)] * 2, [200, 100])
    assert plan.work.max_rows >= 300 and plan.tokens_attended == 64 * 3 * 2
    plan.set(BATCH, [1] * 5)
    assert plan.work.max_rows >= 300, "it does not shrink"


def test_a_graph_without_room_says_so(monkeypatch):
    """Request i reads i + 1 levels, so levels have rows of their own: more parts than LEVELS for each row."""
    rows = 48
    plan = plan_of(True, max_rows=rows)
    sizes = uploads(plan, monkeypatch)
    deep = [run_of(*((i, range(i, i + 1)) for i in range(row + 1))) for row in range(rows)]
    room = len(plan.work.part_o)
    assert rows * (rows + 1) // 2 > room
    assert not plan.prepare(deep, [1] * rows)
    with pytest.raises(WorkOverflow, match=rf"parts; a decode graph has room for {room}"):
        plan.set(deep, [1] * rows)
    with pytest.raises(WorkOverflow):
        plan.set([run_of(ROOT)], [rows + 1])
    assert not sizes, "nothing of what does not fit is uploaded"
    assert plan.prepare(deep[:20], [1] * 20)
    plan.set(deep[:20], [1] * 20)
    assert len(sizes) == 1 and plan.tokens_read == 64 * 20 and plan.tokens_attended == 64 * 20 * 21 // 2
    eager = plan_of(False, max_rows=1)
    assert eager.prepare(deep, [1] * rows)
    eager.set(deep, [1] * rows)
    assert eager.tokens_attended == 64 * rows * (rows + 1) // 2


def test_what_was_prepared_is_uploaded_once(monkeypatch):
    plan = plan_of(True)
    sizes = uploads(plan, monkeypatch)
    assert plan.prepare(BATCH, [1] * 5) and not sizes
    plan.set(BATCH, [1] * 5)
    assert plan.prepare(BATCH, [1] * 5) and len(sizes) == 1
    assert plan.prepare([], [])
    plan.set(BATCH, [1] * 5)  # prepared again: the plan keeps one batch
    assert len(sizes) == 2
