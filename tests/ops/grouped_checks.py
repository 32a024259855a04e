"""Grouped attention against float64 attention over what PageCodec unpacks, on a GPU or, with device "cpu", interpreted.

Spare pages and spare sink slots hold 0xFF bytes (NaN as bfloat16), so do the parts before the kernels write them: what is
read without being asked for shows. How far a result may be off: grouped_tolerances.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from grouped_tolerances import Reader, Tokens, Tolerance, merged_error, read_error

from sgl_hq.kernels.grouped_attention.launcher import SCRATCH_PAGES, Work, grouped_attention, make_grid, make_work, merge
from sgl_hq.kernels.grouped_attention.work import NO_SINK, RowGroup, tiles_of
from sgl_hq.kernels.page_codec import PageCodec
from sgl_hq.page_format import PAGE_TOKENS, get_format

SPARE = 3  # pages and sink slots that nobody asks for
Read = tuple[range | list[int], int, bool]  # rows, number of pages, the pages begin a sequence

# Rows in no group, a row alone, levels that share rows, and a level of too many rows for small tiles.
SMALL_BATCH: list[Read] = [(range(1, 4), 2, True), ([1, 3], 1, False), ([5], 1, True), ([3], 1, False), ([6], 0, False)]
MIXED_BATCH: list[Read] = [(range(0, 52), 3, True), (range(8, 20), 2, False), ([9], 1, False), ([53], 1, True)]
SMALL_ROWS, MIXED_ROWS = 7, 54


@dataclass
class Dense:
    """State of the dense rest: o `[rows, q_heads, D]`, lse `[rows, q_heads] float32` (any strides), natural or base 2."""

    o: torch.Tensor
    lse: torch.Tensor
    base2: bool


class Case:
    """Random pages of one layer in a scattered arena, queries, and the groups that read them.

    K has an offset of its own per channel and V a mean, as models do; the first tokens of a sequence stand out of
    their page. A lossless page has escapes on both sides, more than 16 (the kernel's batch) in K.
    """

    def __init__(
        self, name: str, dim: int, reads: list[Read], rows: int, *, kv_heads: int = 2, group: int = 2, device: str = "cpu",
        max_rows: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.codec = PageCodec(get_format(name), dim)
        self.layout, self.device, self.rows = self.codec.layout, torch.device(device), rows
        self.kv_heads, self.group, self.q_heads = kv_heads, group, kv_heads * group
        self.scale, self.max_rows = dim**-0.5, rows if max_rows is None else max_rows
        draw = torch.Generator().manual_seed(seed)
        pages, slots = sum(n for _, n, _ in reads), sum(begins for _, _, begins in reads)
        k, v = (self._dense_pages(pages, dim, mean, draw).to(device) for mean in (1.0, 0.5))
        place = torch.randperm(pages + SPARE, generator=draw)[:pages]
        self.records = torch.full((pages + SPARE, kv_heads, self.layout.record_bytes), 255, dtype=torch.uint8, device=device)
        self.sinks = torch.full((slots + SPARE, kv_heads, self.layout.sink_bytes), 255, dtype=torch.uint8, device=device)
        slot = iter(torch.randperm(slots + SPARE, generator=draw).tolist())
        self.groups: list[RowGroup] = []
        at = 0
        for group_rows, n, begins in reads:
            sinkful = begins and n > 0 and self.layout.fmt.sink_tokens > 0
            records, sink = self.codec.pack(k[at : at + n], v[at : at + n], first_has_sink=sinkful)
            self.records[place[at : at + n].to(device)] = records
            self.groups.append(RowGroup(place[at : at + n].numpy(), list(group_rows), next(slot) if sinkful else NO_SINK))
            if sinkful:
                self.sinks[self.groups[-1].sink] = sink
            at += n
        self.q = self._queries(draw).bfloat16().to(device)

    def _dense_pages(self, pages: int, dim: int, mean: float, draw: torch.Generator) -> torch.Tensor:
        x = torch.randn(pages, PAGE_TOKENS, self.kv_heads, dim, generator=draw)
        x += mean * torch.randn(self.kv_heads, dim, generator=draw)
        if self.layout.fmt.kind == "lossless":
            x[:, :: 3 if mean == 1.0 else 10, :, 5] *= 2.0**-30
            x[:, 4, :, 5] = 0.0
        elif self.layout.fmt.sink_tokens:
            x[:, : self.layout.fmt.sink_tokens] *= 2.0
        return x.bfloat16()

    def _queries(self, draw: torch.Generator) -> torch.Tensor:
        return torch.randn(self.rows, self.q_heads, self.layout.head_dim, generator=draw)

    def dense(self, base2: bool, strided: bool) -> Dense:
        """A state that weighs about as much as the pages; every third row has no dense token, and NaN in its place."""
        draw = torch.Generator().manual_seed(7)
        o = torch.randn(self.q.shape, generator=draw).bfloat16()
        lse = torch.randn(self.q_heads, self.rows, generator=draw) + 6.0
        o[::3], lse[:, ::3] = torch.nan, -torch.inf
        lse = lse.to(self.device).T  # SGLang's is [heads, rows]
        return Dense(o.to(self.device), lse if strided else lse.contiguous(), base2)

    def work(self) -> Work:
        work = make_work(self.groups, self.max_rows, self.layout, self.q_heads, self.kv_heads, self.device)
        for poisoned in (work.part_o, work.part_lse, work.scratch):
            poisoned.view(torch.uint8).fill_(255)
        return work

    def run(
        self, work: Work | None = None, dense: Dense | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(o of `dtype`, log-sum-exp base 2) of the kernels."""
        work = self.work() if work is None else work
        grouped_attention(self.q, self.records, self.layout, work, self.scale)
        out = torch.full(self.q.shape, torch.nan, dtype=dtype, device=self.device)
        lse = torch.full(self.q.shape[:2], torch.nan, device=self.device)
        state = {} if dense is None else {"dense_o": dense.o, "dense_lse": dense.lse, "base2": dense.base2}
        merge(self.q, work, self.layout, self.scale, sinks=self.sink_slots, out=out, out_lse=lse, **state)
        return out, lse

    @property
    def sink_slots(self) -> torch.Tensor | None:
        return self.sinks if self.layout.fmt.sink_tokens else None

    def reader(self, group: RowGroup) -> Reader:
        """Which kernel reads a group."""
        grid = make_grid(self.layout, self.group * self.kv_heads, self.kv_heads, self.device)
        return Reader.SMALL if len(group.rows) <= grid.most_small_rows else Reader.LARGE

    def expected(self, dense: Dense | None = None, rounded_pages: bool = True) -> tuple[torch.Tensor, torch.Tensor, Tolerance]:
        """(o, natural log-sum-exp, tolerance), float64. rounded_pages: pages read by large tiles are what the kernel
        documents, rounded to bfloat16 (V in its rotated space); else as unpacked, and the rounding is tolerated."""
        state = None
        if dense is not None:
            state = dense.o.double(), dense.lse.double() * (torch.log(torch.tensor(2.0)).item() if dense.base2 else 1.0)
        return merged_error(self.q, self.reads(rounded_pages), state, self.scale, self.kv_heads)

    def reads(self, rounded_pages: bool = True) -> list[tuple[list[int], Tokens]]:
        """What each group reads, for `merged_error`."""
        reads = []
        assert sum(len(g.pages) for g in self.groups if self.reader(g) is Reader.LARGE) <= SCRATCH_PAGES
        for group in self.groups:
            if not len(group.pages):
                continue
            records = self.records[torch.as_tensor(group.pages, device=self.device).long()]
            sink = None if group.sink == NO_SINK else self.sinks[group.sink]
            reads.append((group.rows, read_error(self.codec, records, sink, self.reader(group), rounded_pages)))
        return reads


class EscapeCase(Case):
    """Lossless pages whose scores and outputs come from escapes: page 0 has as many as a page can list, page 1 none, page 2 one
    of K and one of V.

    Queries ask for channel 0 of K only. It is tiny, and its base is another channel's, so a token whose value there is
    an escape has a score around 0, and every other one a score below -16. V is about 2**-13 or, in channels 2 and D - 1, an
    escape, but for the last token, which has the base and no weight.
    """

    def __init__(self, dim: int, reads: list[Read], rows: int, **shape) -> None:
        super().__init__("lossless", dim, reads, rows, **shape)

    def _dense_pages(self, pages: int, dim: int, mean: float, draw: torch.Generator) -> torch.Tensor:
        budget, is_k = self.layout.escape_budget, mean == 1.0
        counts = [(budget // 2, budget - budget // 2), (0, 0), (1, 1)]
        x = 1 + torch.rand(pages, PAGE_TOKENS, self.kv_heads, dim, generator=draw)
        tiny = 2.0 ** -torch.randint(17, 23, x.shape, generator=draw).float() * x
        tiny[torch.rand(x.shape, generator=draw) < 0.1] = 0.0
        if is_k:
            x[..., 0] *= -(2.0**-13)
        else:
            x[:, :-1] *= 2.0**-13 * torch.randn(x[:, :-1].shape, generator=draw).sign()
        order = torch.randperm(PAGE_TOKENS - 1, generator=torch.Generator().manual_seed(5))  # the tokens that have weight
        for page in range(pages):
            for head in range(self.kv_heads):
                k_count, v_count = counts[page % 3]
                tokens = order[:k_count]
                if is_k:
                    x[page, tokens, head, 0] = tiny[page, tokens, head, 0]
                elif v_count:
                    entry = torch.arange(v_count)
                    where = page, tokens[entry % k_count], head, (entry % k_count + entry // k_count) % 2 * (dim - 3) + 2
                    x[where] = tiny[where]
        return x.bfloat16()

    def _queries(self, draw: torch.Generator) -> torch.Tensor:
        q = torch.zeros(self.rows, self.q_heads, self.layout.head_dim)
        q[..., 0] = (1 + torch.rand(self.rows, self.q_heads, generator=draw)) * 2.0**17 * self.scale**-1
        return q


def differs(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor, Tolerance]) -> str | None:
    """What is wrong with (o, log-sum-exp base 2), or None. o is compared in the L2 norm of a row and head."""
    (out, lse), (o, lse_nat, tolerance) = got, want
    empty = lse_nat == -torch.inf
    if not torch.equal(lse == -torch.inf, empty) or out[empty].any():
        return "a row without tokens is not empty, or another one is"
    rounding = 2.0**-8 * o.norm(dim=-1) if out.dtype == torch.bfloat16 else 0.0
    off = (out.double() - o).norm(dim=-1) - rounding
    lse_off = (lse.double() * torch.log(torch.tensor(2.0)).item() - lse_nat).abs()
    for name, error, bound in (("o", off, tolerance.o), ("lse", lse_off, tolerance.lse)):
        bad = ~((error <= bound) | empty)  # a NaN is bad
        if bad.any():
            row, head = bad.nonzero()[0].tolist()
            return f"{name}: {int(bad.sum())} rows and heads; first [{row}, {head}]: {error[row, head]:.3g} > {bound[row, head]:.3g}"
    return None


def check(case: Case, dense: Dense | None = None, dtype: torch.dtype = torch.float32) -> None:
    got = case.run(dense=dense, dtype=dtype)
    for rounded_pages in (True, False):
        problem = differs(got, case.expected(dense, rounded_pages))
        assert problem is None, f"{case.layout.fmt.name}, rounded_pages={rounded_pages}: {problem}"


def check_format(name: str, dim: int, *, device: str = "cpu", **shape) -> None:
    """Small tiles alone, then both kinds with a dense state."""
    check(Case(name, dim, SMALL_BATCH, SMALL_ROWS, device=device, **shape))
    case = Case(name, dim, MIXED_BATCH, MIXED_ROWS, device=device, **shape)
    check(case, case.dense(base2=True, strided=True))


def check_escapes(dim: int, *, device: str = "cpu", **shape) -> None:
    """Small tiles, full, empty and short lists of escapes; and escapes that are left as restored show."""
    reads: list[Read] = [([0, 1], 3, True), ([2], 1, False), ([3], 2, False)]
    case = EscapeCase(dim, reads, 4, device=device, **shape)
    positions, exponents, tail = case.layout.escape_fields
    listed = [case.records[int(page), :, tail.end - 2 : tail.end].int().sum(-1) for page in case.groups[0].pages]
    assert [x.unique().tolist() for x in listed] == [[case.layout.escape_budget], [0], [2]]
    check(case)
    want, right = case.expected(), case.records.clone()
    page, k_count = int(case.groups[0].pages[0]), case.layout.escape_budget // 2
    as_read = 127 - 15  # the exponent that code 15 has, next to values of 1 to 2
    for entry in (0, k_count // 2, k_count - 1):
        case.records[page, :, exponents.offset + entry] = as_read
        assert differs(case.run(), want), f"escape {entry} of K does not matter"
        case.records.copy_(right)
    case.records[page, :, exponents.offset + k_count : exponents.end] = as_read
    assert differs(case.run(), want), "escapes of V do not matter"


def check_dense_states(name: str, dim: int, *, device: str = "cpu") -> None:
    """Both bases, both layouts, bfloat16 output; a row that reads no page keeps its dense state bit for bit."""
    case = Case(name, dim, SMALL_BATCH, SMALL_ROWS, device=device)
    check(case, dtype=torch.bfloat16)
    for base2, strided in ((True, False), (False, True)):
        dense = case.dense(base2, strided)
        check(case, dense, torch.bfloat16)
        out, _ = case.run(dense=dense, dtype=torch.bfloat16)
        assert torch.equal(out[4], dense.o[4])


def check_nothing_to_read(name: str, *, device: str = "cpu") -> None:
    case = Case(name, 64, [([0, 1], 0, False)], 3, device=device)
    check(case)
    dense = case.dense(base2=True, strided=False)
    check(case, dense)
    out, _ = case.run(dense=dense)
    assert torch.equal(out[1:], dense.o[1:].float())


def check_launches(name: str, *, device: str = "cpu") -> None:
    """Kernels that would find nothing to do are not launched, unless the plan says that its lists may change."""
    from sgl_hq.kernels.grouped_attention import kernel_expand, kernel_large, kernel_small

    kernels = [(kernel_small, "attend_small"), (kernel_expand, "expand_pages"), (kernel_large, "attend_large")]
    stock = [getattr(module, kernel) for module, kernel in kernels]
    launched: list[str] = []
    small, large = ["attend_small"], [kernel for _, kernel in kernels[1:] if name != "bf16" or kernel != "expand_pages"]
    cases: list[tuple[list[Read], list[str]]] = [
        ([(range(2), 1, True)], small), ([(range(40), 2, True)], large), ([(range(40), 2, True), ([1], 1, False)], small + large), ([], []),
    ]  # fmt: skip
    try:
        for (module, kernel), of in zip(kernels, stock):
            setattr(module, kernel, _Recorded(of, kernel, launched))
        for reads, wanted in cases:
            case = Case(name, 64, reads, 40, device=device)
            assert differs(case.run(), case.expected()) is None and launched == small + large
            launched.clear()
            work = case.work()
            work.tiles = tiles_of(work.words.cpu().numpy(), case.max_rows, work.grid)
            assert differs(case.run(work), case.expected()) is None and launched == wanted
            launched.clear()
    finally:
        for (module, kernel), of in zip(kernels, stock):
            setattr(module, kernel, of)


class _Recorded:
    def __init__(self, kernel, name: str, launched: list[str]) -> None:
        self._kernel, self._name, self._launched = kernel, name, launched

    def __getitem__(self, grid):
        self._launched.append(self._name)
        return self._kernel[grid]


def check_padding(name: str, dim: int, *, device: str = "cpu", **shape) -> None:
    """Rows after the batch, of a graph: NaN queries and dense states there change no bit elsewhere."""
    case = Case(name, dim, MIXED_BATCH, MIXED_ROWS + 10, device=device, **shape)
    dense = case.dense(base2=True, strided=True)
    before = [x[:MIXED_ROWS] for x in case.run(dense=dense)]
    for lanes in (case.q, dense.o, dense.lse):
        lanes[MIXED_ROWS:] = torch.nan
    after = [x[:MIXED_ROWS] for x in case.run(dense=dense)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def check_mutations(name: str, *, device: str = "cpu") -> None:
    """What the tolerances must not forgive."""
    reads: list[Read] = [([0, 1], 2, True), ([2], 1, False)]
    case = Case(name, 64, reads, 3, device=device)
    dense = case.dense(base2=True, strided=False)
    want = case.expected(dense)
    assert differs(case.run(dense=dense), want) is None
    page, right = int(case.groups[0].pages[1]), case.records.clone()
    for field in case.layout.fields:  # the highest bit of every code or scale of one page
        case.records[page, :, field.offset : field.end] ^= 0x80
        if field.name not in ("escapes", "ranges"):  # indices and huge numbers
            assert differs(case.run(dense=dense), want), f"{field.name} of a page does not matter"
        case.records.copy_(right)
    wrong = Dense(dense.o, dense.lse, base2=False)
    assert differs(case.run(dense=wrong), want), "the base of the dense state does not matter"
    case.groups[0] = RowGroup(case.groups[0].pages[:1], case.groups[0].rows, case.groups[0].sink)
    assert differs(case.run(dense=dense), want), "a page may be left out"
    if case.layout.fmt.sink_tokens:
        fresh = Case(name, 64, reads, 3, device=device)
        fresh.groups[0] = RowGroup(fresh.groups[0].pages, fresh.groups[0].rows, NO_SINK)
        assert differs(fresh.run(dense=dense), want), "sinks may be left out"
