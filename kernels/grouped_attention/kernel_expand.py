"""Device code: the pages that large tiles read, as bfloat16, once a forward and layer.

A tile of 128 rows pays for unpacking a page once for every tile of the group, and shared memory and registers are full of the
tensor cores' operands there. So pages read by more than a few small tiles are expanded first, into a scratch of
bf16 records (K, then V, token-major) that every layer uses anew. V of affine pages stays rotated. Small groups, where
bytes matter, never come here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_hq.kernels.page_codec.kernel_lossless import restore_escapes, unpack_side
from sgl_hq.kernels.page_codec.kernel_unpack import codes_of, groups_of


@triton.jit(do_not_specialize=["record_page", "record_head", "heads"])
def expand_pages(
    records, work, scratch, record_page, record_head, heads,
    D: tl.constexpr, KIND: tl.constexpr, K_PLANES: tl.constexpr, V_PLANES: tl.constexpr, K_META: tl.constexpr,
    V_META: tl.constexpr, RANGES: tl.constexpr, ESCAPES: tl.constexpr, BUDGET: tl.constexpr, FIRST: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """scratch `[pages, heads, 2, 64, D] bfloat16`; page i of the list that `work` names at FIRST goes to scratch page i.
    Other arguments as in kernel_small.py and page_codec/launcher.py. Grid: PROGRAMS. A program expands one side of a record at a time."""
    pages, count = work + tl.load(work + FIRST), tl.load(work + FIRST + 1)
    for side in range(tl.program_id(0), 2 * count * heads, PROGRAMS):
        index = side // 2
        page, head = tl.load(pages + index // heads).to(tl.int64), index % heads
        record = tl.multiple_of(records + page * record_page + head * record_head, 16)
        out = scratch + (tl.zeros((), tl.int64) + side) * (64 * D)
        if side % 2 == 0:
            if KIND == "lossless":
                tail = record + ESCAPES[2]
                unpack_side(record, out, D, tail, D, True, K_PLANES)
                k_count = tl.load(tail + D // 8 + 1).to(tl.int32)
                tl.debug_barrier()  # the escapes are written over what is there now
                restore_escapes(record, out, D, 0, k_count, D, K_PLANES, ESCAPES, BUDGET)
            elif KIND == "int8":
                _int8(record, out, D, K_PLANES)
            else:
                _affine(record, out, D, K_PLANES, K_META, RANGES, True)
        else:
            if KIND == "lossless":
                tail = record + ESCAPES[2]
                unpack_side(record, out, D, tail + D // 8, D, False, V_PLANES)
                k_count = tl.load(tail + D // 8 + 1).to(tl.int32)
                v_count = tl.load(tail + D // 8 + 2).to(tl.int32)
                tl.debug_barrier()
                restore_escapes(record, out, D, k_count, v_count, D, V_PLANES, ESCAPES, BUDGET)
            elif KIND == "int8":
                _int8(record, out, D, V_PLANES)
            else:
                _affine(record, out, D, V_PLANES, V_META, RANGES + 8, False)


@triton.jit
def _affine(
    record, out, D: tl.constexpr, PLANES: tl.constexpr, META: tl.constexpr, RANGES: tl.constexpr, BY_CHANNEL: tl.constexpr
):
    token, channel = tl.arange(0, 64), tl.arange(0, D)
    codes = codes_of(record, token[:, None], tl.arange(0, D // 4)[None, :], D, PLANES)
    if BY_CHANNEL:
        scale, minimum = groups_of(record, channel, D, META, RANGES)
        values = tl.fma(codes, tl.broadcast_to(scale[None, :], codes.shape), tl.broadcast_to(minimum[None, :], codes.shape))
    else:
        scale, minimum = groups_of(record, token, 64, META, RANGES)
        values = codes * scale[:, None] + minimum[:, None]
    tl.store(out + token[:, None] * D + channel[None, :], values.to(tl.bfloat16))


@triton.jit
def _int8(record, out, D: tl.constexpr, FIELDS: tl.constexpr):
    token, channel = tl.arange(0, 64), tl.arange(0, D)
    at = token[:, None] * D + channel[None, :]
    codes = tl.load((record + FIELDS[0]).to(tl.pointer_type(tl.int8)) + at).to(tl.float32)
    scale = tl.load((record + FIELDS[1]).to(tl.pointer_type(tl.bfloat16)) + token).to(tl.float32)
    tl.store(out + at, (codes * scale[:, None]).to(tl.bfloat16))
