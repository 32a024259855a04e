"""Device code: kernel_small.py's lossless pages. Exponents are put back in registers, escapes are added as differences."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_codes import (
    NO_SCORE, ROWS, TILE, as_result, escape_counts, escape_list, escapes, restore, rows_of,
)  # fmt: skip
from .kernel_fields import dot, exp2, page_at


@triton.jit
def attend_lossless(
    even, odd, source, inside, base, pages, count, record_page, scale, D: tl.constexpr, K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr, META: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """As kernel_small.py `_coded`. FIELDS: byte offsets of raw bytes and exponent plane; META: of the escapes' positions,
    exponents and tail, and their greatest number. Escapes are attended to as restored, and the difference is added: the first
    16, more than a page of a real model has, always, so that nothing waits for them, others where there are any."""
    HALF: tl.constexpr = D // 2
    BUDGET: tl.constexpr = META[3]
    word = tl.arange(0, HALF)
    even, odd = as_result(even.to(tl.float32), PTX).to(tl.bfloat16), as_result(odd.to(tl.float32), PTX).to(tl.bfloat16)
    o0, o1 = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    total = tl.zeros((ROWS, TILE), tl.float32)
    m = tl.full((ROWS,), NO_SCORE, tl.float32)
    upcoming = base + page_at(pages, 0, PTX) * record_page
    position, exponent = escape_list(upcoming, 0, META, BUDGET)
    k_count, v_count = escape_counts(upcoming, META[2], D)
    for i in tl.range(0, count, num_stages=STAGES):
        record = tl.multiple_of(base + page_at(pages, i, PTX) * record_page, 16)
        token, channel, k_change, v_change = escapes(
            record, position, exponent, 0, k_count, v_count, D, K_FIELDS[0], V_FIELDS[0], META[2]
        )
        picked = _picked(source, inside, channel, k_change)
        guard = (tl.load(record + META[2] + word // 4).to(tl.int32) << 7 | 0x8000).to(tl.int16)
        k_plane, k_plane_up = rows_of(record + K_FIELDS[1], 0, word, HALF), rows_of(record + K_FIELDS[1], 16, word, HALF)
        s = ()
        for j in tl.static_range(4):
            raw = rows_of(record + K_FIELDS[0], TILE * j, word, HALF)
            tile = k_plane if j % 2 == 0 else k_plane_up
            bases = tl.broadcast_to(guard[None, :], raw.shape)
            part = dot(even, tl.trans(restore(raw, tile, bases, 4 * (j // 2), False, PTX)), None, PTX)
            part = dot(odd, tl.trans(restore(raw, tile, bases, 4 * (j // 2) + 8, True, PTX)), part, PTX)
            s = s + (dot(picked, _hot(token, TILE * j), part, PTX),)
        s0, s1, s2, s3 = s[0], s[1], s[2], s[3]
        for first in tl.static_range(16, BUDGET, 16):
            if k_count > first:
                more, exponents = escape_list(record, first, META, BUDGET)
                at_token, at_channel, change, _ = escapes(
                    record, more, exponents, first, k_count, v_count, D, K_FIELDS[0], V_FIELDS[0], META[2]
                )
                others = _picked(source, inside, at_channel, change)
                s0 = dot(others, _hot(at_token, 0), s0, PTX)
                s1 = dot(others, _hot(at_token, 16), s1, PTX)
                s2 = dot(others, _hot(at_token, 32), s2, PTX)
                s3 = dot(others, _hot(at_token, 48), s3, PTX)
        s0, s1, s2, s3 = s0 * scale, s1 * scale, s2 * scale, s3 * scale
        m_new = tl.maximum(m, tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 1))
        keep = exp2(m - m_new, PTX)
        m = m_new
        o0, o1, total = o0 * keep[:, None], o1 * keep[:, None], total * keep[:, None]
        guard = (tl.load(record + META[2] + D // 8).to(tl.int32) << 7 | 0x8000).to(tl.int16)
        v_plane, v_plane_up = rows_of(record + V_FIELDS[1], 0, word, HALF), rows_of(record + V_FIELDS[1], 16, word, HALF)
        p = ()
        for j in tl.static_range(4):
            weight = exp2((s0 if j == 0 else s1 if j == 1 else s2 if j == 2 else s3) - m[:, None], PTX)
            total += weight
            weight = weight.to(tl.bfloat16)
            p = p + (weight,)
            raw = rows_of(record + V_FIELDS[0], TILE * j, word, HALF)
            tile = v_plane if j % 2 == 0 else v_plane_up
            bases = tl.zeros((TILE, HALF), tl.int16) + guard
            o0 = dot(weight, restore(raw, tile, bases, 4 * (j // 2), False, PTX), o0, PTX)
            o1 = dot(weight, restore(raw, tile, bases, 4 * (j // 2) + 8, True, PTX), o1, PTX)
        o0, o1 = _add_escapes(p, token, channel, v_change, o0, o1, word, PTX)
        for first in tl.static_range(16, BUDGET, 16):
            if k_count + v_count > first:
                more, exponents = escape_list(record, first, META, BUDGET)
                at_token, at_channel, _, change = escapes(
                    record, more, exponents, first, k_count, v_count, D, K_FIELDS[0], V_FIELDS[0], META[2]
                )
                o0, o1 = _add_escapes(p, at_token, at_channel, change, o0, o1, word, PTX)
        upcoming = base + page_at(pages, tl.minimum(i + 1, count - 1), PTX) * record_page
        position, exponent = escape_list(upcoming, 0, META, BUDGET)
        k_count, v_count = escape_counts(upcoming, META[2], D)
    return o0, o1, m, tl.sum(total, 1)


@triton.jit
def _picked(source, inside, channel, change):
    """`[ROWS, entries] bfloat16`: each row's query in the entry's channel, times the change of K there."""
    values = tl.load(source[:, None] + channel[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    return (values * change[None, :]).to(tl.bfloat16)


@triton.jit
def _add_escapes(p, token, channel, change, o0, o1, word, PTX: tl.constexpr):
    """o of even and odd channels plus p of the entry's token times the change of V in the entry's channel."""
    of = dot(p[0], tl.trans(_hot(token, 0)), None, PTX)
    of = dot(p[1], tl.trans(_hot(token, 16)), of, PTX)
    of = dot(p[2], tl.trans(_hot(token, 32)), of, PTX)
    of = (dot(p[3], tl.trans(_hot(token, 48)), of, PTX) * change[None, :]).to(tl.bfloat16)
    o0 = dot(of, (channel[:, None] == 2 * word[None, :]).to(tl.bfloat16), o0, PTX)
    return o0, dot(of, (channel[:, None] == 2 * word[None, :] + 1).to(tl.bfloat16), o1, PTX)


@triton.jit
def _hot(token, FIRST: tl.constexpr):
    """`[entries, TILE] bfloat16`: 1 where the entry's token is FIRST + column."""
    return (token[:, None] == FIRST + tl.arange(0, TILE)[None, :]).to(tl.bfloat16)
