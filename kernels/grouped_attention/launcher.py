"""Grouped attention over packed pages: plan, kernels for few and for many rows, one merge. FlashInfer's conventions at the border.

    work = plan_pages(qo_indptr, kv_indptr, kv_indices, kv_last_page_len, q_heads=28, kv_heads=4, ...)
    grouped_attention(q, records, layout, work, scale)
    merge(q, work, layout, scale, out=out)                  # a dense state, or parts over dense pages, join in the same kernel

Dense pages: launcher_dense.py. Work lists: work.py. Nothing here waits for the GPU, and a launch depends on shapes only, so CUDA
graphs can hold it; where `Work.tiles` says that a kernel has nothing to do, it is not launched.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from sgl_hq.kernels.page_codec.hadamard import block_size
from sgl_hq.page_format import PAGE_TOKENS, PageLayout

from .launcher_dense import LOG2_E, DenseWork
from .record_constants import CODED_KINDS, expand_constants, hopper_constants, small_constants
from .work import CODED_ROWS, LARGE_ROWS, SMALL_ROWS, Grid, RowGroup, Tiles, lay_out

KINDS = ("bf16", "lossless", "int8", "affine")
HEAD_DIMS = (64, 128)
# Two pages are under way: one is read while the next one comes. Programs an SM runs at a time follow from that, and from
# registers: each of its four schedulers has room for 2 warps of 255 a thread, or 3 of 168.
_SMALL = {"num_warps": 1, "STAGES": 3}
_LARGE = {"num_warps": 8, "STAGES": 3}
_LARGE_STEP = 2  # pages of a step there
_SMALL_PER_SM, _LARGE_PER_SM = 8, 1
_SLIM_PER_SM, _SLIM = 12, {"maxnreg": 168}
_SHARED_BYTES = 220 << 10
_INTERPRETED_SMS = 2
_EXPAND_PER_SM = 8
_HOPPER = {"num_warps": 4, "STAGES": 3}
# A tile that unpacks pages itself costs 0.43 us more a page and SM than one that finds them expanded; expanding one costs 1.7 (H200).
_DIRECT_TILES = 4
SCRATCH_PAGES = 1024  # pages of large groups that a forward may have; the rest is read packed


class WorkOverflow(ValueError):
    """A plan does not fit the buffers of a fixed-size `Work`."""


@dataclass
class Work:
    """Device buffers of a plan. words `[n] int32` (work.py); part_o `[parts, q_heads, head_dim]`, part_lse `[parts, q_heads]`
    float32: what the kernels write and the merge reads. scratch `[pages, kv_heads, 2, 64, head_dim] bfloat16`: pages expanded
    for large tiles, layer after layer; empty for bf16. tiles: what to launch kernels for; all unless an eager forward knows
    better, since a CUDA graph's lists change between replays."""

    grid: Grid
    max_rows: int
    kv_heads: int
    words: torch.Tensor
    part_o: torch.Tensor
    part_lse: torch.Tensor
    scratch: torch.Tensor
    tiles: Tiles = Tiles(True, True, True)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.words, self.part_o, self.part_lse, self.scratch))


def why_not(layout: PageLayout, q_heads: int, kv_heads: int) -> str | None:
    """The reason these kernels cannot read pages of `layout`, or None."""
    fmt = layout.fmt
    if fmt.kind not in KINDS:
        return f"format {fmt.name} has no GPU kernel yet"
    if fmt.kind == "affine" and fmt.k_group != "channel":
        return f"format {fmt.name} scales K per token, and only K per channel has a GPU kernel"
    if layout.head_dim != layout.v_head_dim or layout.head_dim not in HEAD_DIMS:
        return f"head_dim is {layout.head_dim} and {layout.v_head_dim} for K and V; the kernels have {HEAD_DIMS}"
    if q_heads % kv_heads or q_heads // kv_heads > SMALL_ROWS:
        return f"{q_heads} query heads on {kv_heads} kv heads; up to {SMALL_ROWS} may share one"
    return None


