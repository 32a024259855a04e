"""The grouped kernels on a GPU against float64 attention over the unpacked pages, and what serving relies on: graphs replay what
eager forwards compute, bit for bit, and nothing waits for the GPU.

`test_small_*` fit compute-sanitizer (`launch/sanitize.sh`).
"""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import dense_checks
import grouped_checks as checks
from grouped_checks import Case, Dense

from sgl_hq.attention.device_plan import DevicePlan
from sgl_hq.attention.grouping import group_rows
from sgl_hq.kernels.grouped_attention.launcher import grouped_attention, merge, plan_pages
from sgl_hq.kernels.grouped_attention.work import NO_SINK, RowGroup
from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.pool.sizing import KVShape, TierSizes
from sgl_hq.records import EMPTY_RUN, PackedRun, Segment

pytestmark = pytest.mark.gpu

FORMATS = ["bf16", "lossless", "int8", "hq7", "hq6", "hq5", "hq4", "hq3", "hq2", "K8V7", "sink3-K7V2", "sink50-K4V4"]
SMALL_FORMATS = [("bf16", 1), ("lossless", 2), ("int8", 4), ("hq5", 8), ("hq3", 3)]  # with query heads of a kv head
# Kernels are compiled for the number of kv heads, and those of pages that are expanded for `max_rows`: one of each here.
KV_HEADS, MAX_ROWS = 4, 300
REAL = {"kv_heads": KV_HEADS, "group": 7, "device": "cuda", "max_rows": MAX_ROWS}
SMALL = {"kv_heads": KV_HEADS, "device": "cuda", "max_rows": MAX_ROWS}


def compile_all(cases: list[tuple[str, int, dict]]) -> None:
    """Triton compiles when a kernel is launched: all at once, in threads."""

    def launch(case: tuple[str, int, dict]) -> None:
        name, dim, shape = case
        tiny = Case(name, dim, [(range(50), 1, True), ([50], 1, False)], MAX_ROWS if dim == 128 else checks.MIXED_ROWS, **shape)
        tiny.run(dense=tiny.dense(base2=True, strided=True))
        tiny.run() if dim == 64 else None

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(launch, cases))
    torch.cuda.synchronize()


@pytest.fixture(scope="module")
def compiled():
    compile_all([(name, 128, REAL) for name in FORMATS])


@pytest.fixture(scope="module")
def small_compiled():
    compile_all([(name, 64, SMALL | {"group": group}) for name, group in SMALL_FORMATS])


@pytest.mark.parametrize("fmt, group", SMALL_FORMATS)
def test_small_formats(small_compiled, fmt, group):
    checks.check_format(fmt, 64, **SMALL, group=group)


@pytest.mark.parametrize("fmt, group", SMALL_FORMATS)
def test_small_padding(small_compiled, fmt, group):
    checks.check_padding(fmt, 64, **SMALL, group=group)


@pytest.mark.parametrize("dim", [64, 128])
def test_lossless_escapes(dim):
    checks.check_escapes(dim, device="cuda", kv_heads=1)


@pytest.mark.parametrize("fmt", FORMATS)
def test_formats(compiled, fmt):
    """Levels: one shared by all rows, ragged ones of 1 to 40 rows, requests alone; the last 90 rows have nothing packed."""
    reads = [(range(210), 20, True), (range(20, 60), 7, False), (range(100, 103), 33, False), ([5], 17, False),
             ([150, 190, 209], 1, False), (range(25, 40), 3, False), ([30], 5, False)]  # fmt: skip
    case = Case(fmt, 128, reads, MAX_ROWS, **REAL)
    checks.check(case, case.dense(base2=True, strided=True))


@pytest.mark.parametrize("fmt", ["bf16", "lossless", "int8", "hq4"])
@pytest.mark.parametrize("rows, pages", [(1, 600), (6, 129), (7, 1), (300, 600)])
def test_rows_and_pages(compiled, fmt, rows, pages):
    """A group of one kind of tile alone, over every program of the grid."""
    case = Case(fmt, 128, [(range(rows), pages, True)], MAX_ROWS, **REAL)
    checks.check(case, case.dense(base2=True, strided=True))


@pytest.mark.parametrize("fmt", ["bf16", "lossless", "int8", "hq4"])
def test_own_prefixes(compiled, fmt):
    """40 rows with pages of their own: small tiles of one row, items cut anywhere."""
    case = Case(fmt, 128, [([row], 1 + row % 23, True) for row in range(40)], MAX_ROWS, **REAL)
    checks.check(case, case.dense(base2=True, strided=True))


