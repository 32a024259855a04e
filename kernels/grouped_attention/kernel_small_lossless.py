"""Device code: kernel_small.py's lossless pages, half a page a step, so that eight programs fit an SM's shared memory.

A value is sign and mantissa times 2**-code times 2**(base - 127): the first two become a bfloat16 in registers, four values
at a time, and the bases go into q (K, eight channels share one) and into p (V, one a page). Both are products with powers of
two, so K and V count exactly as they are, but for what lies below float32's smallest normal number, 2**-126.

Escapes (code 15) are read as 2**-15, which half of them are. For the others, one at a time, q or p times the difference is
added to the score or output that it belongs to, in float32.

A step is tokens 16 h .. 16 h + 15 and 16 h + 32 .. 16 h + 47 of half h: they share rows of the exponent plane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_codes import NO_SCORE, ROWS, TILE, as_result, rows_of
from .kernel_fields import dot, exp2, field, page_at, restore_pair, times, to_bfloat16

BATCH = tl.constexpr(32)  # escapes looked at together: one a lane


@triton.jit
def attend_lossless(
    even, odd, source, inside, base, pages, count, record_page, scale, D: tl.constexpr, K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr, META: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """As kernel_small.py `_coded`. FIELDS: byte offsets of raw bytes and exponent plane; META: of the escapes' positions,
    exponents and tail, and their greatest number. scale is positive."""
    HALF: tl.constexpr = D // 2
    RAW: tl.constexpr = (K_FIELDS[0], V_FIELDS[0])
    word = tl.arange(0, HALF)
    even = to_bfloat16(as_result(even.to(tl.float32), PTX), PTX)
    odd = to_bfloat16(as_result(odd.to(tl.float32), PTX), PTX)
    o0, o1 = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    total = tl.zeros((ROWS, TILE), tl.float32)
    m = tl.full((ROWS,), NO_SCORE, tl.float32)
    k_bases, v_base, k_count, v_count, position, exponent = _heading(base + page_at(pages, 0, PTX) * record_page, word, D, META)
    for i in tl.range(0, 2 * count, num_stages=STAGES):
        half = i % 2
        record = tl.multiple_of(base + page_at(pages, i // 2, PTX) * record_page, 16)
        step = record + tl.multiple_of(half * (TILE * D), 16)
        k_low, k_high = rows_of(step + K_FIELDS[0], 0, word, HALF), rows_of(step + K_FIELDS[0], 2 * TILE, word, HALF)
        k_plane = rows_of(step + K_FIELDS[1], 0, word, HALF)
        values = k_count + v_count
        change, k_wrong, v_wrong = _wrong(record, position, exponent, 0, k_count, values, half, D, RAW, META[2])

        gain = field(k_bases[None, :], -7, 0x7F80, 0, PTX).to(tl.bfloat16, bitcast=True)
        a0, a1 = times(even, gain, PTX), times(odd, gain, PTX)
        b0, b1 = restore_pair(k_low, k_plane, 0, PTX)
        s0 = dot(a1, tl.trans(b1), dot(a0, tl.trans(b0), None, PTX), PTX)
        b0, b1 = restore_pair(k_high, k_plane, 4, PTX)
        s1 = dot(a1, tl.trans(b1), dot(a0, tl.trans(b0), None, PTX), PTX)
        if k_wrong != 0:
            s0, s1 = _mend_scores(s0, s1, source, inside, position, change, k_wrong, half, D)
        if k_count > BATCH:
            for first in tl.range(BATCH, k_count, BATCH, num_stages=1):
                at, exponents = _list(record, first, META)
                changes, wrong, _ = _wrong(record, at, exponents, first, k_count, values, half, D, RAW, META[2])
                s0, s1 = _mend_scores(s0, s1, source, inside, at, changes, wrong, half, D)

        # Here, the rest of a step hides its way from memory, and fewer registers are taken than before the scores. V's rows are
        # read after the softmax for the same reason.
        upcoming = _heading(base + page_at(pages, tl.minimum((i + 1) // 2, count - 1), PTX) * record_page, word, D, META)
        m_new = tl.maximum(m, tl.max(tl.maximum(s0, s1), 1) * scale)
        keep = exp2(m - m_new, PTX)
        m = m_new
        # As results, p is computed once, not again in the layout of an operand.
        p0 = as_result(exp2(s0 * scale - m[:, None], PTX), PTX)
        p1 = as_result(exp2(s1 * scale - m[:, None], PTX), PTX)
        o0, o1, total = o0 * keep[:, None], o1 * keep[:, None], total * keep[:, None] + (p0 + p1)
        v_low, v_high = rows_of(step + V_FIELDS[0], 0, word, HALF), rows_of(step + V_FIELDS[0], 2 * TILE, word, HALF)
        v_plane = rows_of(step + V_FIELDS[1], 0, word, HALF)
        unit = tl.full((ROWS, TILE), v_base << 7, tl.int16).to(tl.bfloat16, bitcast=True)
        w0, w1 = times(to_bfloat16(p0, PTX), unit, PTX), times(to_bfloat16(p1, PTX), unit, PTX)
        b0, b1 = restore_pair(v_low, v_plane, 0, PTX)
        o0, o1 = dot(w0, b0, o0, PTX), dot(w0, b1, o1, PTX)
        b0, b1 = restore_pair(v_high, v_plane, 4, PTX)
        o0, o1 = dot(w1, b0, o0, PTX), dot(w1, b1, o1, PTX)
        if v_wrong != 0:
            o0, o1 = _mend_output(o0, o1, p0, p1, position, change, v_wrong, half, word, D)
        if values > BATCH:
            for first in tl.range(BATCH, values, BATCH, num_stages=1):
                at, exponents = _list(record, first, META)
                changes, _, wrong = _wrong(record, at, exponents, first, k_count, values, half, D, RAW, META[2])
                o0, o1 = _mend_output(o0, o1, p0, p1, at, changes, wrong, half, word, D)
        k_bases, v_base, k_count, v_count, position, exponent = upcoming
    return o0, o1, m, tl.sum(total, 1)


@triton.jit
def _heading(record, word, D: tl.constexpr, META: tl.constexpr):
    """What a step needs at once of its page, so it is read a step early: base of each word's channels (int16) and of V,
    escapes of K and of V, the first entries of their list (int32)."""
    tail = record + META[2]
    position, exponent = _list(record, 0, META)
    v_base, k_count, v_count = tl.load(tail + D // 8), tl.load(tail + D // 8 + 1), tl.load(tail + D // 8 + 2)
    k_bases = tl.load(tail + word // 4).to(tl.int16)
    return k_bases, v_base.to(tl.int32), k_count.to(tl.int32), v_count.to(tl.int32), position, exponent


@triton.jit
def _list(record, first, META: tl.constexpr):
    """Positions and exponents of BATCH entries of the list from `first`, int32."""
    entry = first + tl.arange(0, BATCH)
    position = tl.load((record + META[0]).to(tl.pointer_type(tl.uint16)) + entry, mask=entry < META[3], other=0)
    return position.to(tl.int32), tl.load(record + META[1] + entry, mask=entry < META[3], other=0).to(tl.int32)


@triton.jit
def _wrong(
    record, position, exponent, first, k_count, values, half, D: tl.constexpr, RAW: tl.constexpr, TAIL: tl.constexpr
):
    """Of entries from `first`: true minus restored value, float32, and which of K and which of V need it in this step, a bit
    each. RAW, TAIL: byte offsets of sign and mantissa bytes and of the bases. A base below 15 has no escapes but NaN and
    infinity: what is restored for them does not count."""
    entry = first + tl.arange(0, BATCH)
    is_k, listed = entry < k_count, entry < values
    raw = tl.load(record + tl.where(is_k, RAW[0], RAW[1]) + position, mask=listed, other=0).to(tl.int32)
    base = tl.load(record + TAIL + tl.where(is_k, position % D // 8, D // 8), mask=listed, other=0).to(tl.int32)
    rest = (raw & 0x7F) << 16 | (raw & 0x80) << 24
    lowest = tl.maximum(base - 15, 0)
    change = (rest | exponent << 23).to(tl.float32, bitcast=True) - (rest | lowest << 23).to(tl.float32, bitcast=True)
    needed = listed & (exponent != lowest) & (position // (TILE * D) % 2 == half)
    bit = tl.where(needed, 1 << tl.arange(0, BATCH), 0)
    return change, tl.sum(tl.where(is_k, bit, 0), 0), tl.sum(tl.where(is_k, 0, bit), 0)


@triton.jit
def _first(wrong, position, change):
    """Position and change of the entry of the lowest bit of `wrong`."""
    chosen = (1 << tl.arange(0, BATCH)) == (wrong & -wrong)
    bits = tl.sum(tl.where(chosen, change.to(tl.int32, bitcast=True), 0), 0)
    return tl.sum(tl.where(chosen, position, 0), 0), bits.to(tl.float32, bitcast=True)


@triton.jit
def _mend_scores(s0, s1, source, inside, position, change, wrong, half, D: tl.constexpr):
    """Scores of both tiles of a step, plus q times the change of K of the entries of `wrong`."""
    while wrong != 0:
        at, amount = _first(wrong, position, change)
        query = tl.load(source + at % D, mask=inside, other=0.0).to(tl.float32)[:, None]
        token = at // D - TILE * half - tl.arange(0, TILE)[None, :]
        s0 += query * tl.where(token == 0, amount, 0.0)
        s1 += query * tl.where(token == 2 * TILE, amount, 0.0)
        wrong &= wrong - 1
    return s0, s1


@triton.jit
def _mend_output(o0, o1, p0, p1, position, change, wrong, half, word, D: tl.constexpr):
    """o of even and odd channels, plus p, rounded as in the product with V, times the change of V of the entries of `wrong`."""
    while wrong != 0:
        at, amount = _first(wrong, position, change)
        token = at // D - TILE * half - tl.arange(0, TILE)[None, :]
        p = tl.sum(tl.where(token == 0, p0, 0.0) + tl.where(token == 2 * TILE, p1, 0.0), 1)
        p = p.to(tl.bfloat16).to(tl.float32)[:, None]
        amount = tl.where(word == at % D // 2, amount, 0.0)[None, :]
        if at % 2 == 0:
            o0 += p * amount
        else:
            o1 += p * amount
        wrong &= wrong - 1
    return o0, o1