def make_grid(layout: PageLayout, q_heads: int, kv_heads: int, device: torch.device) -> Grid:
    """Programs of both kernels for one GPU."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _INTERPRETED_SMS
    group = q_heads // kv_heads
    coded = layout.fmt.kind in CODED_KINDS
    tile = CODED_ROWS if coded and group <= CODED_ROWS else SMALL_ROWS
    per_sm = _SLIM_PER_SM if _is_slim(layout, tile) else max(1, min(_SMALL_PER_SM, _buffers_per_sm(layout)))
    step, direct_tiles = (1, _DIRECT_TILES if coded else 0) if is_hopper(device) else (_LARGE_STEP, 0)
    return Grid(max(1, sms * per_sm // kv_heads), max(1, sms * _LARGE_PER_SM // kv_heads), group, tile, step, direct_tiles)


def _buffers_per_sm(layout: PageLayout) -> int:
    """Programs of small tiles whose buffers an SM has room for."""
    one_bit = sum(bits & 1 for bits in (layout.fmt.k_bits, layout.fmt.v_bits)) if layout.fmt.kind == "affine" else 0
    buffers = 2 * (layout.record_bytes + one_bit * 8 * layout.head_dim)  # the rows of a 1-bit plane lie there twice
    if layout.fmt.kind == "lossless":
        buffers //= 2  # its steps are half pages
    return _SHARED_BYTES // buffers


@functools.lru_cache(maxsize=16)
def _is_slim(layout: PageLayout, small_tile: int) -> bool:
    """Small tiles that do with 168 registers, and whose buffers are small enough for it to matter."""
    return layout.fmt.kind == "affine" and small_tile == CODED_ROWS and _buffers_per_sm(layout) >= _SLIM_PER_SM


@functools.lru_cache(maxsize=8)
def is_hopper(device: torch.device) -> bool:
    """Large tiles run in kernel_hopper.py there, else in kernel_large.py."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def make_work(groups: list[RowGroup], max_rows: int, layout: PageLayout, q_heads: int, kv_heads: int, device: torch.device) -> Work:
    """Plan `groups` into fresh buffers."""
    grid = make_grid(layout, q_heads, kv_heads, device)
    expands = layout.fmt.kind != "bf16"
    words, parts = lay_out(groups, max_rows, grid, layout.fmt.sink_tokens, SCRATCH_PAGES if expands else None)
    scratch = make_scratch(layout, kv_heads, int(words[grid.sections(max_rows).expand + 1]), device)
    work = empty_work(grid, max_rows, len(words), parts, scratch)
    work.words.copy_(torch.from_numpy(words))
    return work


def empty_work(grid: Grid, max_rows: int, words: int, parts: int, scratch: torch.Tensor) -> Work:
    """Buffers for lists of `words` words and `parts` parts, on the device of `scratch`."""
    _, kv_heads, _, _, head_dim = scratch.shape
    shape, device = (parts, grid.group * kv_heads, head_dim), scratch.device
    part_o = torch.empty(shape, dtype=torch.float32, device=device)
    part_lse = torch.empty(shape[:2], dtype=torch.float32, device=device)
    return Work(grid, max_rows, kv_heads, torch.zeros(words, dtype=torch.int32, device=device), part_o, part_lse, scratch)


def make_scratch(layout: PageLayout, kv_heads: int, pages: int, device: torch.device) -> torch.Tensor:
    """Room for `pages` expanded pages of one layer."""
    return torch.empty((pages, kv_heads, 2, PAGE_TOKENS, layout.head_dim), dtype=torch.bfloat16, device=device)


