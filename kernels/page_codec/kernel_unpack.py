"""Device code: affine records to bfloat16 pages in the dense pool's layout. One program per run of records of a side.

The inverse rotation is a product of codes and +-1 on the tensor cores: sums of integers below 2**24 in float32, so
exact in any order. Same arithmetic, rounding by rounding, as affine.py and hadamard.py, then one rounding to bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_powers import next_power_of_2


@triton.jit(do_not_specialize=["pages"], do_not_specialize_on_alignment=["packed_pages"])
def unpack_affine(
    records, sinks, packed_pages, k_out, v_out, k_signs, v_signs,
    pages, heads, record_layer, record_page, record_head, sink_layer, sink_head,
    D: tl.constexpr, DV: tl.constexpr, K_BY_TOKEN: tl.constexpr, K_PLANES: tl.constexpr, V_PLANES: tl.constexpr,
    K_META: tl.constexpr, V_META: tl.constexpr, RANGES: tl.constexpr, SINK_TOKENS: tl.constexpr, V_SINK: tl.constexpr,
    HAS_SINK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """k_out, v_out `[layers, pages * 64, heads, D] bfloat16`. k_signs, v_signs: hadamard.py `sign_matrix`, float16.
    Other arguments as in kernel_pack.py; a program unpacks RUN records, heads fastest."""
    runs = tl.cdiv(pages * heads, RUN)
    pid = tl.program_id(0)
    run, side, layer = pid % runs, pid // runs % 2, pid // (2 * runs)
    first, last = run * RUN, tl.minimum(run * RUN + RUN, pages * heads)
    records += layer.to(tl.int64) * record_layer
    sinks += layer.to(tl.int64) * sink_layer
    out_row = layer.to(tl.int64) * pages * 64 * heads
    if side == 0:
        _unpack_side(
            records, sinks, packed_pages, k_out + out_row * D, k_signs, first, last, heads, record_page, record_head,
            sink_head, D, K_BY_TOKEN, K_PLANES, K_META, RANGES, SINK_TOKENS, HAS_SINK,
        )  # fmt: skip
    else:
        _unpack_side(
            records, sinks + V_SINK, packed_pages, v_out + out_row * DV, v_signs, first, last, heads, record_page,
            record_head, sink_head, DV, True, V_PLANES, V_META, RANGES + 8, SINK_TOKENS, HAS_SINK,
        )  # fmt: skip


@triton.jit
def _unpack_side(
    records, sinks, packed_pages, out, signs, first, last, heads, record_page, record_head, sink_head,
    D: tl.constexpr, BY_TOKEN: tl.constexpr, PLANES: tl.constexpr, META: tl.constexpr, RANGES: tl.constexpr,
    SINK_TOKENS: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Records first .. last - 1 of one side, counted page by page and head by head."""
    WIDTH: tl.constexpr = max(16, next_power_of_2(D))
    BLOCK: tl.constexpr = D & -D
    ROOT: tl.constexpr = BLOCK**0.5
    token = tl.arange(0, 64)
    channel = tl.arange(0, WIDTH)
    if BY_TOKEN:
        matrix = tl.load(signs + channel[:, None] * WIDTH + channel[None, :])
    for item in range(first, last):
        index, head = item // heads, item % heads
        page = tl.load(packed_pages + index).to(tl.int64)
        record = records + page * record_page + head * record_head
        target = out + (index.to(tl.int64) * 64 * heads + head) * D
        sink_tokens = tl.where(index == 0, SINK_TOKENS, 0) if HAS_SINK else 0
        codes = codes_of(record, token[:, None], tl.arange(0, WIDTH // 4)[None, :], D, PLANES)
        if BY_TOKEN:
            scale, minimum = groups_of(record, token, 64, META, RANGES)
            rotated = tl.dot(codes.to(tl.float16), matrix) * (scale * (1 / ROOT))[:, None]
            constant = (minimum * ROOT)[:, None]
            values = tl.where(channel[None, :] % BLOCK == 0, rotated + constant, rotated)
        else:
            scale, minimum = groups_of(record, channel, D, META, RANGES)
            values = tl.fma(codes, scale[None, :], minimum[None, :])
        where = target + token[:, None] * (heads * D) + channel[None, :]
        tl.store(where, values.to(tl.bfloat16), mask=(token[:, None] >= sink_tokens) & (channel[None, :] < D))
        if HAS_SINK:
            _copy_sink(sinks + head * sink_head, target, heads * D, sink_tokens, SINK_TOKENS, D)


@triton.jit
def codes_of(record, token, column, D: tl.constexpr, PLANES: tl.constexpr):
    """`[64, WIDTH] float32`; token `[64, 1]`, column `[1, WIDTH / 4]`: of the words of a row."""
    W: tl.constexpr = column.shape[1]
    word = tl.zeros((64, W), tl.int32)
    for plane in tl.static_range(len(PLANES)):
        start = (record + PLANES[plane][2]).to(tl.pointer_type(tl.int32))
        word |= _part(start, token, column, D // 4, PLANES[plane][0]) << PLANES[plane][1]
    low, high = tl.join(_byte(word, 0), _byte(word, 2)), tl.join(_byte(word, 1), _byte(word, 3))
    return tl.reshape(tl.join(low, high), (64, 4 * W))


@triton.jit
def _byte(word, NUMBER: tl.constexpr):
    """Byte NUMBER of every word as float32: put under the exponent of 2**23, so cheaper than a conversion."""
    byte = (word >> (8 * NUMBER)) & 0xFF
    return (byte | 0x4B000000).to(tl.float32, bitcast=True) - 2.0**23


@triton.jit
def _part(plane, token, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """A plane's bits of four codes a word, one byte each, `[64, W] int32`. The tokens of its slots share a row's bytes:
    all but the first read them from the cache."""
    packed = tl.load(plane + token % (8 * WIDTH) * COLUMNS + column, mask=column < COLUMNS, other=0)
    if WIDTH == 8:
        return packed
    else:
        return (packed >> (token // (8 * WIDTH) * WIDTH)) & ((1 << WIDTH) - 1) * 0x01010101


@triton.jit
def groups_of(record, group, COUNT: tl.constexpr, META: tl.constexpr, RANGES: tl.constexpr):
    """(scale, minimum), `[N] float32`. code * step is exact, so each is rounded once."""
    ranges = (record + RANGES).to(tl.pointer_type(tl.bfloat16))
    scale_codes = tl.load(record + META[0] + group, mask=group < COUNT, other=0).to(tl.float32)
    min_codes = tl.load(record + META[1] + group, mask=group < COUNT, other=0).to(tl.float32)
    scale = tl.load(ranges).to(tl.float32) + scale_codes * tl.load(ranges + 1).to(tl.float32)
    minimum = tl.load(ranges + 2).to(tl.float32) + min_codes * tl.load(ranges + 3).to(tl.float32)
    return scale, minimum


@triton.jit
def _copy_sink(sink, target, stride, sink_tokens, SINK_TOKENS: tl.constexpr, D: tl.constexpr):
    """The first tokens of the sequence, as they are; nothing if `sink_tokens` is 0."""
    token = tl.arange(0, next_power_of_2(SINK_TOKENS))[:, None]
    channel = tl.arange(0, next_power_of_2(D))[None, :]
    mask = (token < sink_tokens) & (channel < D)
    exact = tl.load(sink.to(tl.pointer_type(tl.int16)) + token * D + channel, mask=mask)
    tl.store(target.to(tl.pointer_type(tl.int16)) + token * stride + channel, exact, mask=mask)
