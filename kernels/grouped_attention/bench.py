"""The engine of `sgl-hq bench kernels`: inputs of a case, our kernels on them, a float64 check, and times of CUDA graphs.

Every arm is a list of calls, one for each *layer*: layers have the same page tables and other values, and together they
are several times the L2 cache, so no layer finds its pages there. The calls are captured into one CUDA graph; what is
reported is the time of a replay divided by the number of layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sgl_hq.kernels.page_codec.launcher import pack_pages, unpack_pages
from sgl_hq.page_format import PAGE_TOKENS, PageLayout

from .bench_cases import Case
from .side_stream import SideStream

DEVICE = "cuda"
Call = Callable[[], object]

_COLD_BYTES = 400 << 20  # all layers together: eight times the L2 cache of an H200
_MAX_LAYERS = 6
_SLEEP_CYCLES = 400_000  # some 200 microseconds: the host has queued the replay before the GPU reaches it
_CHECKED_ROWS = 3
# Share of the root mean square of what differs between rows. Outputs are rounded to bfloat16 (2**-9 of values whose common
# part is several times larger than their differences), probabilities too.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Tables:
    """Where tokens are, the same in every layer. Page p of the dense pool is slots 64 p .. 64 p + 63.

    prefix_pages: `[prefixes, prefix_pages] int64`; private_pages: `[requests, private_pages] int64`, on the GPU.
    """

    case: Case
    prefix_pages: torch.Tensor
    private_pages: torch.Tensor

    @classmethod
    def scattered(cls, case: Case) -> Tables:
        """Pages in the order a server's allocator would leave them."""
        shared = case.prefixes * case.prefix_pages
        draw = torch.Generator(DEVICE).manual_seed(1)
        pages = torch.randperm(shared + case.requests * case.private_pages, device=DEVICE, generator=draw)
        return cls(case, pages[:shared].view(case.prefixes, -1), pages[shared:].view(case.requests, -1))

    @property
    def request_pages(self) -> torch.Tensor:
        """`[requests, pages] int64`: prefix, then private pages."""
        return torch.cat([self.prefix_pages.repeat_interleave(self.case.rows_per_prefix, 0), self.private_pages], 1)

    @property
    def slots(self) -> int:
        return (self.prefix_pages.numel() + self.private_pages.numel()) * PAGE_TOKENS


def slots_of(pages: torch.Tensor) -> torch.Tensor:
    """`[rows, pages]` -> `[rows, pages * 64]`: token slots, in the order of the tokens."""
    return (pages[..., None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=pages.device)).flatten(-2)


class Layer:
    """One layer's values. q: `[requests, q_heads, head_dim]`; k, v: `[slots, kv_heads, head_dim]`; bfloat16."""

    def __init__(self, tables: Tables, seed: int) -> None:
        case, draw = tables.case, torch.Generator(DEVICE).manual_seed(seed)

        def values(rows: int, heads: int, scale: float, offset: float) -> torch.Tensor:
            x = torch.randn(rows, heads, case.head_dim, device=DEVICE, generator=draw, dtype=torch.bfloat16).mul_(scale)
            return x.add_(offset * torch.randn(heads, case.head_dim, device=DEVICE, generator=draw))

        # Twice the usual queries: some hundred tokens share a row's attention, so that its output says which it read.
        self.q = values(case.requests, case.q_heads, 2.0, 0.0)
        self.k = values(tables.slots, case.kv_heads, 1.0, 2.0)
        self.v = values(tables.slots, case.kv_heads, 1.0, 0.5)


