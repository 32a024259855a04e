"""Device code: lossless pages, both ways. One program per (layer, page, head). Same bytes as lossless.py.

The escapes of a page are few, so their list is made in two steps: the runs of eight channels that hold any are
compacted into the record's own list, read back one per thread, and written again as single escapes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_powers import next_power_of_2


@triton.jit(do_not_specialize=["pages"], do_not_specialize_on_alignment=["dense_pages", "packed_pages"])
def pack_lossless(
    k_table, v_table, records, dense_pages, packed_pages, status,
    pages, heads, record_layer, record_page, record_head,
    D: tl.constexpr, DV: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, ESCAPES: tl.constexpr,
    BUDGET: tl.constexpr, RECORD_BYTES: tl.constexpr,
):  # fmt: skip
    """Arguments as in kernel_pack.py. FIELDS: byte offsets of a side's raw bytes and exponent codes. ESCAPES: byte
    offsets of the list's positions, exponents and tail; BUDGET: its entries."""
    pid = tl.program_id(0)
    head, index, layer = pid % heads, pid // heads % pages, pid // (heads * pages)
    page = tl.load(packed_pages + index).to(tl.int64)
    record = records + layer.to(tl.int64) * record_layer + page * record_page + head * record_head
    row = tl.load(dense_pages + index).to(tl.int64) * 64 * heads + head
    k_values = tl.multiple_of(tl.load(k_table + layer).to(tl.pointer_type(tl.uint16)) + row * D, 16)
    v_values = tl.multiple_of(tl.load(v_table + layer).to(tl.pointer_type(tl.uint16)) + row * DV, 16)
    positions = (record + ESCAPES[0]).to(tl.pointer_type(tl.uint16))
    exponents, tail = record + ESCAPES[1], record + ESCAPES[2]
    k_runs = _pack_side(k_values, heads * D, record, positions, exponents, tail, 0, D, True, K_FIELDS, BUDGET)
    runs = _pack_side(
        v_values, heads * DV, record, positions, exponents, tail + D // 8, k_runs, DV, False, V_FIELDS, BUDGET
    )

    entry = tl.arange(0, next_power_of_2(BUDGET))
    k_count, total = 0, 0
    if runs > 0:
        tl.debug_barrier()  # the runs are listed
        listed = entry < tl.minimum(runs, BUDGET)
        run = tl.load(positions + entry, mask=listed, other=0).to(tl.int32)
        flags = tl.load(exponents + entry, mask=listed, other=0).to(tl.int32)
        tl.debug_barrier()  # and read: their place is free
        count = _ones(flags)
        to = tl.cumsum(count, 0) - count
        is_k = entry < k_runs
        k_count, total = tl.sum(tl.where(is_k, count, 0), 0), tl.sum(count, 0)
        runs_a_row = tl.where(is_k, D // 8, DV // 8)
        source = tl.where(is_k, k_values, v_values)
        source += run // runs_a_row * tl.where(is_k, heads * D, heads * DV) + run % runs_a_row * 8
        for i in tl.static_range(8):
            here = (flags >> i) & 1
            mask = (here == 1) & (to < BUDGET)
            exponent = tl.load(source + i, mask=mask, other=0) >> 7
            tl.store(positions + to, (8 * run + i).to(tl.uint16), mask=mask)
            tl.store(exponents + to, exponent.to(tl.uint8), mask=mask)
            to += here
    unused = (entry >= total) & (entry < BUDGET)
    tl.store(positions + entry, tl.zeros_like(entry).to(tl.uint16), mask=unused)
    tl.store(exponents + entry, tl.zeros_like(entry).to(tl.uint8), mask=unused)
    v_count = total - k_count
    tl.store(tail + D // 8 + 1, k_count)
    tl.store(tail + D // 8 + 2, v_count)
    gap = ESCAPES[2] + D // 8 + 3 + tl.arange(0, 32)
    tl.store(record + gap, tl.zeros((32,), tl.uint8), mask=gap < RECORD_BYTES)
    tl.store(status + index, 1, mask=(runs > BUDGET) | (total > BUDGET) | (k_count > 255) | (v_count > 255))


@triton.jit
def _pack_side(
    values, stride, record, positions, exponents, bases, listed,
    D: tl.constexpr, BASE_PER_RUN: tl.constexpr, FIELDS: tl.constexpr, BUDGET: tl.constexpr,
):  # fmt: skip
    """Write a side's raw bytes, codes and bases, one per run of eight channels or one in all, and append its runs with
    escapes to the list: position = number of the run, exponent = which of its values. Returns the runs listed so far.

    Tiles are `[32 tokens, runs, 8 channels]`, a run in a thread."""
    RUNS: tl.constexpr = next_power_of_2(D // 8)
    token = tl.arange(0, 32)[:, None, None]
    run = tl.arange(0, RUNS)[None, :, None]
    source = values + token * stride + run * 8 + tl.arange(0, 8)[None, None, :]
    inside = run < D // 8
    first = tl.load(source, mask=inside, other=0).to(tl.int32)  # tokens 0 .. 31: low nibbles of the plane
    second = tl.load(source + 32 * stride, mask=inside, other=0).to(tl.int32)
    # Adding 1 to the exponent takes 255 to 0, so that NaN and infinity are never the largest.
    largest = tl.max(tl.max(tl.maximum((first + 0x80) & 0x7F80, (second + 0x80) & 0x7F80), 2), 0)
    if BASE_PER_RUN:
        base = tl.maximum((largest >> 7) - 1, 0)
        number = tl.arange(0, RUNS)
        tl.store(bases + number, base.to(tl.uint8), mask=number < D // 8)
        base = base[None, :, None]
    else:
        base = tl.maximum((tl.max(largest, 0) >> 7) - 1, 0)
        tl.store(bases, base.to(tl.uint8))
    word = token * (D // 4) + run * 2 + tl.arange(0, 2)[None, None, :]
    raw = (record + FIELDS[0]).to(tl.pointer_type(tl.int32)) + word
    tl.store(raw, _join(_raw(first)), mask=inside)
    tl.store(raw + 32 * (D // 4), _join(_raw(second)), mask=inside)
    first, second = _join(_code(first, base)), _join(_code(second, base))
    tl.store((record + FIELDS[1]).to(tl.pointer_type(tl.int32)) + word, first | second << 4, mask=inside)

    first, second = tl.where(run < D // 8, first, 0), tl.where(run < D // 8, second, 0)
    flags = tl.join(_escapes(first), _escapes(second))  # [32, RUNS, 2]
    count = tl.sum(tl.sum(tl.sum((flags != 0).to(tl.int32), 2), 1), 0)
    if count > 0:
        _list(flags, positions, exponents, listed, D // 8, BUDGET)
    return listed + count


@triton.jit
def _list(flags, positions, exponents, listed, RUNS: tl.constexpr, BUDGET: tl.constexpr):
    """Append the runs of `[32, N, 2] int32` whose flags are not 0: tokens 0 .. 31 first, then 32 .. 63."""
    N: tl.constexpr = flags.shape[1]
    flags = tl.reshape(tl.permute(flags, (2, 0, 1)), (64 * N,))
    some = (flags != 0).to(tl.int32)
    to = listed + tl.cumsum(some, 0) - some
    mask = (some == 1) & (to < BUDGET)
    number = tl.arange(0, 64 * N)
    tl.store(positions + to, (number // N * RUNS + number % N).to(tl.uint16), mask=mask)
    tl.store(exponents + to, flags.to(tl.uint8), mask=mask)


@triton.jit
def _raw(bits):
    return (bits >> 8) & 0x80 | bits & 0x7F


@triton.jit
def _code(bits, base):
    """base - exponent, or 15 if that is not in 0 .. 14."""
    distance = base - ((bits >> 7) & 0xFF)
    return tl.minimum(distance & 0x1FF, 15)  # exponent 255 makes it negative


@triton.jit
def _join(parts):
    """`[N, RUNS, 8] int32`, each below 256, to `[N, RUNS, 2] int32`: four neighbours a word, one byte each."""
    even, odd = tl.split(tl.reshape(parts, (parts.shape[0], parts.shape[1], 2, 2, 2)))
    low, high = tl.split(even | odd << 8)
    return low | high << 16


@triton.jit
def _escapes(codes):
    """`[N, RUNS] int32`: bit i says that channel i of the run is an escape."""
    bits = ((codes + 0x01010101) >> 4) & 0x01010101  # 15 + 1 reaches bit 4 of its byte
    low, high = tl.split((bits * 0x01020408) >> 24 & 15)  # the four bits, 8 apart, side by side
    return low | high << 4


@triton.jit
def _ones(flags):
    """Number of ones among the lowest eight bits."""
    flags = (flags & 0x55) + (flags >> 1 & 0x55)
    flags = (flags & 0x33) + (flags >> 2 & 0x33)
    return (flags & 15) + (flags >> 4)


@triton.jit(do_not_specialize=["pages"], do_not_specialize_on_alignment=["packed_pages"])
def unpack_lossless(
    records, packed_pages, k_out, v_out, pages, heads, record_layer, record_page, record_head,
    D: tl.constexpr, DV: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr, ESCAPES: tl.constexpr,
    BUDGET: tl.constexpr,
):  # fmt: skip
    """Arguments as in kernel_unpack.py and `pack_lossless`."""
    pid = tl.program_id(0)
    head, index, layer = pid % heads, pid // heads % pages, pid // (heads * pages)
    page = tl.load(packed_pages + index).to(tl.int64)
    record = records + layer.to(tl.int64) * record_layer + page * record_page + head * record_head
    row = (layer.to(tl.int64) * pages + index) * 64 * heads + head
    k_target, v_target, tail = k_out + row * D, v_out + row * DV, record + ESCAPES[2]
    unpack_side(record, k_target, heads * D, tail, D, True, K_FIELDS)
    unpack_side(record, v_target, heads * DV, tail + D // 8, DV, False, V_FIELDS)
    k_count = tl.load(tail + D // 8 + 1).to(tl.int32)
    v_count = tl.load(tail + D // 8 + 2).to(tl.int32)
    tl.debug_barrier()  # the escapes are written over what is there now
    restore_escapes(record, k_target, heads * D, 0, k_count, D, K_FIELDS, ESCAPES, BUDGET)
    restore_escapes(record, v_target, heads * DV, k_count, v_count, DV, V_FIELDS, ESCAPES, BUDGET)


@triton.jit
def unpack_side(
    record, target, stride, bases, D: tl.constexpr, BASE_PER_RUN: tl.constexpr, FIELDS: tl.constexpr
):
    """All values; an escape gets some exponent. Two values move as one word, 16 bits each."""
    W: tl.constexpr = max(16, next_power_of_2(D)) // 4
    token = tl.arange(0, 64)[:, None]
    column = tl.arange(0, W)[None, :]
    inside = column < D // 4
    raw = tl.load((record + FIELDS[0]).to(tl.pointer_type(tl.int32)) + token * (D // 4) + column, mask=inside, other=0)
    plane = (record + FIELDS[1]).to(tl.pointer_type(tl.int32)) + token % 32 * (D // 4) + column
    codes = (tl.load(plane, mask=inside, other=0) >> (token // 32 * 4)) & 0x0F0F0F0F
    if BASE_PER_RUN:
        base = tl.load(bases + column // 2, mask=inside, other=0).to(tl.int32)
    else:
        base = tl.load(bases).to(tl.int32)
    base = (base + 0x100) * 0x10001  # the bit on top is borrowed by escapes with a small base
    pairs = tl.join(_join_halves(raw, codes, base), _join_halves(raw >> 16, codes >> 16, base))
    half = tl.arange(0, 2 * W)[None, :]
    target = target.to(tl.pointer_type(tl.int32)) + token * (stride // 2) + half
    tl.store(target, tl.reshape(pairs, (64, 2 * W)), mask=half < D // 2)


@triton.jit
def _join_halves(raw, codes, base):
    """The bits of the two values whose raw bytes and codes are the lowest two of a word."""
    raw = raw & 0xFF | (raw & 0xFF00) << 8
    exponents = (base - (codes & 0xFF | (codes & 0xFF00) << 8)) & 0xFF00FF
    return raw & 0x7F007F | (raw & 0x800080) << 8 | exponents << 7


@triton.jit
def restore_escapes(
    record, target, stride, first, count,
    D: tl.constexpr, FIELDS: tl.constexpr, ESCAPES: tl.constexpr, BUDGET: tl.constexpr,
):  # fmt: skip
    """Write entries first .. first + count - 1 of the list."""
    entry = tl.arange(0, next_power_of_2(BUDGET))
    mask = (entry >= first) & (entry < first + count)
    position = tl.load((record + ESCAPES[0]).to(tl.pointer_type(tl.uint16)) + entry, mask=mask, other=0).to(tl.int32)
    exponent = tl.load(record + ESCAPES[1] + entry, mask=mask, other=0).to(tl.int32)
    raw = tl.load(record + FIELDS[0] + position, mask=mask, other=0).to(tl.int32)
    bits = raw & 0x7F | (raw & 0x80) << 8 | exponent << 7
    tl.store(target.to(tl.pointer_type(tl.int16)) + position // D * stride + position % D, bits.to(tl.int16), mask=mask)