def plan_pages(
    qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, kv_last_page_len: torch.Tensor,
    *, layout: PageLayout, q_heads: int, kv_heads: int, device: torch.device | str, sinks: list[int] | None = None,
) -> Work:  # fmt: skip
    """FlashInfer's paged layout, all int32: group i has query rows qo_indptr[i]:qo_indptr[i+1] and reads the pages
    kv_indices[kv_indptr[i]:kv_indptr[i+1]]. Rows may occur in one group only.

    sinks: slot of each group's first tokens, -1 for none. Raises ValueError if a last page is not full (packed pages
    are) or the kernels cannot read `layout`.
    """
    reason = why_not(layout, q_heads, kv_heads)
    if reason:
        raise ValueError(reason)
    qo, kv, indices, last = (np.asarray(x.cpu()) for x in (qo_indptr, kv_indptr, kv_indices, kv_last_page_len))
    if (last[np.diff(kv) > 0] != PAGE_TOKENS).any():
        raise ValueError(f"kv_last_page_len must be {PAGE_TOKENS}: only whole pages are packed")
    slots = [-1] * (len(qo) - 1) if sinks is None else sinks
    groups = [
        RowGroup(indices[kv[i] : kv[i + 1]], np.arange(qo[i], qo[i + 1]), slots[i]) for i in range(len(qo) - 1)
    ]
    return make_work(groups, int(qo[-1]), layout, q_heads, kv_heads, torch.device(device))


def grouped_attention(q: torch.Tensor, records: torch.Tensor, layout: PageLayout, work: Work, scale: float) -> None:
    """Attention of every group's rows over its pages, into the parts of `work`. Affine V stays rotated there.

    q: `[rows, q_heads, head_dim] bfloat16`, contiguous. records: `[pages, kv_heads, record_bytes] uint8` of one layer.
    scale: softmax scale. Raises ValueError for wrong shapes.
    """
    from .kernel_expand import expand_pages
    from .kernel_hopper import attend_hopper
    from .kernel_large import attend_large
    from .kernel_small import attend_small

    _check(q, records, layout, work)
    grid, kind, heads = work.grid, layout.fmt.kind, work.kv_heads
    # A decode graph launches kernels for whatever the lists of a replay may hold.
    at, tiles = grid.sections(work.max_rows), work.tiles.both(grid.possible_tiles(len(q)))
    parts = (work.part_o, work.part_lse)
    shape = {"Q_HEADS": q.shape[1], "GROUP": grid.group, "D": layout.head_dim, "PTX": q.is_cuda}
    if tiles.small:
        attend_small[(grid.small * heads,)](
            q, records, work.words, *parts, *records.stride()[:2], scale * LOG2_E, **shape, **small_constants(layout), ROWS=grid.small_tile,
            FIRST=at.small, PROGRAMS=grid.small, **_SMALL, **(_SLIM if _is_slim(layout, grid.small_tile) else {}),
        )  # fmt: skip
    if not tiles.large:
        return
    if kind == "bf16":
        pages = records.view(torch.bfloat16)
    else:
        pages, programs = work.scratch, grid.large * heads * _EXPAND_PER_SM
        if tiles.expanded:
            expand_pages[(programs,)](
                records, work.words, pages, *records.stride()[:2], heads, D=layout.head_dim, KIND=kind, **expand_constants(layout),
                FIRST=at.expand, PROGRAMS=programs, num_warps=4,
            )  # fmt: skip
    if is_hopper(q.device):
        attend_hopper[(grid.large * heads,)](
            q, records, pages, work.words, *parts, *records.stride()[:2], *pages.stride()[:2], scale * LOG2_E, Q_HEADS=q.shape[1],
            GROUP=grid.group, D=layout.head_dim, FIRST=at.large, PROGRAMS=grid.large, **hopper_constants(layout), **_HOPPER,
        )  # fmt: skip
    else:
        attend_large[(grid.large * heads,)](
            q, pages, work.words, *parts, *pages.stride()[:2], scale * LOG2_E, **shape, FIRST=at.large, PROGRAMS=grid.large,
            ROWS=LARGE_ROWS, **_LARGE,
        )  # fmt: skip


