"""Device code: attention of many query rows over bf16 pages. A tile of 128 (request, query head) pairs of one kv head.

Pages of format `bf16`, or others expanded first (kernel_expand.py). Bound by tensor cores, not by bytes: all rows of a group
meet a page while it is in shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_codes import NO_SCORE
from .kernel_fields import dot, exp2, page_at


@triton.jit(do_not_specialize=["page_stride", "head_stride", "scale"])
def attend_large(
    q, pages_kv, work, part_o, part_lse, page_stride, head_stride, scale,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """pages_kv `[pages, heads, 2, 64, D] bfloat16`, strides of the first two in values; ROWS pairs a tile. Two pages a step. Other arguments as
    in kernel_small.py."""
    program, head = tl.program_id(0) % PROGRAMS, tl.program_id(0) // PROGRAMS
    base = pages_kv + head.to(tl.int64) * head_stride
    row, channel, token = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, 128)
    q_head = head * GROUP + row % GROUP
    for at in range(tl.load(work + FIRST + program), tl.load(work + FIRST + program + 1), 8):
        item = work + at
        pages, count = work + tl.load(item), tl.load(item + 1)
        q_rows, rows = work + tl.load(item + 2), tl.load(item + 3) * GROUP
        part, skip = tl.load(item + 4) + row // GROUP, tl.load(item + 5)
        inside = row < rows
        q_token = tl.load(q_rows + row // GROUP, mask=inside, other=0).to(tl.int64)
        source = q + (q_token * Q_HEADS + q_head) * D
        query = tl.load(source[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
        o, total = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS,), tl.float32)
        m = tl.full((ROWS,), NO_SCORE, tl.float32)
        for i in tl.range(0, count, 2, num_stages=STAGES):
            low = base + page_at(pages, i, PTX) * page_stride
            high = base + page_at(pages, tl.minimum(i + 1, count - 1), PTX) * page_stride - 64 * D
            page = tl.multiple_of(tl.where(token < 64, low, high), 16)
            where = page[:, None] + token[:, None] * D + channel[None, :]
            s = dot(query, tl.trans(tl.load(where)), None, PTX)
            first, last = tl.where(i == 0, skip, 0), tl.where(i + 1 < count, 128, 64)
            s += tl.where((token >= first) & (token < last), 0.0, NO_SCORE)[None, :]
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
            keep, p = exp2(m - m_new, PTX), exp2(s * scale - m_new[:, None], PTX)
            m, total = m_new, total * keep + tl.sum(p, 1)
            o = dot(p.to(tl.bfloat16), tl.load(where + 64 * D), o * keep[:, None], PTX)
        target = part_o + (part.to(tl.int64) * Q_HEADS + q_head) * D
        tl.store(target[:, None] + channel[None, :], o / total[:, None], mask=inside[:, None])
        tl.store(part_lse + part.to(tl.int64) * Q_HEADS + q_head, m + tl.log2(total), mask=inside)
