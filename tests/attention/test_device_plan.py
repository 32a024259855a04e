"""The plan of a forward: each level of sharing once, uploads only when something changed, graph buffers that never move."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from sgl_hq.attention.device_plan import DevicePlan
from sgl_hq.kernels.grouped_attention.launcher import WorkOverflow
from sgl_hq.kernels.grouped_attention.work import NO_SINK
from sgl_hq.page_format import get_format
from sgl_hq.pool.sizing import KVShape, TierSizes
from sgl_hq.records import EMPTY_RUN, PackedRun, Segment
from work_lists import Lists

KV_HEADS, Q_HEADS, MAX_ROWS, ROW_TOKENS = 2, 4, 12, 640


def plan_of(graph: bool, name: str = "hq4", pages: int = 80, max_rows: int = MAX_ROWS) -> DevicePlan:
    tier = SimpleNamespace(
        codecs=[SimpleNamespace(layout=get_format(name).layout(64))], records=[torch.empty(0)],
        shape=KVShape(1, KV_HEADS, 64, 64), sizes=TierSizes(0, pages, 2), sink_slot=lambda page: 1 if page == 0 else NO_SINK,
    )  # fmt: skip
    return DevicePlan(tier, Q_HEADS, max_rows, ROW_TOKENS, graph=graph)


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


MANY = [run_of(ROOT)], [40]  # more than Grid.most_small_rows


@pytest.mark.parametrize(
    "batch, tiles",
    [
        pytest.param((BATCH, [1] * 5), (True, False, False), id="few rows"),
        pytest.param(MANY, (False, True, True), id="many rows"),
        pytest.param((BATCH + MANY[0], [1] * 5 + [40]), (True, True, True), id="both"),
        pytest.param(([], []), (False, False, False), id="nothing"),
    ],
)
def test_eager_forwards_launch_what_has_work_and_graphs_everything(batch, tiles):
    eager, graph = plan_of(False, max_rows=64), plan_of(True, max_rows=64)
    assert eager.work.tiles == (False, False, False)
    for _ in range(2):  # the second time nothing is uploaded
        eager.set(*batch)
        graph.set(*batch)
        assert eager.work.tiles == tiles and graph.work.tiles == (True, True, True)


def test_dense_pages_have_room_in_a_graph_and_make_it_in_eager_forwards(monkeypatch):
    """The kernel that lists them: tests/ops/test_dense_attention.py, and the whole path: test_gpu_decode_path.py."""
    from sgl_hq.attention import device_plan

    listed = []
    monkeypatch.setattr(device_plan, "list_pages", lambda *arguments: listed.append(arguments))
    table, rows = torch.zeros(20, ROW_TOKENS, dtype=torch.int32), torch.zeros(MAX_ROWS + 1, dtype=torch.int64)
    graph, eager = plan_of(True), plan_of(False)
    dense, held = graph.dense, eager.nbytes
    assert dense.max_rows == MAX_ROWS and dense.max_pages == 10 * MAX_ROWS and eager.dense.max_rows == 0
    graph.list_dense_pages(table, rows[1:], rows[1:], rows[1:], 3)
    eager.list_dense_pages(table, rows, rows, rows, 13)
    assert graph.dense is dense and eager.dense.max_rows == MAX_ROWS + 1 and eager.nbytes > held
    grown = eager.dense
    eager.list_dense_pages(table, rows[1:], rows[1:], rows[1:], 3)
    assert eager.dense is grown, "it does not shrink"
    assert [arguments[0] for arguments in listed] == [dense, grown, grown] and [arguments[-1] for arguments in listed] == [3, 13, 3]


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
