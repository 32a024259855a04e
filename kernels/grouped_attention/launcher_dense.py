"""Decode attention over the dense pages of every row: listed on the device once a forward, attended once a layer, joined by `merge`.

    work = make_dense_work(max_rows, max_pages, q_heads, kv_heads, head_dim, device)
    list_pages(work, req_to_token, requests, starts, lengths, rows)
    dense_attention(q, k, v, work, scale)
    merge(q, packed_work, layout, scale, dense=work)        # launcher.py

Nothing here waits for the GPU or depends on lengths: buffers have room for the longest rows, and CUDA graphs can hold the launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_hq.page_format import PAGE_TOKENS

LOG2_E = 1.4426950408889634
_TILES = (8, 16)  # query heads of a tile
# Two pages are under way, one is read: 70 KB of shared memory at head_dim 128 (74 with 16 query heads), and an SM has 225 for programs.
_ATTEND = {"num_warps": 1, "STAGES": 3}
_PER_SM = {64: 5, 128: 3}  # by head_dim
_AHEAD = 2  # entries behind the last page that the attention's pipeline may read, and drops
_INTERPRETED_SMS = 2
_ROW_BLOCK = 256  # rows that listing is compiled for at least: eager batches grow, and a compiler run would show


@dataclass
class DenseWork:
    """Device buffers of a decode batch's dense part; formats: kernel_dense.py. programs: of a kv head.

    bounds `[programs + 1] int32`, row_parts `[max_rows, 2] int32`, pages `[max_pages + 2] int64`: what `list_pages` writes;
    part_o `[max_rows + programs, q_heads, head_dim]`, part_lse `[max_rows + programs, q_heads] float32`: what the attention writes.
    """

    programs: int
    kv_heads: int
    bounds: torch.Tensor
    row_parts: torch.Tensor
    pages: torch.Tensor
    part_o: torch.Tensor
    part_lse: torch.Tensor

    @property
    def max_rows(self) -> int:
        return len(self.row_parts)

    @property
    def max_pages(self) -> int:
        return len(self.pages) - _AHEAD

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.bounds, self.row_parts, self.pages, self.part_o, self.part_lse))


def make_dense_work(
    max_rows: int, max_pages: int, q_heads: int, kv_heads: int, head_dim: int, device: torch.device | str
) -> DenseWork:
    """head_dim: 64 or 128. max_pages: dense pages of all rows together."""
    device = torch.device(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _INTERPRETED_SMS
    programs = max(1, sms * _PER_SM[head_dim] // kv_heads)
    return DenseWork(
        programs,
        kv_heads,
        torch.zeros(programs + 1, dtype=torch.int32, device=device),
        torch.zeros(max_rows, 2, dtype=torch.int32, device=device),
        torch.zeros(max_pages + _AHEAD, dtype=torch.int64, device=device),
        torch.empty(max_rows + programs, q_heads, head_dim, dtype=torch.float32, device=device),
        torch.empty(max_rows + programs, q_heads, dtype=torch.float32, device=device),
    )


def list_pages(
    work: DenseWork, req_to_token: torch.Tensor, requests: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, rows: int
) -> None:
    """Row r attends tokens starts[r] to lengths[r] - 1 of request requests[r], for r below `rows`; the others are padding of a graph.

    req_to_token: `[requests, row_tokens] int32`, contiguous: slots of dense tokens, in whole pages. requests, lengths: `[lanes] int32 or
    int64`, lanes >= rows; starts: `[lanes]`, multiples of 64. Raises ValueError where `work` has not room for so many lanes, each of
    row_tokens tokens.
    """
    from .kernel_dense import plan_dense

    lanes = len(lengths)
    if not rows <= lanes <= work.max_rows or lanes * pages_of(req_to_token.shape[1]) > work.max_pages:
        asked = f"{rows} rows in {lanes} lanes of {req_to_token.shape[1]} tokens"
        raise ValueError(f"{asked}; the buffers are for {work.max_rows} lanes and {work.max_pages} pages")
    if req_to_token.dtype != torch.int32 or not req_to_token.is_contiguous():
        raise ValueError(f"req_to_token is {req_to_token.dtype}; expected contiguous int32")
    plan_dense[(max(1, lanes),)](
        req_to_token, requests, starts, lengths, work.bounds, work.row_parts, work.pages, req_to_token.shape[1], rows,
        PROGRAMS=work.programs, PROGRAM_BLOCK=_power_of_2(work.programs + 1), ROW_BLOCK=max(_ROW_BLOCK, _power_of_2(work.max_rows)), num_warps=4,
    )  # fmt: skip


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, work: DenseWork, scale: float) -> None:
    """Attention of every listed row over its dense pages, into the parts of `work`.

    q: `[rows, q_heads, head_dim]`; k, v: `[slots, kv_heads, head_dim]` of one layer; bfloat16, contiguous. scale: softmax scale.
    Raises ValueError for wrong shapes.
    """
    from .kernel_dense import attend_dense

    _check(q, k, v, work)
    _, q_heads, dim = q.shape
    group = q_heads // work.kv_heads
    attend_dense[(work.programs * work.kv_heads,)](
        q, k, v, work.bounds, work.pages, work.part_o, work.part_lse, scale * LOG2_E, Q_HEADS=q_heads, GROUP=group, D=dim,
        ROWS=next(rows for rows in _TILES if group <= rows), PROGRAMS=work.programs, **_ATTEND, PTX=q.is_cuda,
    )  # fmt: skip


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, work: DenseWork) -> None:
    expected = list(work.part_o.shape[1:])
    if list(q.shape[1:]) != expected or q.dtype != torch.bfloat16 or not q.is_contiguous():
        raise ValueError(f"q is {list(q.shape)} {q.dtype}; expected contiguous [rows, {', '.join(map(str, expected))}] bfloat16")
    if len(q) > work.max_rows or expected[0] % work.kv_heads or expected[0] > _TILES[-1] * work.kv_heads:
        raise ValueError(f"{len(q)} rows of {expected[0]} heads; the buffers are for {work.max_rows} rows and {work.kv_heads} kv heads")
    of_token = [work.kv_heads, expected[1]]
    for name, side in (("k", k), ("v", v)):
        if list(side.shape[1:]) != of_token or side.dtype != torch.bfloat16 or not side.is_contiguous() or side.data_ptr() % 16:
            raise ValueError(
                f"{name} is {list(side.shape)} {side.dtype}; expected contiguous [slots, {', '.join(map(str, of_token))}] bfloat16"
            )
