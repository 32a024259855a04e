"""Device code: int8 and bf16 pages, both ways. A program per (layer, page, side, head). Same bytes as reference.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_affine import MAX_MAGNITUDE, TINY, bf16_ceil
from .kernel_powers import next_power_of_2


@triton.jit(do_not_specialize=["pages"], do_not_specialize_on_alignment=["dense_pages", "packed_pages"])
def pack_simple(
    k_table, v_table, records, dense_pages, packed_pages, status,
    pages, heads, record_layer, record_page, record_head,
    D: tl.constexpr, DV: tl.constexpr, INT8: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr,
):  # fmt: skip
    """Arguments as in kernel_pack.py. FIELDS: byte offsets of a side's values and, if INT8, of its scales."""
    pid = tl.program_id(0)
    head, side, index, layer = pid % heads, pid // heads % 2, pid // (2 * heads) % pages, pid // (2 * heads * pages)
    page = tl.load(packed_pages + index).to(tl.int64)
    record = records + layer.to(tl.int64) * record_layer + page * record_page + head * record_head
    row = tl.load(dense_pages + index).to(tl.int64) * 64 * heads + head
    if side == 0:
        source = tl.multiple_of(tl.load(k_table + layer).to(tl.pointer_type(tl.bfloat16)) + row * D, 16)
        _pack_side(source, heads * D, record, status + index, D, INT8, K_FIELDS)
    else:
        source = tl.multiple_of(tl.load(v_table + layer).to(tl.pointer_type(tl.bfloat16)) + row * DV, 16)
        _pack_side(source, heads * DV, record, status + index, DV, INT8, V_FIELDS)


@triton.jit
def _pack_side(source, stride, record, flag, D: tl.constexpr, INT8: tl.constexpr, FIELDS: tl.constexpr):
    token = tl.arange(0, 64)
    channel = tl.arange(0, next_power_of_2(D))[None, :]
    at = token[:, None] * D + channel
    source += token[:, None] * stride + channel
    if INT8:
        values = tl.load(source, mask=channel < D, other=0.0).to(tl.float32)
        # As integers, magnitudes keep their order, and NaN is above infinity.
        largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
        tl.store(flag, 1, mask=tl.max((largest <= MAX_MAGNITUDE).to(tl.int32) ^ 1, 0) == 1)
        step = largest.to(tl.float64) / 127
        bits, scale = bf16_ceil(tl.where((step > 0) & (step < TINY), TINY, step))
        steps = tl.div_rn(values, tl.where(scale > 0, scale, 1.0).to(tl.float32)[:, None])
        codes = (steps + 1.5 * 2.0**23).to(tl.int32, bitcast=True)  # the nearest integer is in the low bits
        tl.store(record + FIELDS[0] + at, codes.to(tl.uint8), mask=channel < D)
        tl.store((record + FIELDS[1]).to(tl.pointer_type(tl.int16)) + token, bits)
    else:
        exact = tl.load(source.to(tl.pointer_type(tl.int16)), mask=channel < D, other=0)
        tl.store((record + FIELDS[0]).to(tl.pointer_type(tl.int16)) + at, exact, mask=channel < D)


@triton.jit(do_not_specialize=["pages"], do_not_specialize_on_alignment=["packed_pages"])
def unpack_simple(
    records, packed_pages, k_out, v_out, pages, heads, record_layer, record_page, record_head,
    D: tl.constexpr, DV: tl.constexpr, INT8: tl.constexpr, K_FIELDS: tl.constexpr, V_FIELDS: tl.constexpr,
):  # fmt: skip
    """Arguments as in kernel_unpack.py and `pack_simple`."""
    pid = tl.program_id(0)
    head, side, index, layer = pid % heads, pid // heads % 2, pid // (2 * heads) % pages, pid // (2 * heads * pages)
    page = tl.load(packed_pages + index).to(tl.int64)
    record = records + layer.to(tl.int64) * record_layer + page * record_page + head * record_head
    row = (layer.to(tl.int64) * pages + index) * 64 * heads + head
    if side == 0:
        _unpack_side(record, k_out + row * D, heads * D, D, INT8, K_FIELDS)
    else:
        _unpack_side(record, v_out + row * DV, heads * DV, DV, INT8, V_FIELDS)


@triton.jit
def _unpack_side(record, target, stride, D: tl.constexpr, INT8: tl.constexpr, FIELDS: tl.constexpr):
    token = tl.arange(0, 64)
    channel = tl.arange(0, next_power_of_2(D))[None, :]
    at = token[:, None] * D + channel
    target += token[:, None] * stride + channel
    if INT8:
        codes = tl.load((record + FIELDS[0]).to(tl.pointer_type(tl.int8)) + at, mask=channel < D, other=0)
        scale = tl.load((record + FIELDS[1]).to(tl.pointer_type(tl.bfloat16)) + token).to(tl.float32)
        tl.store(target, (codes.to(tl.float32) * scale[:, None]).to(tl.bfloat16), mask=channel < D)
    else:
        exact = tl.load((record + FIELDS[0]).to(tl.pointer_type(tl.int16)) + at, mask=channel < D, other=0)
        tl.store(target.to(tl.pointer_type(tl.int16)), exact, mask=channel < D)
