"""Device code: attention of at most 16 query rows over packed pages, straight from the packed bytes. One warp a program.

The rows of an item are (request, query head) pairs of one kv head, padded to 16 or, of affine and int8 pages, to 8: there the
codes are the left operands of both products, scores^T = K q^T and o^T = V^T p^T, and 8 columns the smallest tile of a tensor
core; half the products, scores and registers of 16. A program walks the pages of its items with the flash recurrence; scales
never touch the codes:

    K, scale and minimum per channel:  q . k = sum (q_c scale_c) code_c + sum q_c min_c         folded into q, once a page
    V, scale and minimum per token:    sum p_t v_t = sum (p_t scale_t) code_t + sum p_t min_t   folded into p
    int8, a scale per token:           the same without minimum; its codes are read as code + 128

V stays rotated: the merge rotates a row once. Codes are float16 subnormals (kernel_fields.py), q is float16 times a
power of two, which is exact for bfloat16. `bf16` and `lossless` pages are attended in bfloat16, every bit of K and V kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_codes import (
    NO_SCORE, PEAK, TILE, as_result, codes, four, largest_byte, lift, number, planes, power_of_two, side_ranges, side_words,
)  # fmt: skip
from .kernel_fields import CODE_UNIT, as_operand, byte_at, dot, exp2, field, half, page_at
from .kernel_small_lossless import attend_lossless


@triton.jit(do_not_specialize=["record_page", "record_head", "scale"])
def attend_small(
    q, records, work, part_o, part_lse, record_page, record_head, scale,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, META: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr,
    FIRST: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """q `[rows, Q_HEADS, D] bfloat16`; records `[pages, heads, record_bytes] uint8` of one layer, strides multiples of 16;
    work: work.py, FIRST = where its program list of this kernel starts; part_o `[parts, Q_HEADS, D]`, part_lse
    `[parts, Q_HEADS] float32`, base 2. scale: softmax scale times log2(e). FIELDS, META: byte offsets, SINKS: most
    tokens of a page that `skip` may leave out (launcher.py).
    Grid: PROGRAMS x kv heads."""
    program, head = tl.program_id(0) % PROGRAMS, tl.program_id(0) // PROGRAMS
    HALF: tl.constexpr = D // 2
    base = records + head.to(tl.int64) * record_head
    row = tl.arange(0, ROWS)
    q_head = head * GROUP + row % GROUP
    for at in range(tl.load(work + FIRST + program), tl.load(work + FIRST + program + 1), 8):
        item = work + at
        pages, count = work + tl.load(item), tl.load(item + 1)
        q_rows, rows = work + tl.load(item + 2), tl.load(item + 3) * GROUP
        part, skip = tl.load(item + 4) + row // GROUP, tl.load(item + 5)
        inside = row < rows
        token = tl.load(q_rows + row // GROUP, mask=inside, other=0).to(tl.int64)
        source = q + (token * Q_HEADS + q_head) * D
        target = part_o + (part.to(tl.int64) * Q_HEADS + q_head) * D
        if KIND == "bf16":
            channel = tl.arange(0, D)
            query = tl.load(source[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
            o, m, total = _bf16(query, base, pages, count, record_page, scale, D, K_FIELDS, V_FIELDS, STAGES, PTX)
            tl.store(target[:, None] + channel[None, :], o / total[:, None], mask=inside[:, None])
        else:
            pair = 2 * tl.arange(0, HALF)
            if KIND == "lossless":
                even = tl.load(source[:, None] + pair[None, :], mask=inside[:, None], other=0.0)
                odd = tl.load(source[:, None] + pair[None, :] + 1, mask=inside[:, None], other=0.0)
                o0, o1, m, total = attend_lossless(
                    even, odd, source, inside, base, pages, count, record_page, scale, D, K_FIELDS, V_FIELDS, META, STAGES, PTX
                )  # fmt: skip
                tl.store(target[:, None] + pair[None, :], o0 / total[:, None], mask=inside[:, None])
                tl.store(target[:, None] + pair[None, :] + 1, o1 / total[:, None], mask=inside[:, None])
            else:
                even = tl.load(source[None, :] + pair[:, None], mask=inside[None, :], other=0.0)
                odd = tl.load(source[None, :] + pair[:, None] + 1, mask=inside[None, :], other=0.0)
                o0, o1, m, total = _coded(
                    even, odd, base, pages, count, skip, record_page, scale, ROWS, D, KIND, K_BITS, V_BITS, K_FIELDS, V_FIELDS,
                    META, SINKS, STAGES, PTX,
                )  # fmt: skip
                tl.store(target[None, :] + pair[:, None], o0 / total[None, :], mask=inside[None, :])
                tl.store(target[None, :] + pair[:, None] + 1, o1 / total[None, :], mask=inside[None, :])
        tl.store(part_lse + part.to(tl.int64) * Q_HEADS + q_head, m + tl.log2(total), mask=inside)


@triton.jit
def _coded(
    even, odd, base, pages, count, skip, record_page, scale, ROWS: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, META: tl.constexpr,
    SINKS: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Kinds affine and int8: o of even and of odd channels, `[D / 2, ROWS]`, running maximum (base 2), sum. even, odd:
    `[D / 2, ROWS]`. META, affine: byte offsets of K scale codes, K minimum codes, V scale codes, V minimum codes, ranges;
    int8: of K scales, V scales."""
    HALF: tl.constexpr = D // 2
    FLIP: tl.constexpr = 0x80 if KIND == "int8" else 0
    word, token = tl.arange(0, HALF), tl.arange(0, TILE)
    even, odd = as_result(even.to(tl.float32), PTX), as_result(odd.to(tl.float32), PTX)
    largest = tl.maximum(tl.max(tl.abs(even), 0), tl.max(tl.abs(odd), 0))
    unit = PEAK / power_of_two(tl.maximum(largest, 2.0**-60))
    q_sum = tl.sum(even + odd, 0) * scale
    even, odd = as_operand((even * unit[None, :]).to(tl.float16), PTX), as_operand((odd * unit[None, :]).to(tl.float16), PTX)
    per_unit = scale / unit

    o0, o1 = tl.zeros((HALF, ROWS), tl.float32), tl.zeros((HALF, ROWS), tl.float32)
    shift, total = tl.zeros((TILE, ROWS), tl.float32), tl.zeros((TILE, ROWS), tl.float32)
    m = tl.full((ROWS,), NO_SCORE, tl.float32)
    v_unit = 2.0**-100  # o is in units of the largest V scale so far
    first = base + page_at(pages, 0, PTX) * record_page
    k_ranges, v_ranges = side_ranges(first, KIND, META)
    v_words = side_words(first, KIND, META, PTX)
    for i in tl.range(0, count, num_stages=STAGES):
        record = tl.multiple_of(base + page_at(pages, i, PTX) * record_page, 16)
        k0, k1, k2, k3 = planes(record, word, HALF, K_BITS, K_FIELDS, False, PTX)
        v0, v1, v2, v3 = planes(record, word, HALF, V_BITS, V_FIELDS, True, PTX)
        if KIND == "affine":
            # Ranges come a page early, and so do the words of V's scales and minima: then their bytes are in the L1 cache.
            ks_base, ks_step, km_base, km_step = four(k_ranges)
            vs_base, vs_step, vm_base, vm_step = four(v_ranges)
            vs_most = vs_base + largest_byte(tl.where(tl.arange(0, 32) < 16, v_words, 0)) * vs_step
            following = base + page_at(pages, tl.minimum(i + 1, count - 1), PTX) * record_page
            k_ranges, v_ranges = side_ranges(following, KIND, META)
            v_words = side_words(following, KIND, META, PTX)
            k_scale = tl.load((record + META[0]).to(tl.pointer_type(tl.int16)) + word)
            k_min = tl.load((record + META[1]).to(tl.pointer_type(tl.int16)) + word)
            # Scales relative to twice the page's largest possible one: at most 1/2 in float16.
            ks_most = tl.maximum(ks_base + 255.0 * ks_step, 2.0**-100)
            step, offset = (ks_step / ks_most * 2.0**23).to(tl.float16), (ks_base / ks_most * 0.5).to(tl.float16)
            a0 = even * (half(field(k_scale, 0, 0xFF, 0, PTX)) * step + offset)[:, None]
            a1 = odd * (half(field(k_scale, 8, 0xFF, 0, PTX)) * step + offset)[:, None]
            low, high = half(field(k_min, 0, 0xFF, 0, PTX)), half(field(k_min, 8, 0xFF, 0, PTX))
            mins = dot(tl.broadcast_to(low[None, :], (TILE, HALF)), even, None, PTX)
            mins = dot(tl.broadcast_to(high[None, :], (TILE, HALF)), odd, mins, PTX)
            bias = mins * (km_step * CODE_UNIT * per_unit)[None, :] + (km_base * q_sum)[None, :]
            gain = per_unit * (2.0 * CODE_UNIT * ks_most)
            s0 = _scores(a0, a1, k0, k1, k2, k3, 0, K_BITS, 0, PTX) * gain[None, :] + bias
            s1 = _scores(a0, a1, k0, k1, k2, k3, 1, K_BITS, 0, PTX) * (gain * lift(1, K_BITS))[None, :] + bias
            s2 = _scores(a0, a1, k0, k1, k2, k3, 2, K_BITS, 0, PTX) * (gain * lift(2, K_BITS))[None, :] + bias
            s3 = _scores(a0, a1, k0, k1, k2, k3, 3, K_BITS, 0, PTX) * (gain * lift(3, K_BITS))[None, :] + bias
            left_out = tl.where(i == 0, skip, 0)
            if SINKS > 0:
                s0 = tl.where((token >= left_out)[:, None], s0, NO_SCORE)
            if SINKS > TILE:
                s1 = tl.where((token >= left_out - TILE)[:, None], s1, NO_SCORE)
            if SINKS > 2 * TILE:
                s2 = tl.where((token >= left_out - 2 * TILE)[:, None], s2, NO_SCORE)
            if SINKS > 3 * TILE:
                s3 = tl.where((token >= left_out - 3 * TILE)[:, None], s3, NO_SCORE)
        else:
            scales = (record + META[0]).to(tl.pointer_type(tl.bfloat16)) + token
            gain, bias = (per_unit * CODE_UNIT)[None, :], (-128.0 * q_sum)[None, :]
            s0 = (_scores(even, odd, k0, k1, k2, k3, 0, 8, FLIP, PTX) * gain + bias) * tl.load(scales).to(tl.float32)[:, None]
            s1 = (_scores(even, odd, k0, k1, k2, k3, 1, 8, FLIP, PTX) * gain + bias) * tl.load(scales + 16).to(tl.float32)[:, None]
            s2 = (_scores(even, odd, k0, k1, k2, k3, 2, 8, FLIP, PTX) * gain + bias) * tl.load(scales + 32).to(tl.float32)[:, None]
            s3 = (_scores(even, odd, k0, k1, k2, k3, 3, 8, FLIP, PTX) * gain + bias) * tl.load(scales + 48).to(tl.float32)[:, None]
            vs_most = tl.max(tl.load((record + META[1]).to(tl.pointer_type(tl.bfloat16)) + tl.arange(0, 64)).to(tl.float32), 0)
        m_new = tl.maximum(m, tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 0))
        keep = exp2(m - m_new, PTX)
        m = m_new
        unit_new = tl.maximum(v_unit, vs_most)
        o_keep = keep * (v_unit / unit_new)
        v_unit = unit_new
        o0, o1 = o0 * o_keep[None, :], o1 * o_keep[None, :]
        shift, total = shift * keep[None, :], total * keep[None, :]
        for j in tl.static_range(4):
            p = exp2((s0 if j == 0 else s1 if j == 1 else s2 if j == 2 else s3) - m[None, :], PTX)
            if KIND == "affine":
                scales = vs_base + number(byte_at(record + META[2] + TILE * j + token, PTX)) * vs_step
                mins = vm_base + number(byte_at(record + META[3] + TILE * j + token, PTX)) * vm_step
            else:
                scales = tl.load((record + META[1]).to(tl.pointer_type(tl.bfloat16)) + TILE * j + token).to(tl.float32)
                mins = -128.0 * scales
            total += p
            shift += p * mins[:, None]
            w = as_operand((p * (scales * (PEAK / v_unit * lift(j, V_BITS)))[:, None]).to(tl.float16), PTX)
            o0 = dot(half(codes(v0, v1, v2, v3, j, 0, V_BITS, FLIP, PTX)), w, o0, PTX)
            o1 = dot(half(codes(v0, v1, v2, v3, j, 1, V_BITS, FLIP, PTX)), w, o1, PTX)
    back, constant = v_unit * (CODE_UNIT / PEAK), tl.sum(shift, 0)[None, :]
    return o0 * back + constant, o1 * back + constant, m, tl.sum(total, 0)


