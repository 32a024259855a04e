"""Device code shared by the affine kernels: fitting groups, and codes to words. Same arithmetic as groups.py."""

from __future__ import annotations

import triton
import triton.language as tl

MAX_MAGNITUDE = tl.constexpr(2.0**112)  # errors.py
TINY = tl.constexpr(2.0**-126)
_STEP_SLACK = tl.constexpr((1 + 2.0**-20) / 255)
_SCALE_SLACK = tl.constexpr(1 + 2.0**-40)
# x + _ROUND is x rounded to an integer, halves to even, for 0 <= x < 2**22; that integer is in the low bits.
_ROUND = tl.constexpr(2.0**23)
_ROUND_BITS = tl.constexpr(0x4B000000)
_ROUND_64 = tl.constexpr(1.5 * 2.0**52)


@triton.jit
def bf16_ceil(x):
    """Smallest bfloat16 not below x (float64), as its int16 bits and as float64."""
    nearest = x.to(tl.float32).to(tl.bfloat16)
    bits = nearest.to(tl.int16, bitcast=True)
    below = nearest.to(tl.float32).to(tl.float64) < x
    bits = tl.where(below, bits + tl.where(bits >= 0, 1, -1), bits).to(tl.int16)
    return bits, bits.to(tl.bfloat16, bitcast=True).to(tl.float32).to(tl.float64)


@triton.jit
def fit_codes(wanted, smallest, largest, ROUND_UP: tl.constexpr):
    """groups.py `_fit_codes` of one page: wanted `[N] float64` and its extremes, to codes, decoded (`[N] float32`),
    base and step (int16 bits of bfloat16)."""
    minus_bits, minus_base = bf16_ceil(-smallest)
    base = -minus_base
    to_zero = base < TINY if ROUND_UP else base == 0  # a scale is never subnormal; a zero never negative
    base = tl.where(to_zero, 0.0, base)
    base_bits = tl.where(to_zero, 0, minus_bits ^ -32768).to(tl.int16)
    step = (largest - base) * _STEP_SLACK
    step_bits, step = bf16_ceil(tl.where((step > 0) & (step < TINY), TINY, step))
    steps = (wanted - base) * (1.0 / tl.where(step > 0, step, 1.0))
    codes = ((steps + _ROUND_64) - _ROUND_64).to(tl.float32)
    codes = tl.minimum(tl.maximum(codes, 0.0), 255.0)
    base32, step32 = base.to(tl.float32), step.to(tl.float32)
    decoded = base32 + codes * step32
    if ROUND_UP:
        codes = tl.minimum(tl.where(decoded.to(tl.float64) < wanted, codes + 1, codes), 255.0)
    else:
        codes = tl.maximum(tl.where(decoded.to(tl.float64) > wanted, codes - 1, codes), 0.0)
    return codes, base32 + codes * step32, base_bits, step_bits


@triton.jit
def fit_groups(low, high, valid, LEVELS: tl.constexpr):
    """groups.py `fit_groups` of one page and side: low, high `[N] float32`; groups that are not `valid` are padding.

    Returns scale codes, minimum codes, scale, minimum (`[N] float32`), and the side's four ranges (int16 bits of
    bfloat16) in the order of the record.
    """
    low, high = low.to(tl.float64) + 0.0, high.to(tl.float64) + 0.0  # -0.0 becomes 0.0
    smallest = tl.min(tl.where(valid, low, float("inf")), 0)
    largest = tl.max(tl.where(valid, low, float("-inf")), 0)
    min_codes, minimum, min_base, min_step = fit_codes(low, smallest, largest, False)
    needed = (high - minimum.to(tl.float64)) * (_SCALE_SLACK / LEVELS)
    smallest = tl.min(tl.where(valid, needed, float("inf")), 0)
    largest = tl.max(tl.where(valid, needed, float("-inf")), 0)
    scale_codes, scale, scale_base, scale_step = fit_codes(needed, smallest, largest, True)
    return scale_codes, min_codes, scale, minimum, scale_base, scale_step, min_base, min_step


@triton.jit
def rounded(x):
    """x, 0 <= x < 2**22, rounded to an integer, as int32 with `_ROUND_BITS` on top: cheaper than a conversion."""
    return (x + _ROUND).to(tl.int32, bitcast=True)


@triton.jit
def encode(x, minimum, inverse):
    """Codes of x, as `rounded` gives them."""
    return rounded((x - minimum) * inverse)


@triton.jit
def join_bytes(codes):
    """`[N, 4 * W] int32` from `encode` to `[N, W] int32`: four neighbouring codes, one byte each."""
    N: tl.constexpr = codes.shape[0]
    W: tl.constexpr = codes.shape[1] // 4
    even, odd = tl.split(tl.reshape(codes, (N, W, 2, 2)))
    low, high = tl.split(even + (odd << 8))
    return low + (high << 16) - _ROUND_BITS
