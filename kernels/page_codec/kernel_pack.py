"""Device code: affine pages of the dense pool to records. One program per (layer, page, side, head).

Everything stays in registers. A K program holds, in a thread, its channels of all eight token runs of the page, so the
slots of a bit plane (kernels/README.md) meet there; a V program holds a whole rotated token in a thread, and moves bits
between the threads of a plane's slots at the end. Same arithmetic, rounding by rounding, as affine.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_affine import MAX_MAGNITUDE, encode, fit_groups, join_bytes, rounded
from .kernel_planes import store_lanes, store_runs
from .kernel_powers import next_power_of_2


@triton.jit(do_not_specialize=["pages"], do_not_specialize_on_alignment=["dense_pages", "packed_pages"])
def pack_affine(
    k_table, v_table, records, sinks, dense_pages, packed_pages, status,
    pages, heads, record_layer, record_page, record_head, sink_layer, sink_head,
    D: tl.constexpr, DV: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_BY_TOKEN: tl.constexpr,
    K_PLANES: tl.constexpr, V_PLANES: tl.constexpr, K_META: tl.constexpr, V_META: tl.constexpr, RANGES: tl.constexpr,
    SINK_TOKENS: tl.constexpr, V_SINK: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """k_table, v_table `[layers] int64`: addresses of `[slots, heads, D] bfloat16`. records, sinks: the first record of
    page 0 and the first sink of the sequence; all strides in bytes. status `[pages] int32`: set to 1 if refused.

    PLANES: ((width, bits of the code below it, byte offset), ...) of a side. META: byte offsets of its scale codes and
    minimum codes.
    """
    pid = tl.program_id(0)
    head, side, index, layer = pid % heads, pid // heads % 2, pid // (2 * heads) % pages, pid // (2 * heads * pages)
    page = tl.load(packed_pages + index).to(tl.int64)
    record = records + layer.to(tl.int64) * record_layer + page * record_page + head * record_head
    sink = sinks + layer.to(tl.int64) * sink_layer + head * sink_head
    row = tl.load(dense_pages + index).to(tl.int64) * 64 * heads + head
    sink_tokens = tl.where(index == 0, SINK_TOKENS, 0) if HAS_SINK else 0
    table = tl.where(side == 0, k_table, v_table)
    source = tl.load(table + layer).to(tl.pointer_type(tl.bfloat16))
    flag = status + index
    if side == 0:
        values = tl.multiple_of(source + row * D, 16)
        if HAS_SINK:
            _copy_sink(values, heads * D, sink, sink_tokens, SINK_TOKENS, D)
        if K_BY_TOKEN:
            _pack_by_token(values, heads * D, record, flag, sink_tokens, D, K_BITS, K_PLANES, K_META, RANGES)
        else:
            _pack_by_channel(values, heads * D, record, flag, sink_tokens, D, K_BITS, K_PLANES, K_META, RANGES)
    else:
        values = tl.multiple_of(source + row * DV, 16)
        if HAS_SINK:
            _copy_sink(values, heads * DV, sink + V_SINK, sink_tokens, SINK_TOKENS, DV)
        _pack_by_token(values, heads * DV, record, flag, sink_tokens, DV, V_BITS, V_PLANES, V_META, RANGES + 8)


@triton.jit
def _pack_by_channel(
    values, stride, record, flag, sink_tokens,
    D: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, META: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """A group is a channel over the tokens. Tile `run` of eight holds tokens 8 run .. 8 run + 7, `[8, WIDTH]`."""
    WIDTH: tl.constexpr = max(16, next_power_of_2(D))
    token = tl.arange(0, 8)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    tiles = ()
    for run in tl.static_range(8):
        # A sink token is replaced by the first packed one, which adds nothing to any minimum or maximum.
        source = values + tl.maximum(8 * run + token, sink_tokens) * stride + channel
        tiles = tiles + (tl.load(source, mask=channel < D, other=0.0).to(tl.float32),)
    low, high = tiles[0], tiles[0]
    for run in tl.static_range(1, 8):
        low = tl.minimum(low, tiles[run])
        high = tl.maximum(high, tiles[run], propagate_nan=tl.PropagateNan.ALL)
    high = tl.where(high == high, high, float("inf"))  # tl.max drops NaN
    low, high = tl.min(low, 0), tl.max(high, 0)
    tl.store(flag, 1, mask=tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 0) > MAX_MAGNITUDE)

    group = tl.arange(0, WIDTH)
    scale, minimum = _store_groups(low, high, group, D, record, BITS, META, RANGES)
    inverse = tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0))
    words = ()
    for run in tl.static_range(8):
        word = join_bytes(encode(tiles[run], minimum[None, :], inverse[None, :]))
        words = words + (tl.where(8 * run + token >= sink_tokens, word, 0),)
    column = tl.arange(0, WIDTH // 4)[None, :]
    for plane in tl.static_range(len(PLANES)):
        start = (record + PLANES[plane][2]).to(tl.pointer_type(tl.int32))
        store_runs(words, start + token * (D // 4) + column, column < D // 4, D, PLANES[plane][0], PLANES[plane][1])


@triton.jit
def _pack_by_token(
    values, stride, record, flag, sink_tokens,
    D: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, META: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """A group is a token over its rotated channels. Thread `lane` holds token `lane // 8 + lane % 8 * 8`, so the slots
    of every plane are neighbours. Piece i: channels 8 i .. 8 i + 7."""
    PIECES: tl.constexpr = D // 8
    BLOCK: tl.constexpr = D & -D
    lane = tl.arange(0, 64)
    token = lane // 8 + lane % 8 * 8
    source = values + (tl.maximum(token, sink_tokens) * stride)[:, None] + tl.arange(0, 8)[None, :]
    pieces = ()
    for i in tl.static_range(PIECES):
        pieces = pieces + (tl.load(source + 8 * i).to(tl.float32),)
    pieces = _rotate(pieces, PIECES, BLOCK)
    low, high = pieces[0], pieces[0]
    for i in tl.static_range(1, PIECES):
        low = tl.minimum(low, pieces[i])
        high = tl.maximum(high, pieces[i], propagate_nan=tl.PropagateNan.ALL)
    harmless = (high <= MAX_MAGNITUDE / 64) & (low >= -MAX_MAGNITUDE / 64)  # false if there is a NaN
    if tl.max((harmless == 0).to(tl.int32)) == 1:  # rare
        _flag_large(source, flag, PIECES)
    scale, minimum = _store_groups(tl.min(low, 1), tl.max(high, 1), token, 64, record, BITS, META, RANGES)
    inverse = tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0))
    words = ()  # 2 * PIECES of [64] int32: the codes of four channels, one byte each
    for i in tl.static_range(PIECES):
        pair = join_bytes(encode(pieces[i], minimum[:, None], inverse[:, None]))
        first, second = tl.split(tl.where((token >= sink_tokens)[:, None], pair, 0))
        words = words + (first, second)
    for plane in tl.static_range(len(PLANES)):
        start = (record + PLANES[plane][2]).to(tl.pointer_type(tl.int32))
        store_lanes(words, start, lane, D // 4, PLANES[plane][0], PLANES[plane][1])


@triton.jit
def _flag_large(source, flag, PIECES: tl.constexpr):
    """Refuse tokens with NaN, infinity or a magnitude above the limit. A rotation keeps the L2 norm, so with such a
    value in a block of up to 1024 channels some rotated one is above 1/64 of the limit, or NaN: else nobody need ask."""
    for i in range(PIECES):
        values = tl.load(source + 8 * i).to(tl.float32)
        tl.store(flag, 1, mask=tl.max((tl.abs(values) <= MAX_MAGNITUDE).to(tl.int32) ^ 1) == 1)


@triton.jit
def _rotate(pieces, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """hadamard.py `rotate` of `PIECES` times `[64, 8] float32`: pairs 1, 2, 4 channels apart, then pieces."""
    rotated = ()
    for i in tl.static_range(PIECES):
        x = tl.reshape(pieces[i], (64, 2, 2, 2))
        for _ in tl.static_range(3):
            a, b = tl.split(x)
            x = tl.permute(tl.join(a + b, a - b), (0, 3, 1, 2))  # the next pair of channels comes last
        rotated = rotated + (tl.reshape(x, (64, 8)),)
    for doublings in tl.static_range(8):
        if (8 << doublings) < BLOCK:
            rotated = _butterfly(rotated, PIECES, 1 << doublings)
    scaled = ()
    for i in tl.static_range(PIECES):
        scaled = scaled + (rotated[i] * (BLOCK**-0.5),)
    return scaled


@triton.jit
def _butterfly(pieces, PIECES: tl.constexpr, APART: tl.constexpr):
    """Sums and differences of the pieces APART pieces apart."""
    after = ()
    for i in tl.static_range(PIECES):
        if i // APART % 2 == 0:
            after = after + (pieces[i] + pieces[i + APART],)
        else:
            after = after + (pieces[i - APART] - pieces[i],)
    return after


@triton.jit
def _store_groups(
    low, high, group, COUNT: tl.constexpr, record, BITS: tl.constexpr, META: tl.constexpr, RANGES: tl.constexpr
):
    """Fit the groups of a side, write their metadata, return (scale, minimum), `[N] float32`; groups from COUNT on are
    padding."""
    valid = group < COUNT
    scale_codes, min_codes, scale, minimum, scale_base, scale_step, min_base, min_step = fit_groups(
        low, high, valid, (1 << BITS) - 1
    )
    in_field = group < (COUNT + 15) // 16 * 16  # the gap up to the next field is zero
    tl.store(record + META[0] + group, tl.where(valid, rounded(scale_codes), 0).to(tl.uint8), mask=in_field)
    tl.store(record + META[1] + group, tl.where(valid, rounded(min_codes), 0).to(tl.uint8), mask=in_field)
    ranges = (record + RANGES).to(tl.pointer_type(tl.int16))
    tl.store(ranges, scale_base)
    tl.store(ranges + 1, scale_step)
    tl.store(ranges + 2, min_base)
    tl.store(ranges + 3, min_step)
    return scale, minimum


@triton.jit
def _copy_sink(values, stride, sink, sink_tokens, SINK_TOKENS: tl.constexpr, D: tl.constexpr):
    """The first tokens of the sequence, as they are; nothing if `sink_tokens` is 0."""
    token = tl.arange(0, next_power_of_2(SINK_TOKENS))[:, None]
    channel = tl.arange(0, next_power_of_2(D))[None, :]
    mask = (token < sink_tokens) & (channel < D)
    exact = tl.load(values.to(tl.pointer_type(tl.int16)) + token * stride + channel, mask=mask)
    tl.store(sink.to(tl.pointer_type(tl.int16)) + token * D + channel, exact, mask=mask)