@triton.jit
def _scores(a0, a1, k0, k1, k2, k3, J: tl.constexpr, BITS: tl.constexpr, FLIP: tl.constexpr, PTX: tl.constexpr):
    s = dot(half(codes(k0, k1, k2, k3, J, 0, BITS, FLIP, PTX)), a0, None, PTX)
    return dot(half(codes(k0, k1, k2, k3, J, 1, BITS, FLIP, PTX)), a1, s, PTX)


@triton.jit
def _bf16(
    query, base, pages, count, record_page, scale, D: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Kind bf16: o, running maximum, sum."""
    token, channel = tl.arange(0, 64), tl.arange(0, D)
    where = token[:, None] * D + channel[None, :]
    ROWS: tl.constexpr = query.shape[0]
    o = tl.zeros((ROWS, D), tl.float32)
    m, total = tl.full((ROWS,), NO_SCORE, tl.float32), tl.zeros((ROWS,), tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        record = tl.multiple_of(base + page_at(pages, i, PTX) * record_page, 16)
        k = tl.load((record + K_FIELDS[0]).to(tl.pointer_type(tl.bfloat16)) + where)
        v = tl.load((record + V_FIELDS[0]).to(tl.pointer_type(tl.bfloat16)) + where)
        s = dot(query, tl.trans(k), None, PTX) * scale
        m_new = tl.maximum(m, tl.max(s, 1))
        keep, p = exp2(m - m_new, PTX), exp2(s - m_new[:, None], PTX)
        m, total = m_new, total * keep + tl.sum(p, 1)
        o = dot(p.to(tl.bfloat16), v, o * keep[:, None], PTX)
    return o, m, total
