"""Device code: the one merge at the end. A row's parts over packed pages, its sinks and its dense state become its output.

Parts of affine pages are still rotated: their sum is rotated here, once a row. Sinks, the first tokens of the sequence in
bfloat16, are attended to here. Everything is float32; log-sum-exps are base 2 inside, and `BASE_2` says what the dense state has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_hq.kernels.page_codec.kernel_powers import next_power_of_2

from .kernel_fields import dot

_EMPTY = tl.constexpr(-1.0e30)
_AT_ONCE = tl.constexpr(4)  # parts whose loads are under way together


@triton.jit(do_not_specialize=["scale", "row_words", "sink_words", "sink_slot", "sink_head", "lse_row", "lse_head"])
def merge_states(
    q, work, part_o, part_lse, sinks, signs, dense_o, dense_lse, out, out_lse,
    scale, row_words, sink_words, sink_slot, sink_head, lse_row, lse_head,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SINK_TOKENS: tl.constexpr, HAS_DENSE: tl.constexpr, BASE_2: tl.constexpr, WRITE_LSE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One program a query row and KV_HEADS kv heads. scale: softmax scale times log2(e). row_words, sink_words: header
    offsets (work.py). signs: sign matrix of `BLOCK`, `[D, D] bfloat16`, BLOCK 0 = parts are not rotated. sinks: slots of one
    layer, bytes; dense_o `[rows, Q_HEADS, D]`, dense_lse by strides. out `[rows, Q_HEADS, D]`, out_lse `[rows, Q_HEADS]`, base 2."""
    HEADS: tl.constexpr = max(16, next_power_of_2(GROUP * KV_HEADS))
    row = tl.program_id(0).to(tl.int64)
    local, channel = tl.arange(0, HEADS), tl.arange(0, D)
    inside = local < GROUP * KV_HEADS
    head = tl.program_id(1) * (GROUP * KV_HEADS) + local
    where = head[:, None] * D + channel[None, :]
    mask = inside[:, None]
    first, last = tl.load(work + row_words + row), tl.load(work + row_words + row + 1)

    m = tl.full((HEADS,), _EMPTY, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    o = tl.zeros((HEADS, D), tl.float32)
    for index in range(first, last, _AT_ONCE):
        m0, o0 = _part(work, index, last, part_o, part_lse, head, where, inside, Q_HEADS, D)
        m1, o1 = _part(work, index + 1, last, part_o, part_lse, head, where, inside, Q_HEADS, D)
        m2, o2 = _part(work, index + 2, last, part_o, part_lse, head, where, inside, Q_HEADS, D)
        m3, o3 = _part(work, index + 3, last, part_o, part_lse, head, where, inside, Q_HEADS, D)
        m_new = tl.maximum(m, tl.maximum(tl.maximum(m0, m1), tl.maximum(m2, m3)))
        keep = tl.exp2(m - m_new)
        w0, w1, w2, w3 = tl.exp2(m0 - m_new), tl.exp2(m1 - m_new), tl.exp2(m2 - m_new), tl.exp2(m3 - m_new)
        o = o * keep[:, None] + (o0 * w0[:, None] + o1 * w1[:, None]) + (o2 * w2[:, None] + o3 * w3[:, None])
        total = total * keep + (w0 + w1) + (w2 + w3)
        m = m_new
    if BLOCK > 0:
        if first < last:
            matrix = tl.load(signs + channel[:, None] * D + channel[None, :])
            coarse = o.to(tl.bfloat16)  # two bfloat16 hold 16 of float32's 24 bits: 2**-17 of the largest value in a row
            fine = (o - coarse.to(tl.float32)).to(tl.bfloat16)
            o = dot(fine, matrix, dot(coarse, matrix, None, PTX), PTX) * (1 / BLOCK**0.5)

    if SINK_TOKENS > 0:
        slot = tl.load(work + sink_words + row)
        if slot >= 0:
            query = tl.load(q + row * Q_HEADS * D + where, mask=mask, other=0.0).to(tl.float32)
            start = sinks + slot.to(tl.int64) * sink_slot + tl.program_id(1) * KV_HEADS * sink_head
            sink = (start + local // GROUP * sink_head).to(tl.pointer_type(tl.bfloat16))[:, None] + channel[None, :]
            for token in tl.static_range(SINK_TOKENS):
                key = tl.load(sink + token * D, mask=mask, other=0.0).to(tl.float32)
                value = tl.load(sink + (SINK_TOKENS + token) * D, mask=mask, other=0.0).to(tl.float32)
                score = tl.sum(query * key, 1) * scale
                m_new = tl.maximum(m, score)
                keep, weight = tl.exp2(m - m_new), tl.exp2(score - m_new)
                o = o * keep[:, None] + value * weight[:, None]
                total = total * keep + weight
                m = m_new

    if HAS_DENSE:
        lse = tl.load(dense_lse + row * lse_row + head * lse_head, mask=inside, other=_EMPTY)
        if not BASE_2:
            lse *= 1.4426950408889634
        lse = tl.maximum(lse, _EMPTY)  # -inf: no dense token
        values = tl.load(dense_o + row * Q_HEADS * D + where, mask=mask, other=0.0).to(tl.float32)
        m_new = tl.maximum(m, lse)
        keep, weight = tl.exp2(m - m_new), tl.where(lse > _EMPTY, tl.exp2(lse - m_new), 0.0)
        o = o * keep[:, None] + tl.where((weight > 0)[:, None], values * weight[:, None], 0.0)
        total = total * keep + weight
        m = m_new
    some = total > 0
    o = o / tl.where(some, total, 1.0)[:, None]
    tl.store(out + row * Q_HEADS * D + where, o.to(out.dtype.element_ty), mask=mask)
    if WRITE_LSE:
        lse = tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(out_lse + row * Q_HEADS + head, lse, mask=inside)


@triton.jit
def _part(work, index, last, part_o, part_lse, head, where, inside, Q_HEADS: tl.constexpr, D: tl.constexpr):
    """(log-sum-exp, o) of entry `index` of a row's parts; weightless from `last` on."""
    listed = index < last
    part = tl.load(work + index, mask=listed, other=0).to(tl.int64)
    lse = tl.load(part_lse + part * Q_HEADS + head, mask=inside & listed, other=_EMPTY)
    o = tl.load(part_o + part * Q_HEADS * D + where, mask=inside[:, None] & listed, other=0.0)
    return lse, o
