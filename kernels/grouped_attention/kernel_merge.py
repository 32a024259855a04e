"""Device code: the one merge at the end. A row's parts over packed pages, its sinks and its dense rest become its output. The dense
rest is a state, from another library, or the row's parts over dense pages (kernel_dense.py).

Parts of affine pages are still rotated: their sum is rotated here, once a row. Sinks, the first tokens of the sequence in
bfloat16, are attended to here. Everything is float32; log-sum-exps are base 2 inside, and `BASE_2` says what the dense state has.

A row has a few KB, so time is latency: what does not depend on the parts is asked for before them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_hq.kernels.page_codec.kernel_powers import next_power_of_2

_EMPTY = tl.constexpr(-1.0e30)
_AT_ONCE = tl.constexpr(4)  # parts, and sink tokens, whose loads are under way together


@triton.jit(do_not_specialize=["scale", "row_words", "sink_words", "sink_slot", "sink_head", "lse_row", "lse_head"])
def merge_states(
    q, work, part_o, part_lse, sinks, dense_o, dense_lse, dense_rows, out, out_lse,
    scale, row_words, sink_words, sink_slot, sink_head, lse_row, lse_head,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SINK_TOKENS: tl.constexpr,
    DENSE: tl.constexpr, BASE_2: tl.constexpr, WRITE_LSE: tl.constexpr,
):  # fmt: skip
    """One program a query row and kv head. scale: softmax scale times log2(e). row_words, sink_words: header offsets
    (work.py). BLOCK: size of the rotation, 0 = parts are not rotated. sinks: slots of one layer, bytes. DENSE "state": dense_o
    `[rows, Q_HEADS, D]`, dense_lse by strides; "parts": as part_o and part_lse, and dense_rows `[rows, 2] int32`: a row's first
    part and the one after its last. out `[rows, Q_HEADS, D]`, out_lse `[rows, Q_HEADS]`, base 2."""
    HEADS: tl.constexpr = next_power_of_2(GROUP)
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    local, channel = tl.arange(0, HEADS), tl.arange(0, D)
    inside = local < GROUP
    head = kv_head * GROUP + local
    where = head[:, None] * D + channel[None, :]
    mask = inside[:, None]
    first, last = tl.load(work + row_words + row), tl.load(work + row_words + row + 1)

    if SINK_TOKENS > 0:
        slot = tl.load(work + sink_words + row)
        query = tl.load(q + row * Q_HEADS * D + where, mask=mask, other=0.0)
        sink = tl.multiple_of(sinks + slot.to(tl.int64) * sink_slot + kv_head * sink_head, 16).to(tl.pointer_type(tl.bfloat16))
        tokens = ()
        for token in tl.static_range(min(SINK_TOKENS, _AT_ONCE)):
            tokens = tokens + _sink_token(sink, token, slot >= 0, mask, channel, D, SINK_TOKENS)
    if DENSE == "parts":
        # Two parts early: most rows have no more, and more would take registers from a fourth program an SM.
        dense_first, dense_last = tl.load(dense_rows + 2 * row), tl.load(dense_rows + 2 * row + 1)
        d0, n0 = _part(dense_first, dense_last, dense_o, dense_lse, head, where, inside, Q_HEADS, D)
        d1, n1 = _part(dense_first + 1, dense_last, dense_o, dense_lse, head, where, inside, Q_HEADS, D)
    if DENSE == "state":
        lse = tl.load(dense_lse + row * lse_row + head * lse_head, mask=inside, other=_EMPTY)
        dense = tl.load(dense_o + row * Q_HEADS * D + where, mask=mask, other=0.0)

    m = tl.full((HEADS,), _EMPTY, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    o = tl.zeros((HEADS, D), tl.float32)
    for index in range(first, last, _AT_ONCE):
        m0, o0 = _listed_part(work, index, last, part_o, part_lse, head, where, inside, Q_HEADS, D)
        m1, o1 = _listed_part(work, index + 1, last, part_o, part_lse, head, where, inside, Q_HEADS, D)
        m2, o2 = _listed_part(work, index + 2, last, part_o, part_lse, head, where, inside, Q_HEADS, D)
        m3, o3 = _listed_part(work, index + 3, last, part_o, part_lse, head, where, inside, Q_HEADS, D)
        m, total, o = _joined(m, total, o, m0, o0, m1, o1, m2, o2, m3, o3)
    if BLOCK > 0:
        o = _rotate(o, HEADS, D, BLOCK)

    if SINK_TOKENS > 0:
        if slot >= 0:
            for token in tl.static_range(SINK_TOKENS):
                if token < _AT_ONCE:
                    key, value = tokens[2 * token], tokens[2 * token + 1]
                else:
                    key, value = _sink_token(sink, token, slot >= 0, mask, channel, D, SINK_TOKENS)
                score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
                m_new = tl.maximum(m, score)
                keep, weight = tl.exp2(m - m_new), tl.exp2(score - m_new)
                o = o * keep[:, None] + value.to(tl.float32) * weight[:, None]
                total = total * keep + weight
                m = m_new

    if DENSE == "parts":
        if dense_first < dense_last:
            m_new = tl.maximum(m, tl.maximum(d0, d1))
            keep, w0, w1 = tl.exp2(m - m_new), tl.exp2(d0 - m_new), tl.exp2(d1 - m_new)
            o = o * keep[:, None] + (n0 * w0[:, None] + n1 * w1[:, None])
            m, total = m_new, total * keep + (w0 + w1)
        for joined in range(2, dense_last - dense_first, _AT_ONCE):
            part = dense_first + joined
            m0, o0 = _part(part, dense_last, dense_o, dense_lse, head, where, inside, Q_HEADS, D)
            m1, o1 = _part(part + 1, dense_last, dense_o, dense_lse, head, where, inside, Q_HEADS, D)
            m2, o2 = _part(part + 2, dense_last, dense_o, dense_lse, head, where, inside, Q_HEADS, D)
            m3, o3 = _part(part + 3, dense_last, dense_o, dense_lse, head, where, inside, Q_HEADS, D)
            m, total, o = _joined(m, total, o, m0, o0, m1, o1, m2, o2, m3, o3)
    if DENSE == "state":
        if not BASE_2:
            lse *= 1.4426950408889634
        lse = tl.maximum(lse, _EMPTY)  # -inf: no dense token
        m_new = tl.maximum(m, lse)
        keep, weight = tl.exp2(m - m_new), tl.where(lse > _EMPTY, tl.exp2(lse - m_new), 0.0)
        o = o * keep[:, None] + tl.where((weight > 0)[:, None], dense.to(tl.float32) * weight[:, None], 0.0)
        total = total * keep + weight
        m = m_new
    some = total > 0
    o = o / tl.where(some, total, 1.0)[:, None]
    tl.store(out + row * Q_HEADS * D + where, o.to(out.dtype.element_ty), mask=mask)
    if WRITE_LSE:
        lse = tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(out_lse + row * Q_HEADS + head, lse, mask=inside)


@triton.jit
def _listed_part(work, index, last, part_o, part_lse, head, where, inside, Q_HEADS: tl.constexpr, D: tl.constexpr):
    """`_part` of entry `index` of a row's list; weightless from `last` on."""
    part = tl.load(work + index, mask=index < last, other=0)
    return _part(part, tl.where(index < last, part + 1, 0), part_o, part_lse, head, where, inside, Q_HEADS, D)


