"""Time of packing and unpacking pages on this GPU, against the bytes that must move and a plain copy of as many.

    python kernels/page_codec/bench.py [--formats hq6 hq4 lossless] [--tokens 8192] [--json FILE]

Correctness comes first: two layers against the PyTorch codec on the CPU, byte for byte. Buffers are far larger than
the L2 cache and two sets of them take turns, so every run reads cold memory. Times are of the GPU alone (events around
a run that waits behind a sleeping kernel); `host` is what a call costs the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sgl_hq.kernels.page_codec import PageCodec
from sgl_hq.kernels.page_codec.launcher import pack_pages, unpack_pages
from sgl_hq.page_format import PAGE_TOKENS, PageLayout, get_format

FLOOR_TB_S = 4.3  # copy bandwidth of an H200, bytes in + bytes out
GOAL = 0.6  # of the floor
CHECKED_LAYERS = 2
SLEEP_CYCLES = 1_000_000  # about half a millisecond: the host has queued the run before the GPU reaches it


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in microseconds; spread: 10th and 90th percentile."""

    format: str
    run: str
    megabytes: float
    median_us: float
    p10_us: float
    p90_us: float
    copy_us: float
    host_us: float

    def line(self) -> str:
        floor_us = self.megabytes / FLOOR_TB_S
        share = floor_us / self.median_us
        return (
            f"{self.format:10} {self.run:7} {self.megabytes:7.1f} {self.median_us:8.1f} {self.p10_us:8.1f} "
            f"{self.p90_us:8.1f} {self.megabytes / self.median_us * 1e3:7.0f} {floor_us:8.1f} "
            f"{share:7.0%}{'' if share >= GOAL else ' *':2} {self.copy_us:8.1f} {self.copy_us / self.median_us:7.0%} "
            f"{self.host_us:7.0f}"
        )


class Buffers:
    """A dense pool, an arena and outputs of one shape: pages scattered as a server's allocator would leave them."""

    def __init__(self, layout: PageLayout, pages: int, layers: int, heads: int, seed: int) -> None:
        draw = torch.Generator("cuda").manual_seed(seed)
        slots = pages * PAGE_TOKENS
        dims = layout.head_dim, layout.v_head_dim

        def values(dim: int) -> torch.Tensor:
            x = torch.randn(slots, heads, dim, device="cuda", generator=draw)
            return (x + 4 * torch.randn(heads, dim, device="cuda", generator=draw)).bfloat16()

        self.k, self.v = ([values(dim) for _ in range(layers)] for dim in dims)
        self.dense_pages, self.packed_pages = (torch.randperm(pages, device="cuda", generator=draw) for _ in range(2))
        self.records = torch.full((layers, pages, heads, layout.record_bytes), 255, dtype=torch.uint8, device="cuda")
        self.sinks = torch.full((layers, 1, heads, layout.sink_bytes), 255, dtype=torch.uint8, device="cuda")
        shapes = [(layers, slots, heads, dim) for dim in dims]
        self.outs = [torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        self.layout = layout

    def pack(self) -> torch.Tensor:
        where = self.dense_pages, self.records, self.packed_pages
        return pack_pages(self.layout, self.k, self.v, *where, self.sinks, 0)

    def unpack(self) -> None:
        sink = self.sinks[:, 0] if self.layout.sink_bytes else None
        unpack_pages(self.layout, self.records, self.packed_pages, sink, *self.outs)


def check(buffers: Buffers, codec: PageCodec) -> None:
    """Raises AssertionError unless records and unpacked values equal the PyTorch codec's."""
    assert not buffers.pack().any(), "a page was refused"
    buffers.unpack()
    for layer in range(min(CHECKED_LAYERS, len(buffers.k))):
        k, v = (
            side[layer].unflatten(0, (-1, PAGE_TOKENS))[buffers.dense_pages].cpu() for side in (buffers.k, buffers.v)
        )
        records, sink = codec.pack(k, v, first_has_sink=True)
        got = buffers.records[layer, buffers.packed_pages].cpu()
        assert torch.equal(got, records), f"packed: {(got != records).sum()} of {records.numel()} bytes differ"
        for out, expected in zip(buffers.outs, codec.unpack(records, sink), strict=True):
            got, expected = out[layer].cpu(), expected.transpose(0, 1).bfloat16()
            differ = (got.view(torch.int16) != expected.contiguous().view(torch.int16)).sum()
            assert not differ, f"unpacked: {differ} of {expected.numel()} values differ"


def measure(runs: list[Callable[[], object]], repeats: int) -> tuple[list[float], float]:
    """(times of the GPU, median time of the host), microseconds. The `runs` take turns."""
    for run in runs * 3:
        run()
    torch.cuda.synchronize()
    events, host = [], []
    for i in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        before = time.perf_counter()
        runs[i % len(runs)]()
        host.append(time.perf_counter() - before)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events], statistics.median(host) * 1e6


def rows_of(name: str, args: argparse.Namespace) -> list[Row]:
    codec = PageCodec(get_format(name), args.head_dim)
    shape = args.tokens // PAGE_TOKENS, args.layers, args.heads
    sets = [Buffers(codec.layout, *shape, seed) for seed in range(2)]
    for buffers in sets:
        check(buffers, codec)
    # Sink slots: once per sequence, below a thousandth of this.
    moved = shape[0] * shape[1] * shape[2] * (codec.layout.dense_bytes + codec.layout.record_bytes)
    halves = [torch.ones(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in sets]
    copies, _ = measure([lambda half=half: half[0].copy_(half[1]) for half in halves], args.repeats)
    rows = []
    for run in ("pack", "unpack"):
        times, host = measure([getattr(buffers, run) for buffers in sets], args.repeats)
        deciles = statistics.quantiles(times, n=10)
        median, copy = statistics.median(times), statistics.median(copies)
        rows.append(Row(name, run, moved / 1e6, median, deciles[0], deciles[-1], copy, host))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["hq6", "hq4", "lossless", "hq5", "hq3", "hq2", "int8", "bf16"])
    parser.add_argument("--tokens", type=int, default=8192, help="a multiple of 64")
    for name, default in (("layers", 28), ("heads", 4), ("head-dim", 128), ("repeats", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="append the rows to this file, with what made them")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA device here; this benchmark needs one.")

    gpu = torch.cuda.get_device_name()
    print(f"{gpu}; {args.tokens} tokens x {args.layers} layers x {args.heads} heads x {args.head_dim}, K and V")
    print(f"floor: bytes in + bytes out at {FLOOR_TB_S} TB/s (H200); * below {GOAL:.0%} of it; copy: torch's, same bytes")
    titles = ["MB", "us", "p10", "p90", "GB/s", "floor us", "of floor", "copy us", "of copy", "host us"]
    widths = [7, 8, 8, 8, 7, 8, 9, 8, 7, 7]
    print(f"{'format':10} {'run':7}", *(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)))
    rows = []
    for name in args.formats:
        for row in rows_of(name, args):
            print(row.line(), flush=True)
            rows.append(row)
    if args.json:
        import triton

        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        made_by = {"gpu": gpu, "commit": commit, "torch": torch.__version__, "triton": triton.__version__}
        shape = {key: getattr(args, key) for key in ("tokens", "layers", "heads", "head_dim", "repeats")}
        with args.json.open("a") as file:
            file.writelines(json.dumps(made_by | shape | asdict(row)) + "\n" for row in rows)


if __name__ == "__main__":
    main()