@pytest.mark.parametrize("fmt", ["bf16", "hq4"])
def test_padding(compiled, fmt):
    case = Case(fmt, 128, [(range(30), 9, True), ([3, 4], 5, False)], MAX_ROWS, **REAL)
    dense = case.dense(base2=True, strided=True)
    before = [x[:30] for x in case.run(dense=dense)]
    for lanes in (case.q, dense.o, dense.lse):
        lanes[30:] = torch.nan
    assert all(torch.equal(a, b[:30]) for a, b in zip(before, case.run(dense=dense), strict=True))


class Served:
    """A tier with a radix tree of 3 roots, 6 nodes below them and 12 leaves, and batches of requests on its nodes."""

    def __init__(self, name: str) -> None:
        self.draw = random.Random(3)
        pages = [self.draw.choice([1, 2, 5, 20]) for _ in range(21)]
        self.case = Case(name, 128, [([], n, node < 3) for node, n in enumerate(pages)], MAX_ROWS, **REAL)
        self.right_q = self.case.q.clone()
        parents = [None] * 3 + [node // 2 for node in range(6)] + [3 + leaf // 2 for leaf in range(12)]
        self.runs = [EMPTY_RUN]
        for node, parent in enumerate(parents):
            above = () if parent is None else self.runs[parent + 1].segments
            path = (*above, Segment(node, tuple(self.case.groups[node].pages.tolist())))
            self.runs.append(PackedRun(path, PAGE_TOKENS * sum(len(segment.pages) for segment in path)))
        self.sink_of = {int(group.pages[0]): group.sink for group in self.case.groups if group.sink != NO_SINK}
        tier = SimpleNamespace(
            codecs=[self.case.codec], records=[self.case.records], shape=KVShape(1, KV_HEADS, 128, 128),
            sizes=TierSizes(0, len(self.case.records), 3), sink_slot=lambda page: self.sink_of.get(page, NO_SINK),
        )  # fmt: skip
        self.graph_plan = DevicePlan(tier, self.case.q_heads, MAX_ROWS, graph=True)
        self.eager_plan = DevicePlan(tier, self.case.q_heads, MAX_ROWS, graph=False)
        self.dense = self.case.dense(base2=False, strided=True)
        self.right_lse = self.dense.lse.clone()
        self.out, self.lse = torch.empty_like(self.case.q, dtype=torch.float32), self.dense.lse.contiguous()

    def batch(self) -> list[PackedRun]:
        """Decode of up to MAX_ROWS requests; what pads it is NaN."""
        crowd = self.draw.sample(self.runs, self.draw.choice([1, 3, 8]))
        runs = [self.draw.choice(crowd) for _ in range(self.draw.choice([1, 2, 7, 64, 256, MAX_ROWS]))]
        self.case.q.copy_(self.right_q)
        self.dense.lse.copy_(self.right_lse)
        self.case.q[len(runs) :], self.dense.lse[len(runs) :] = torch.nan, torch.nan
        return runs

    def forward(self, plan: DevicePlan) -> None:
        case = self.case
        grouped_attention(case.q, case.records, case.layout, plan.work, case.scale)
        merge(case.q, plan.work, case.layout, case.scale, sinks=case.sink_slots, dense_o=self.dense.o, dense_lse=self.dense.lse,
              base2=False, out=self.out, out_lse=self.lse)  # fmt: skip

    def results(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.out[:rows].clone(), self.lse[:rows].clone()


@pytest.mark.parametrize("fmt", ["bf16", "lossless", "hq4"])
def test_graphs_replay_what_eager_forwards_compute(compiled, fmt):
    served = Served(fmt)
    served.forward(served.graph_plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        served.forward(served.graph_plan)
    for _ in range(20):
        runs = served.batch()
        lens = [1] * len(runs)
        served.graph_plan.set(runs, lens)
        graph.replay()
        replayed = served.results(len(runs))
        served.eager_plan.set(runs, lens)
        served.forward(served.eager_plan)
        assert all(torch.equal(a, b) for a, b in zip(replayed, served.results(len(runs)), strict=True))
        assert served.graph_plan.tokens_attended == sum(run.tokens for run in runs)
        groups = group_rows(runs)
        served.case.groups = [RowGroup(g.pages, list(g.rows), served.sink_of.get(g.pages[0], NO_SINK)) for g in groups]
        want_o, want_lse, tolerance = served.case.expected(Dense(served.dense.o, served.dense.lse, base2=False))
        shorter = checks.Tolerance(tolerance.o[: len(runs)], tolerance.lse[: len(runs)])
        problem = checks.differs(replayed, (want_o[: len(runs)], want_lse[: len(runs)], shorter))
        assert problem is None, problem


def test_nothing_waits_for_the_gpu(compiled):
    served = Served("hq4")
    batches = [served.batch() for _ in range(3)]
    served.forward(served.graph_plan)
    dense = dense_checks.DensePages([100, 700, 64], 128, device="cuda", kv_heads=KV_HEADS, group=7)
    work = dense.work()
    dense.attend(work)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for runs in batches:
            served.graph_plan.set(runs, [1] * len(runs))
            served.forward(served.graph_plan)
            dense.list_pages(work)
            dense.attend(work)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_small_dense_pages():
    for group in (1, 8, 9):
        dense_checks.check_lengths([0, 1, 63, 64, 65, 400], 64, device="cuda", kv_heads=2, group=group, lanes=8)


def test_small_dense_plans():
    dense_checks.check_plans(device="cuda", rounds=3)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 7, 8, 16])
def test_dense_pages(dim, group):
    """Rows alone, rows over many programs, and more rows than programs."""
    for lengths in ([1], [20_000], [0, 1, 63, 64, 65, 400, 5000], [(37 * row) % 900 for row in range(MAX_ROWS)]):
        dense_checks.check_lengths(lengths, dim, device="cuda", kv_heads=KV_HEADS, group=group)


def test_dense_plans():
    dense_checks.check_plans(device="cuda")


@pytest.mark.parametrize("fmt", ["bf16", "hq4"])
def test_packed_and_dense_pages(compiled, fmt):
    reads = [(range(210), 20, True), (range(20, 60), 7, False), ([5], 17, False)]
    shape = {"kv_heads": KV_HEADS, "group": 7, "device": "cuda"}
    dense_checks.check_merge(fmt, reads, [(53 * row) % 700 for row in range(290)], 128, lanes=MAX_ROWS, **shape)


@pytest.mark.parametrize("fmt", ["bf16", "hq4"])
def test_graphs_replay_growing_dense_rows(compiled, fmt):
    def capture(forward):
        forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        return graph.replay

    dense_checks.check_growing(fmt, 128, capture, device="cuda", kv_heads=KV_HEADS, group=7)


@pytest.mark.parametrize("fmt", ["bf16", "hq4"])
def test_flashinfer_merges_our_state_with_its_own(compiled, fmt):
    """Plan from FlashInfer's paged layout; the dense rest of every request by FlashInfer, base 2 on both sides."""
    flashinfer = pytest.importorskip("flashinfer", reason="FlashInfer is not installed")
    counts, pages = [1, 2, 5, 30, 12, 250], [3, 0, 8, 2, 40, 7]
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    reads = [(range(starts[i], starts[i + 1]), n, True) for i, n in enumerate(pages)]
    case = Case(fmt, 128, reads, MAX_ROWS, **REAL)

    def ints(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    listed = ints([page for group in case.groups for page in group.pages.tolist()])
    kv_starts, full = ints([sum(pages[:i]) for i in range(len(pages) + 1)]), ints([PAGE_TOKENS] * len(pages))
    work = plan_pages(
        ints(starts), kv_starts, listed, full, layout=case.layout, q_heads=case.q_heads, kv_heads=KV_HEADS, device="cuda",
        sinks=[group.sink for group in case.groups],
    )  # fmt: skip
    ours = case.run(work, dtype=torch.bfloat16)
    assert checks.differs(ours, case.expected()) is None

    draw = torch.Generator().manual_seed(1)
    k, v = (torch.randn(len(counts), PAGE_TOKENS, KV_HEADS, 128, generator=draw).bfloat16().cuda() for _ in range(2))
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), "NHD", backend="fa2")
    one_page = ints(range(len(counts) + 1)).cuda()
    wrapper.plan(ints(starts).cuda(), one_page, one_page[:-1], ints([50] * len(counts)).cuda(), case.q_heads, KV_HEADS, 128, PAGE_TOKENS,
                 causal=False, sm_scale=case.scale, q_data_type=torch.bfloat16)  # fmt: skip
    theirs = wrapper.run(case.q, (k, v), return_lse=True)
    o, lse, tolerance = case.expected(Dense(*theirs, base2=True))
    tolerance.o += 2.0**-8 * ours[0].double().norm(dim=-1)  # ours was rounded to bfloat16 before
    problem = checks.differs(flashinfer.merge_state(*ours, *theirs), (o, lse, tolerance))
    assert problem is None, problem
