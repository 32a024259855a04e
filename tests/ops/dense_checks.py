"""Decode attention over dense pages against float64, on a GPU or, with device "cpu", interpreted.

Slots that no token of a row has are NaN, the rest of a row's last page too; so are the parts before the kernel writes them, and lanes of
`req_to_token` that must not be read name no slot. How far a result may be off: grouped_tolerances.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import torch
from grouped_checks import Case, differs
from grouped_tolerances import BF16, SUM, Tokens, merged_error

from sgl_hq.kernels.grouped_attention import bench, bench_cases
from sgl_hq.kernels.grouped_attention.launcher import grouped_attention, merge
from sgl_hq.kernels.grouped_attention.launcher_dense import DenseWork, dense_attention, list_pages, make_dense_work, pages_of
from sgl_hq.page_format import PAGE_TOKENS, get_format

NO_SLOT = 2**30
SPARE = 2  # pages that nobody has


class DensePages:
    """Random K and V of one layer's pool, and rows that attend `lengths` dense tokens behind `starts` others."""

    def __init__(
        self, lengths: list[int], dim: int, *, kv_heads: int = 2, group: int = 2, device: str = "cpu", starts: list[int] | None = None,
        lanes: int | None = None, max_rows: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        """lanes: rows of q, the last ones are padding. max_rows: what buffers are for."""
        draw = torch.Generator().manual_seed(seed)
        self.lengths, self.device = lengths, torch.device(device)
        self.kv_heads, self.q_heads, self.scale = kv_heads, kv_heads * group, dim**-0.5
        self.lanes = len(lengths) if lanes is None else lanes
        padding = self.lanes - len(lengths)
        starts = [PAGE_TOKENS * (row % 3) for row in range(len(lengths))] if starts is None else starts
        counts = [pages_of(n) for n in lengths]
        place = torch.randperm(sum(counts) + SPARE, generator=draw)
        width = max([start + PAGE_TOKENS * n for start, n in zip(starts, counts, strict=True)], default=0) + 5
        table = torch.full((len(lengths) + 3, width), NO_SLOT, dtype=torch.int32)
        requests = torch.randperm(len(lengths) + 2, generator=draw)[: len(lengths)] + 1
        pool = torch.randn(2, len(place) * PAGE_TOKENS, kv_heads, dim, generator=draw)
        pool += torch.randn(2, 1, kv_heads, dim, generator=draw)
        pool = pool.bfloat16()
        self.slots, stale, at = [], torch.ones(pool.shape[1], dtype=torch.bool), 0
        for row, (n, count) in enumerate(zip(lengths, counts, strict=True)):
            slots = (place[at : at + count, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()[:n]
            table[requests[row], starts[row] : starts[row] + n] = slots.int()
            self.slots.append(slots.to(device))
            stale[slots] = False
            at += count
        pool[:, stale] = torch.nan
        self.k, self.v = pool.to(device)
        self.q = torch.randn(self.lanes, self.q_heads, dim, generator=draw).bfloat16().to(device)
        self.q[len(lengths) :] = torch.nan
        ends = [start + n for start, n in zip(starts, lengths, strict=True)]
        self.table = table.to(device)
        self.requests, self.ends, self.starts = (
            torch.tensor([*values, *[fill] * padding], dtype=torch.int64, device=device)
            for values, fill in ((requests, 0), (ends, 1), (starts, 0))
        )
        self.max_rows = self.lanes if max_rows is None else max_rows

    def work(self, programs: int | None = None) -> DenseWork:
        """Listed. programs: another number than that of the device."""
        pages = self.max_rows * pages_of(self.table.shape[1])
        work = make_dense_work(self.max_rows, pages, self.q_heads, self.kv_heads, self.k.shape[2], self.device)
        if programs is not None:
            rows = self.max_rows + programs
            parts = work.part_o.new_empty(rows, *work.part_o.shape[1:])
            bounds = work.bounds.new_zeros(programs + 1)
            work = replace(work, programs=programs, bounds=bounds, part_o=parts, part_lse=parts.new_empty(parts.shape[:2]))
        work.pages.fill_(-1)
        for parts in (work.part_o, work.part_lse):
            parts.fill_(torch.nan)
        self.list_pages(work)
        return work

    def list_pages(self, work: DenseWork) -> None:
        list_pages(work, self.table, self.requests, self.starts, self.ends, len(self.lengths))

    def shorten(self, lengths: list[int]) -> None:
        """From now on rows attend so many of their tokens; the rest is stale, as after an earlier request."""
        self.lengths, real = lengths, len(lengths)
        self.ends[:real] = self.starts[:real] + torch.tensor(lengths, device=self.device)

    def attend(self, work: DenseWork) -> None:
        dense_attention(self.q, self.k, self.v, work, self.scale)

    def reads(self) -> list[tuple[list[int], Tokens]]:
        """What rows read, and how exactly, for `merged_error`: K and V as they are, weights rounded to bfloat16."""
        out = []
        for row, n in enumerate(self.lengths):
            if not n:
                continue
            slots = self.slots[row][:n]
            k, v = (side[slots].transpose(0, 1).double() for side in (self.k, self.v))
            norm = v.norm(dim=-1)
            rounded = SUM * (k.shape[2] + 16) * 4 * k.abs().amax(1, keepdim=True)
            out.append(([row], Tokens(k, v, rounded.expand_as(k), BF16 * norm, 2 * norm)))
        return out


def joined(work: DenseWork, lanes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(o float32, log-sum-exp base 2) of the parts, in float64."""
    o = torch.zeros(lanes, *work.part_o.shape[1:], device=work.part_o.device)
    lse = torch.full(o.shape[:2], -torch.inf, device=o.device)
    for row, (begin, end) in enumerate(work.row_parts[:lanes].tolist()):
        if begin < end:
            parts, of_parts = work.part_o[begin:end].double(), work.part_lse[begin:end].double()
            total = of_parts.exp2().sum(0).log2()
            o[row] = ((of_parts - total).exp2()[..., None] * parts).sum(0).float()
            lse[row] = total.float()
    return o, lse


def check_lengths(lengths: list[int], dim: int, *, programs: int | None = None, **shape) -> None:
    case = DensePages(lengths, dim, **shape)
    work = case.work(programs)
    case.attend(work)
    real = len(lengths)
    o, lse, tolerance = merged_error(case.q[:real], case.reads(), None, case.scale, case.kv_heads)
    problem = differs(tuple(x[:real] for x in joined(work, case.lanes)), (o, lse, tolerance))
    assert problem is None, problem
    assert (work.row_parts[real : case.lanes, 0] == work.row_parts[real : case.lanes, 1]).all(), "padding has parts"


def merged(case: Case, dense: DensePages, work: DenseWork, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(o of `dtype`, log-sum-exp base 2) of the packed parts of `case`, whose q is attended, and the dense ones."""
    packed = case.work()
    grouped_attention(case.q, case.records, case.layout, packed, case.scale)
    dense_attention(case.q, dense.k, dense.v, work, case.scale)
    out = torch.full(case.q.shape, torch.nan, dtype=dtype, device=case.device)
    lse = torch.full(case.q.shape[:2], torch.nan, device=case.device)
    merge(case.q, packed, case.layout, case.scale, sinks=case.sink_slots, dense=work, out=out, out_lse=lse)
    return out, lse


def check_merge(
    name: str, reads: list, lengths: list[int], dim: int = 64, *, lanes: int | None = None, programs: int | None = None, **shape
) -> None:  # fmt: skip
    """Rows with packed pages, dense pages, both or none; programs: more make more parts of a row."""
    real, lanes = len(lengths), len(lengths) if lanes is None else lanes
    dense = DensePages(lengths, dim, lanes=lanes, **shape)
    case = Case(name, dim, reads, lanes, **shape)
    rows_of = [group.rows for group in case.groups]
    assert max((row for rows in rows_of for row in rows), default=0) < real
    case.q[real:] = torch.nan
    work = dense.work(programs)
    case.q, every = case.q[:real], case.q
    o, lse, tolerance = merged_error(case.q, [*case.reads(), *dense.reads()], None, case.scale, case.kv_heads)
    case.q = every
    for dtype in (torch.float32, torch.bfloat16):
        got = merged(case, dense, work, dtype)
        problem = differs(tuple(x[:real] for x in got), (o, lse, tolerance))
        assert problem is None, f"{name}: {problem}"
        assert not got[0][real:].any() and (got[1][real:] == -torch.inf).all(), "padding is not empty"


def check_growing(name: str, dim: int, capture: Callable[[Callable], Callable] = lambda forward: forward, **shape) -> None:
    """Decode steps over the buffers of one graph, rows growing and starting anew: bit for bit what fresh buffers give, and right.

    capture: makes a function that does again what its argument does, whatever the buffers hold by then.
    """
    longest, lanes = [1200, 70, 640, 3, 513, 64, 130], 9
    dense = DensePages(longest, dim, lanes=lanes, **shape)
    case = Case(name, dim, [([0, 2, 3], 3, True), ([6], 1, False)], lanes, **shape)
    case.q[len(longest) :] = torch.nan
    packed, work = case.work(), dense.work()
    out = torch.full(case.q.shape, torch.nan, dtype=torch.float32, device=case.device)
    lse = torch.full(case.q.shape[:2], torch.nan, device=case.device)

    def forward() -> None:
        grouped_attention(case.q, case.records, case.layout, packed, case.scale)
        dense_attention(case.q, dense.k, dense.v, work, case.scale)
        merge(case.q, packed, case.layout, case.scale, sinks=case.sink_slots, dense=work, out=out, out_lse=lse)

    replay = capture(forward)
    real = len(longest)
    for lengths in ([1] * real, [63, 1, 64, 2, 100, 5, 9], [64, 2, 65, 3, 101, 6, 10], [1, 70, 640, 0, 300, 64, 128], longest):
        dense.shorten(lengths)
        dense.list_pages(work)
        replay()
        got = out.clone(), lse.clone()
        fresh = merged(case, dense, dense.work())
        assert all(torch.equal(a, b) for a, b in zip(got, fresh, strict=True)), "another result than that of fresh buffers"
        assert not got[0][real:].any(), "padding is not empty"
        o, lse_nat, tolerance = merged_error(case.q[:real], [*case.reads(), *dense.reads()], None, case.scale, case.kv_heads)
        problem = differs(tuple(x[:real] for x in got), (o, lse_nat, tolerance))
        assert problem is None, problem


def check_mutations(dim: int, **shape) -> None:
    """What the tolerances must not forgive: a token more, a token less, another row's page."""
    for row, change in ((1, -1), (3, 1), (0, 64)):
        case = DensePages([130, 64, 200, 5], dim, **shape)
        case.k.nan_to_num_(0.0), case.v.nan_to_num_(0.0)
        want = merged_error(case.q, case.reads(), None, case.scale, case.kv_heads)
        if change == 64:
            case.table[case.requests[0], case.starts[0]] = case.table[case.requests[2], case.starts[2]]
        else:
            case.ends[row] += change
        work = case.work()
        case.attend(work)
        assert differs(joined(work, case.lanes), want), f"row {row} changed by {change}"


def check_plans(*, device: str = "cpu", rounds: int = 40) -> None:
    """Every page is read once, by programs in its order; parts are unique, a row's are neighbours, and all have room."""
    draw = torch.Generator().manual_seed(11)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=draw))

    for _ in range(rounds):
        longest, real, programs = (1, 70, 700, 5000)[pick(4)], pick(20), 1 + pick(50)
        lengths = [pick(longest + 1) for _ in range(real)]
        case = DensePages(lengths, 64, kv_heads=1, group=1, device=device, lanes=real + pick(4), max_rows=real + 4)
        work = case.work(programs)
        bounds, entries = work.bounds.tolist(), work.pages.tolist()
        wanted = [(row, slots[at : at + 64]) for row, slots in enumerate(case.slots) for at in range(0, len(slots), 64)]
        assert bounds[0] == 0 and bounds == sorted(bounds) and bounds[-1] == len(wanted)
        assert set(entries[len(wanted) :]) <= {-1}
        parts = defaultdict(list)
        for program in range(programs):
            for at in range(bounds[program], bounds[program + 1]):
                row, slots = wanted[at]
                ends = at + 1 == len(wanted) or wanted[at + 1][0] != row
                assert entries[at] == row << 33 | ends << 32 | int(slots[-1])
                if row + program not in parts[row]:
                    parts[row].append(row + program)
        used = [part for of_row in parts.values() for part in of_row]
        assert len(set(used)) == len(used) and max(used, default=0) < len(work.part_o)
        for row, (begin, end) in enumerate(work.row_parts[: case.lanes].tolist()):
            assert list(range(begin, end)) == parts[row]
        sizes = [b - a for a, b in zip(bounds, bounds[1:]) if b > a]
        assert not sizes or max(sizes) - min(sizes) <= 1


def check_bench(name: str) -> None:
    """Our arm of `sgl-hq bench kernels`, whose `dense` part alone must matter too."""
    bench.DEVICE = "cpu"
    tables = bench.Tables.scattered(bench_cases.Case("T", 4, 2, 128, 64, q_heads=4, kv_heads=2, head_dim=64))
    arm = bench.Grouped(tables, [bench.Layer(tables, seed) for seed in range(2)], get_format(name).layout(64))
    arm._side_stream = SimpleNamespace(fork=nullcontext, join=lambda: None)
    assert arm.error() < bench.TOLERANCE
    parts = arm.parts()
    assert list(parts) == ["total", "packed", "dense", "merge"]
    arm._dense.part_lse.fill_(-1e30)
    parts["merge"][0]()
    assert bench.error_of(tables, arm.layers[0], arm.outs[0], arm.packed[0].unpack) > 5 * bench.TOLERANCE
    for part in ("packed", "dense", "merge"):
        parts[part][0]()
    assert bench.error_of(tables, arm.layers[0], arm.outs[0], arm.packed[0].unpack) < bench.TOLERANCE