def layers_of(tables: Tables) -> list[Layer]:
    """As many layers as are cold in L2, at least two."""
    count = -(-_COLD_BYTES // tables.case.dense_bytes(2))
    return [Layer(tables, seed) for seed in range(max(2, min(count, _MAX_LAYERS)))]


class PackedLayer:
    """The prefixes of one layer in the arena. records: `[pages, kv_heads, record_bytes]`, sinks: `[prefixes, kv_heads,
    sink_bytes]`, uint8; pages: `[prefixes, prefix_pages] int32`, the same scattered order in every layer."""

    def __init__(self, tables: Tables, layer: Layer, layout: PageLayout) -> None:
        case, self.layout = tables.case, layout
        total = case.prefixes * case.prefix_pages
        order = torch.randperm(total, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(2))
        self.pages = order.to(torch.int32).view(case.prefixes, -1)
        self.records = torch.empty(total, case.kv_heads, layout.record_bytes, dtype=torch.uint8, device=DEVICE)
        self.sinks = torch.empty(case.prefixes, case.kv_heads, layout.sink_bytes, dtype=torch.uint8, device=DEVICE)
        refused = [
            pack_pages(layout, [layer.k], [layer.v], dense, self.records[None], packed, self.sinks[None], prefix)
            for prefix, (dense, packed) in enumerate(zip(tables.prefix_pages, self.pages))
        ]
        if torch.cat(refused).any():
            raise RuntimeError(f"format {layout.fmt.name} refused a page of the benchmark's values")

    def unpack(self, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a prefix as the records hold them, `[tokens, kv_heads, head_dim] bfloat16`."""
        tokens, heads = self.pages.shape[1] * PAGE_TOKENS, self.records.shape[1]
        k = torch.empty(tokens, heads, self.layout.head_dim, dtype=torch.bfloat16, device=DEVICE)
        v = torch.empty(tokens, heads, self.layout.v_head_dim, dtype=torch.bfloat16, device=DEVICE)
        sink = self.sinks[prefix] if self.layout.sink_bytes else None
        unpack_pages(self.layout, self.records, self.pages[prefix], sink, k, v)
        return k, v


class Grouped:
    """Our arm: grouped kernels over the packed prefixes, the dense kernel over the private tokens, one merge."""

    def __init__(self, tables: Tables, layers: Sequence[Layer], layout: PageLayout) -> None:
        from .launcher import plan_pages
        from .launcher_dense import make_dense_work

        self.case, self.tables, self.layers, self.layout = tables.case, tables, layers, layout
        self.scale = self.case.head_dim**-0.5
        self.packed = [PackedLayer(tables, layer, layout) for layer in layers]
        case, counts = self.case, torch.arange(self.case.prefixes + 1, dtype=torch.int32)
        self._work = plan_pages(
            counts * case.rows_per_prefix,
            counts * case.prefix_pages,
            self.packed[0].pages.flatten().cpu(),
            torch.full((case.prefixes,), PAGE_TOKENS, dtype=torch.int32),
            layout=layout,
            q_heads=case.q_heads,
            kv_heads=case.kv_heads,
            device=DEVICE,
            sinks=list(range(case.prefixes)) if layout.sink_bytes else None,
        )
        self._slots = slots_of(tables.request_pages).int()
        pages = tables.request_pages.numel()
        self._dense = make_dense_work(case.requests, pages, case.q_heads, case.kv_heads, case.head_dim, DEVICE)
        self._list_dense_pages()
        self.outs = [torch.empty_like(layer.q) for layer in layers]
        self._side_stream = SideStream(DEVICE)

    def _run_packed(self, i: int) -> None:
        from .launcher import grouped_attention

        grouped_attention(self.layers[i].q, self.packed[i].records, self.layout, self._work, self.scale)

    def _list_dense_pages(self) -> None:
        from .launcher_dense import list_pages

        rows = torch.arange(self.case.requests, device=DEVICE)
        starts = torch.full_like(rows, self.case.prefix_tokens)
        list_pages(self._dense, self._slots, rows, starts, starts + self.case.private_tokens, self.case.requests)

    def _run_dense(self, i: int) -> None:
        from .launcher_dense import dense_attention

        layer = self.layers[i]
        dense_attention(layer.q, layer.k, layer.v, self._dense, self.scale)

    def _run_merge(self, i: int) -> None:
        from .launcher import merge

        sinks = self.packed[i].sinks if self.layout.sink_bytes else None
        merge(self.layers[i].q, self._work, self.layout, self.scale, sinks=sinks, dense=self._dense, out=self.outs[i])

    def _run_all(self, i: int) -> None:
        """As the attention backend does (`sgl_hq/attention/hq_attn_backend.py`)."""
        with self._side_stream.fork():
            self._run_packed(i)
        self._run_dense(i)
        self._side_stream.join()
        self._run_merge(i)

    def parts(self) -> dict[str, list[Call]]:
        """Name of a part -> its calls, one a layer. `total` runs all three."""
        runs = {"total": self._run_all, "packed": self._run_packed, "dense": self._run_dense, "merge": self._run_merge}
        return {name: [lambda run=run, i=i: run(i) for i in range(len(self.layers))] for name, run in runs.items()}

    def error(self) -> float:
        """Of the first layer, against the values that its records hold."""
        self._run_all(0)
        return error_of(self.tables, self.layers[0], self.outs[0], self.packed[0].unpack)


def error_of(
    tables: Tables, layer: Layer, out: torch.Tensor, prefix_values: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None
) -> float:
    """How far a few rows of `out` are from attention in float64, as a share of what differs between rows.

    prefix_values: K and V of a prefix, where they are not the dense pool's. A NaN gives NaN.
    """
    case = tables.case
    rows = sorted({round(i * (case.requests - 1) / (_CHECKED_ROWS - 1)) for i in range(_CHECKED_ROWS)})
    expected = torch.stack([_row_in_float64(tables, layer, row, prefix_values) for row in rows])
    got = out[rows].double()
    signal = expected.unflatten(1, (case.kv_heads, -1))
    signal = signal - signal.mean((0, 2), keepdim=True)  # every head of a group has V's offsets in common
    return float((got - expected).square().mean().sqrt() / signal.square().mean().sqrt())


def _row_in_float64(tables: Tables, layer: Layer, row: int, prefix_values) -> torch.Tensor:
    case = tables.case
    k, v = (side[slots_of(tables.request_pages[row : row + 1])[0]].double() for side in (layer.k, layer.v))
    if prefix_values is not None:
        k[: case.prefix_tokens], v[: case.prefix_tokens] = prefix_values(row // case.rows_per_prefix)
    q = layer.q[row].double().unflatten(0, (case.kv_heads, -1))
    scores = torch.einsum("hgd,thd->hgt", q, k) * case.head_dim**-0.5
    return torch.einsum("hgt,thd->hgd", scores.softmax(-1), v).flatten(0, 1)


@dataclass(frozen=True)
class Times:
    """Microseconds of one call."""

    median: float
    p10: float
    p90: float


def graph_times(calls: Sequence[Call], replays: int) -> Times:
    """Times of one of the `calls`, which run in order in a captured CUDA graph, `replays` times."""
    for call in [*calls, *calls]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) * 1e3 / len(calls) for start, end in events])


def summary(times: Sequence[float]) -> Times:
    deciles = statistics.quantiles(times, n=10)
    return Times(statistics.median(times), deciles[0], deciles[-1])
