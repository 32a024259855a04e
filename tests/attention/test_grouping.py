"""Groups and plans: every row reads every packed page of its own exactly once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sgl_hq.attention.grouping import group_rows
from sgl_hq.attention.plan import make_plan
from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.records import EMPTY_RUN, PackedRun, Segment


@st.composite
def batches(draw):
    """Runs of requests over a random tree of packed nodes."""
    nodes = [()]
    page = iter(range(10_000))
    for node_id in range(draw(st.integers(0, 8))):
        parent = draw(st.sampled_from(nodes))
        nodes.append((*parent, Segment(node_id, tuple(next(page) for _ in range(draw(st.integers(1, 4)))))))
    paths = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=10))
    return [PackedRun(path, sum(len(s.pages) for s in path) * PAGE_TOKENS) for path in paths]


@given(batches())
def test_each_row_and_page_pair_is_covered_once(runs):
    want = Counter((row, page) for row, run in enumerate(runs) for segment in run.segments for page in segment.pages)
    groups = group_rows(runs)
    assert Counter((row, page) for g in groups for row in g.rows for page in g.pages) == want
    assert max((n for n in Counter(p for g in groups for p in g.pages).values()), default=1) == 1, "a page is read twice"


@given(batches())
def test_rows_of_a_group_are_distinct_and_pages_in_sequence_order(runs):
    for group in group_rows(runs):
        assert len(set(group.rows)) == len(group.rows)
        for row in group.rows:
            own = [page for segment in runs[row].segments for page in segment.pages]
            start = own.index(group.pages[0])
            assert tuple(own[start : start + len(group.pages)]) == group.pages


def test_nodes_with_the_same_rows_join_one_group():
    a, b, c = Segment(0, (10,)), Segment(1, (11, 12)), Segment(2, (13,))
    runs = [PackedRun((a, b), 192), PackedRun((a, b, c), 256), EMPTY_RUN]
    assert [(g.pages, g.rows) for g in group_rows(runs)] == [((10, 11, 12), (0, 1)), ((13,), (1,))]


def test_plan_of_an_extend_batch_names_query_rows_and_dense_starts():
    shared = Segment(0, (5, 6))
    plan = make_plan([PackedRun((shared,), 128), EMPTY_RUN, PackedRun((shared,), 128)], [3, 2, 1], "cpu")
    (group,) = plan.groups
    assert (group.first_page, group.pages.tolist(), group.q_rows.tolist()) == (5, [5, 6], [0, 1, 2, 5])
    assert plan.dense_starts == (128, 0, 128)
    assert (plan.tokens_read, plan.tokens_attended) == (128, 256)


def test_no_plan_when_nothing_is_packed():
    assert make_plan([EMPTY_RUN, EMPTY_RUN], [1, 1], "cpu") is None