def merge(
    q: torch.Tensor, work: Work, layout: PageLayout, scale: float, *, sinks: torch.Tensor | None = None,
    dense_o: torch.Tensor | None = None, dense_lse: torch.Tensor | None = None, base2: bool = True, dense: DenseWork | None = None,
    out: torch.Tensor | None = None, out_lse: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Join the parts of every row with its sinks and, if given, its dense rest: a state, or what `dense_attention` left in `dense`.

    sinks: `[slots, kv_heads, sink_bytes] uint8` of one layer, needed if the format keeps sinks. dense_o: `[rows, q_heads, head_dim]`
    contiguous; dense_lse: `[rows, q_heads] float32` of any strides, -inf = no dense token; base2: it is base 2
    (FlashInfer), else natural (SGLang, FA3). out: as q, allocated if None; out_lse: `[rows, q_heads] float32` for the
    joined log-sum-exp, base 2: with it the result is a state that `flashinfer.merge_state` takes.
    """
    from .kernel_merge import merge_states

    fmt, rows = layout.fmt, q.shape[0]
    most_rows = work.max_rows if dense is None else min(work.max_rows, dense.max_rows)
    if rows > most_rows:
        raise ValueError(f"q has {rows} rows, the plan was made for {most_rows}")
    if dense is not None and dense_o is not None:
        raise ValueError("the dense rest is a state or parts over dense pages, not both")
    if fmt.sink_tokens and sinks is None:
        raise ValueError(f"format {fmt.name} keeps sinks: give their slots")
    if fmt.sink_tokens and any(n % 16 for n in (sinks.data_ptr(), *sinks.stride()[:2])):
        raise ValueError("slots of sinks must start on multiples of 16 bytes")
    out = torch.empty_like(q) if out is None else out
    if not out.is_contiguous() or not (out_lse is None or out_lse.is_contiguous()):
        raise ValueError("out and out_lse must be contiguous")
    if not rows:
        return out
    at = work.grid.sections(work.max_rows)
    slot_strides = sinks.stride()[:2] if fmt.sink_tokens else (0, 0)
    rest, dense_rows, lse_strides = "none", q, (0, 0)
    if dense is not None:
        rest, dense_o, dense_lse, dense_rows = "parts", dense.part_o, dense.part_lse, dense.row_parts
    elif dense_o is not None:
        rest, lse_strides = "state", dense_lse.stride()
    merge_states[(rows, work.kv_heads)](
        q, work.words, work.part_o, work.part_lse, sinks if fmt.sink_tokens else q, q if dense_o is None else dense_o,
        q if dense_lse is None else dense_lse, dense_rows, out, q if out_lse is None else out_lse, scale * LOG2_E, at.rows, at.sinks,
        *slot_strides, *lse_strides, Q_HEADS=q.shape[1], GROUP=work.grid.group, D=layout.v_head_dim,
        BLOCK=block_size(layout.v_head_dim) if fmt.kind == "affine" else 0, SINK_TOKENS=fmt.sink_tokens,
        DENSE=rest, BASE_2=base2, WRITE_LSE=out_lse is not None, num_warps=4,
    )  # fmt: skip
    return out


def _check(q: torch.Tensor, records: torch.Tensor, layout: PageLayout, work: Work) -> None:
    if q.dim() != 3 or q.shape[2] != layout.head_dim or q.dtype != torch.bfloat16 or not q.is_contiguous():
        raise ValueError(f"q is {list(q.shape)} {q.dtype}; expected contiguous [rows, q_heads, {layout.head_dim}] bfloat16")
    expected = [work.kv_heads, layout.record_bytes]
    if records.dim() != 3 or list(records.shape[1:]) != expected or records.dtype != torch.uint8:
        raise ValueError(f"records are {list(records.shape)} {records.dtype}; expected [pages, {', '.join(map(str, expected))}] uint8")
    if records.stride(2) != 1 or any(n % 16 for n in (records.data_ptr(), *records.stride()[:2])):
        raise ValueError("records must start on multiples of 16 bytes, with their bytes in a row")
    if q.shape[1] != work.grid.group * work.kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, the plan was made for {work.grid.group * work.kv_heads}")