@triton.jit
def _part(part, last, part_o, part_lse, head, where, inside, Q_HEADS: tl.constexpr, D: tl.constexpr):
    """(log-sum-exp, o) of a part; weightless from `last` on."""
    there, row = part < last, part.to(tl.int64) * Q_HEADS
    lse = tl.load(part_lse + row + head, mask=inside & there, other=_EMPTY)
    return lse, tl.load(part_o + row * D + where, mask=inside[:, None] & there, other=0.0)


@triton.jit
def _joined(m, total, o, m0, o0, m1, o1, m2, o2, m3, o3):
    """(maximum, sum, o) so far and four parts, of which one at least has weight."""
    m_new = tl.maximum(m, tl.maximum(tl.maximum(m0, m1), tl.maximum(m2, m3)))
    keep = tl.exp2(m - m_new)
    w0, w1, w2, w3 = tl.exp2(m0 - m_new), tl.exp2(m1 - m_new), tl.exp2(m2 - m_new), tl.exp2(m3 - m_new)
    o = o * keep[:, None] + (o0 * w0[:, None] + o1 * w1[:, None]) + (o2 * w2[:, None] + o3 * w3[:, None])
    return m_new, total * keep + (w0 + w1) + (w2 + w3), o


@triton.jit
def _sink_token(sink, token: tl.constexpr, has_slot, mask, channel, D: tl.constexpr, SINK_TOKENS: tl.constexpr):
    """(K, V) of a token of a slot, `[HEADS, D] bfloat16`, the same for every head. sink: the slot's kv head."""
    where = sink + token * D + channel[None, :]
    key = tl.load(where, mask=mask & has_slot, other=0.0)
    return key, tl.load(where + SINK_TOKENS * D, mask=mask & has_slot, other=0.0)


@triton.jit
def _rotate(o, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `[HEADS, D] float32` times the orthonormal rotation of hadamard.py: its butterfly, so float32 all the way, and no
    matrix is read."""
    right = (tl.arange(0, 2) == 1)[None, :, None]
    for stage in tl.static_range(_stages(BLOCK)):
        pairs = tl.reshape(o, (HEADS * D >> (stage + 1), 2, 1 << stage))
        plus, minus = tl.sum(pairs, 1, keep_dims=True), tl.sum(tl.where(right, -pairs, pairs), 1, keep_dims=True)
        o = tl.reshape(tl.where(right, minus, plus), (HEADS, D))
    return o * (1 / BLOCK**0.5)


@triton.constexpr_function
def _stages(block: int) -> int:
    return block.bit_length() - 1
