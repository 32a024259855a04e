"""Device code: decode attention over dense pages of 64 tokens, the private rest of every request. One warp a program.

Once a forward, `plan_dense` lists the pages of all rows, row after row, and deals them out to a fixed number of programs a kv head:
program p has pages [bound(p), bound(p + 1)) of the list, so every program reads about as many bytes, whatever the rows' lengths,
and a launch has the same grid for every batch: CUDA graphs replay it. Once a layer, `attend_dense` reads them.

A program writes one part for every row that its pages belong to: part row + program. In the order of the pages neither row nor
program goes back, and pairs of the two differ in one of them, so row + program grows from pair to pair: no part has two writers. Every
program up to the last one with pages has some, so a row's programs are neighbours, and so are its parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_codes import NO_SCORE
from .kernel_fields import as_operand, dot, exp2, long_at

_LISTED = tl.constexpr(256)  # pages of a row that are listed at a time
# A part is written and merged: so many pages are worth one, and a row has at most so many, on average, as the merge reads them in turn.
_MIN_PAGES, _MOST_PARTS = tl.constexpr(2), tl.constexpr(32)


@triton.jit(do_not_specialize=["row_tokens", "rows"])
def plan_dense(
    req_to_token, requests, starts, lengths, bounds, row_parts, pages, row_tokens, rows,
    PROGRAMS: tl.constexpr, PROGRAM_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row; rows from `rows` on are padding, and nothing of theirs is read. req_to_token `[requests, row_tokens] int32`;
    requests, starts, lengths `[rows]`, starts multiples of 64: row r attends tokens starts[r] to lengths[r] - 1 of its
    request, whose slots are 64 neighbours a page, the first one a multiple of 64.

    bounds `[PROGRAMS + 1] int32`; row_parts `[rows, 2] int32`: first part of each row and the one after its last; pages `int64`:
    slot of the page's last token to read, times 2**32 plus 1 if it is the row's last page, times 2**33 the row."""
    row = tl.program_id(0)
    lane = tl.arange(0, ROW_BLOCK)
    real = lane < rows
    tokens = tl.load(lengths + lane, mask=real, other=0) - tl.load(starts + lane, mask=real, other=0)
    tokens = tl.maximum(tokens.to(tl.int32), 0)
    counts = (tokens + 63) // 64
    total, before = tl.sum(counts, 0), tl.sum(tl.where(lane < row, counts, 0), 0)
    own, own_tokens = tl.sum(tl.where(lane == row, counts, 0), 0), tl.sum(tl.where(lane == row, tokens, 0), 0)

    program = tl.arange(0, PROGRAM_BLOCK)
    workers = tl.minimum(tl.minimum((total + _MIN_PAGES - 1) // _MIN_PAGES, _MOST_PARTS * rows), PROGRAMS)
    workers = tl.maximum(workers, 1)
    bound = (tl.minimum(program, workers).to(tl.int64) * total // workers).to(tl.int32)
    if row == 0:
        tl.store(bounds + program, bound, mask=program <= PROGRAMS)
    later = (program > 0) & (program < PROGRAMS)
    first = tl.sum((later & (bound <= before)).to(tl.int32), 0)  # the program of the row's first page
    last = tl.sum((later & (bound < before + own)).to(tl.int32), 0)
    tl.store(row_parts + 2 * row, row + first)
    tl.store(row_parts + 2 * row + 1, row + tl.where(own > 0, last + 1, first))

    if own > 0:
        table = req_to_token + tl.load(requests + row).to(tl.int64) * row_tokens + tl.load(starts + row)
        for at in range(0, own, _LISTED):
            page = at + tl.arange(0, _LISTED)
            slot = tl.load(table + page * 64, mask=page < own, other=0) + tl.minimum(own_tokens - page * 64, 64) - 1
            entry = (2 * row + (page == own - 1).to(tl.int32)).to(tl.int64) << 32 | slot.to(tl.int64)
            tl.store(pages + before + page, entry, mask=page < own)


@triton.jit(do_not_specialize=["scale"])
def attend_dense(
    q, k, v, bounds, pages, part_o, part_lse, scale,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """q `[rows, Q_HEADS, D]`, k, v `[slots, kv heads, D]`, bfloat16, one layer; bounds, pages: `plan_dense`; part_o
    `[parts, Q_HEADS, D]`, part_lse `[parts, Q_HEADS] float32`, base 2. scale: softmax scale times log2(e).
    ROWS: GROUP padded to a tile. Grid: PROGRAMS x kv heads."""
    program, head = tl.program_id(0) % PROGRAMS, tl.program_id(0) // PROGRAMS
    TOKEN: tl.constexpr = Q_HEADS // GROUP * D  # from one token to the next
    row, token, channel = tl.arange(0, ROWS), tl.arange(0, 64), tl.arange(0, D)
    mine = row < GROUP
    q_head = head * GROUP + row
    of_page = token[:, None] * TOKEN + head * D + channel[None, :]
    o = tl.zeros((D, ROWS), tl.float32)
    m, total = tl.full((ROWS,), NO_SCORE, tl.float32), tl.zeros((ROWS,), tl.float32)
    first, last = tl.load(bounds + program), tl.load(bounds + program + 1)
    for i in tl.range(first, last, num_stages=STAGES):
        entry = long_at(pages, i, PTX)
        query_row, slot, last_token = entry >> 33, entry & 0x7FFFFFC0, (entry & 63).to(tl.int32)
        # The queries come with every page: then pages of the next row are under way while a row ends.
        of_row = query_row * (Q_HEADS * D) + q_head[:, None] * D + channel[None, :]
        query = tl.load(q + of_row, mask=mine[:, None], other=0.0)
        # Behind a row's last token may be anything, NaN too: it is not read, and has no weight.
        there = token <= last_token
        keys = tl.load(k + slot * TOKEN + of_page, mask=there[:, None], other=0.0)
        values = tl.load(v + slot * TOKEN + tl.trans(of_page), mask=there[None, :], other=0.0)
        s = tl.where(there[:, None], dot(keys, tl.trans(query), None, PTX) * scale, NO_SCORE)
        m_new = tl.maximum(m, tl.max(s, 0))
        keep, p = exp2(m - m_new, PTX), exp2(s - m_new[None, :], PTX)
        m, total = m_new, total * keep + tl.sum(p, 0)
        o = dot(values, as_operand(p.to(tl.bfloat16), PTX), o * keep[None, :], PTX)
        if ((entry >> 32) & 1) != 0 or i + 1 == last:
            part = (query_row + program) * Q_HEADS + q_head
            tl.store(part_o + part[None, :] * D + channel[:, None], o * (1.0 / total)[None, :], mask=mine[None, :])
            tl.store(part_lse + part, m + tl.log2(total), mask=mine)
            o = tl.zeros((D, ROWS), tl.float32)
            m, total = tl.full((ROWS,), NO_SCORE, tl.float32), tl.zeros((ROWS,), tl.float32)
