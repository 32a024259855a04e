"""Device code: the codes and scales of a packed page as both grouped kernels read them.

A page is cut into four tiles of 16 tokens and its words into even and odd channels: tile j of a plane of width w is a block
of its rows at one shift, for every w (kernels/README.md, "Bit order"); the slots of the 1-bit plane have 8 tokens, so its
rows are read twice, once for each half of a tile (`planes`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_fields import dot, field, join_field, second_half_down, word_at

ROWS = tl.constexpr(16)  # of a small tile of lossless pages
TILE = tl.constexpr(16)  # tokens
NO_SCORE = tl.constexpr(-1.0e30)  # score of a token that is not attended
PEAK = tl.constexpr(2.0**14)  # largest magnitude of a float16 operand: sums of its products stay far below float32's range


@triton.jit
def rows_of(start, first, word, HALF: tl.constexpr, ACROSS: tl.constexpr = False):
    """Rows first .. first + 15 of a plane of words, `[TILE, HALF] int16`, or ACROSS: `[HALF, TILE]`; start: its first byte."""
    return tl.load(start.to(tl.pointer_type(tl.int16)) + _places(tl.arange(0, TILE) + first, word, HALF, ACROSS))


@triton.jit
def _places(row, word, HALF: tl.constexpr, ACROSS: tl.constexpr):
    return row[None, :] * HALF + word[:, None] if ACROSS else row[:, None] * HALF + word[None, :]


@triton.jit
def planes(
    record, word, HALF: tl.constexpr, BITS: tl.constexpr, OFFSETS: tl.constexpr, ACROSS: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Four tiles of words. 8 bits: those of the plane. Else two tiles of the 4-bit plane, the 2-bit plane, and the 1-bit
    plane as if its slots had 16 tokens: its eight rows twice, slot 2 j + 1 of the second ones moved to the place of slot 2 j. What
    BITS has not is filled up with another tile. ACROSS: tiles are `[HALF, TILE]`."""
    if BITS == 8:
        a = rows_of(record + OFFSETS[0], 0, word, HALF, ACROSS)
        b = rows_of(record + OFFSETS[0], 16, word, HALF, ACROSS)
        c = rows_of(record + OFFSETS[0], 32, word, HALF, ACROSS)
        d = rows_of(record + OFFSETS[0], 48, word, HALF, ACROSS)
    else:
        if BITS >= 4:
            a = rows_of(record + OFFSETS[0], 0, word, HALF, ACROSS)
            b = rows_of(record + OFFSETS[0], 16, word, HALF, ACROSS)
            c = a
        if BITS & 2:
            c = rows_of(record + OFFSETS[1 if BITS >= 4 else 0], 0, word, HALF, ACROSS)
            if BITS < 4:
                a = c
                b = c
        d = a
        if BITS & 1:
            row = tl.arange(0, TILE) % 8
            start = (record + OFFSETS[-1]).to(tl.pointer_type(tl.int16))
            d = second_half_down(tl.load(start + _places(row, word, HALF, ACROSS)), ACROSS, PTX)
    return a, b, c, d


@triton.jit
def codes(a, b, c, d, J: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr, FLIP: tl.constexpr, PTX: tl.constexpr):
    """Codes of tile J, even or odd (HIGH) channels, divided by `lift`: int16 whose float16 is code * 2**-24. FLIP: bits of
    an 8-bit code to invert (128 makes an int8 code + 128)."""
    if BITS == 8:
        return field(a if J == 0 else b if J == 1 else c if J == 2 else d, 8 * HIGH, 0xFF, FLIP, PTX)
    AT: tl.constexpr = _lowest_bit(J, BITS)
    if BITS >= 4:
        out = field(a if J % 2 == 0 else b, 8 * HIGH, 0xF << AT, 0, PTX)
        if BITS & 2:
            out = join_field(c, out, 2 * J + 8 * HIGH - AT - 4, 0x30 << AT, PTX)
    else:
        out = field(c, 8 * HIGH, 3 << AT, 0, PTX)
    if BITS & 1:
        UP: tl.constexpr = AT + (BITS & 6)
        out = join_field(d, out, 2 * J + 8 * HIGH - UP, 1 << UP, PTX)
    return out


@triton.constexpr_function
def _lowest_bit(j: int, bits: int) -> int:
    """Where in its byte the widest plane has tile j. The code stays there and is not shifted: it ends below bit 11, and float16
    counts up to 2**11 evenly."""
    return 0 if bits == 8 else 4 * (j // 2) if bits >= 4 else 2 * j


@triton.constexpr_function
def lift(j: int, bits: int) -> float:
    """What `codes` of tile j must be multiplied by."""
    return 2.0 ** -_lowest_bit(j, bits)


@triton.jit
def side_ranges(record, KIND: tl.constexpr, META: tl.constexpr):
    """The ranges of K and of V of an affine page, 8 bytes each as int64; of another kind, nothing in their place."""
    if KIND == "affine":
        start = (record + META[4]).to(tl.pointer_type(tl.int64))
        return tl.load(start), tl.load(start + 1)
    else:
        return tl.zeros((), tl.int64), tl.zeros((), tl.int64)


@triton.jit
def four(bits):
    """(scale base, scale step, minimum base, minimum step), float32, of a side's ranges."""
    low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
    return (
        (low << 16).to(tl.float32, bitcast=True), (low & -65536).to(tl.float32, bitcast=True),
        (high << 16).to(tl.float32, bitcast=True), (high & -65536).to(tl.float32, bitcast=True),
    )  # fmt: skip


@triton.jit
def side_words(record, KIND: tl.constexpr, META: tl.constexpr, PTX: tl.constexpr):
    """V's scale codes, then its minimum codes, of an affine page, `[32] int32`; of another kind, nothing in their place."""
    if KIND == "affine":
        return word_at(record + META[2] + 4 * tl.arange(0, 32), PTX)
    else:
        return tl.zeros((32,), tl.int32)


@triton.jit
def largest_byte(words):
    """The largest byte of int32 words, float32."""
    low = tl.maximum(words & 0xFF, (words >> 8) & 0xFF)
    return tl.max(tl.maximum(low, tl.maximum((words >> 16) & 0xFF, (words >> 24) & 0xFF)), 0).to(tl.float32)


@triton.jit
def number(byte):
    """uint8 as float32: put under the exponent of 2**23, cheaper than a conversion."""
    return (byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 2.0**23


@triton.jit
def power_of_two(x):
    """The largest power of two not above positive normal float32 x."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def as_result(x, PTX: tl.constexpr):
    """`[rows, N] float32` in the layout of a tensor-core result, so that it becomes an operand without leaving registers."""
    return dot(tl.zeros((x.shape[0], 16), tl.float16), tl.zeros((16, x.shape[1]), tl.float16), x, PTX)
