"""Device code: fields of packed words as tensor-core operands, two values an instruction.

A packed page is read as 16-bit words: a word of a bit plane holds the codes of two neighbouring channels, the even one in
the low byte, for every slot of tokens. A field of up to 10 bits, shifted to bit 0, *is* a float16: the subnormal
code * 2**-24, exactly, and tensor cores multiply subnormals exactly. So unpacking is a shift and a mask for two values at
once, and the factor 2**24 goes into a row's or a token's scale. Page bytes: kernels/README.md.

PTX is used where Triton would work on one 16-bit value at a time; under the interpreter (`PTX` False) the same steps are
plain Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

CODE_UNIT = tl.constexpr(2.0**24)  # a field as float16, times this, is its code


@triton.constexpr_function
def _ptx(shift: int, mask: int, flip: int, join: bool) -> str:
    """Shift right by `shift` (left if negative), keep `mask` in both halves, xor `flip` or or in the third operand."""
    move = f"shr.u32 t, $1, {shift};" if shift > 0 else f"shl.b32 t, $1, {-shift};" if shift < 0 else "mov.b32 t, $1;"
    keep = f"0x{mask:04X}{mask:04X}"
    if join:
        return f"{{ .reg .b32 t; {move} lop3.b32 $0, t, {keep}, $2, 0xEA; }}"  # (t & keep) | $2
    if flip:
        return f"{{ .reg .b32 t; {move} lop3.b32 $0, t, {keep}, 0x{flip:04X}{flip:04X}, 0x6A; }}"  # (t & keep) ^ flip
    return f"{{ .reg .b32 t; {move} and.b32 $0, t, {keep}; }}"


@triton.jit
def field(words, SHIFT: tl.constexpr, MASK: tl.constexpr, FLIP: tl.constexpr, PTX: tl.constexpr):
    """((words >> SHIFT) & MASK) ^ FLIP; words int16, MASK below 2**16 as seen after the shift. Returns int16."""
    if PTX:
        text: tl.constexpr = _ptx(SHIFT, MASK, FLIP, False)
        return tl.inline_asm_elementwise(text, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)
    wide = words.to(tl.int32) & 0xFFFF
    moved = wide >> SHIFT if SHIFT >= 0 else wide << -SHIFT
    return ((moved & MASK) ^ FLIP).to(tl.int16)


@triton.jit
def join_field(words, below, SHIFT: tl.constexpr, MASK: tl.constexpr, PTX: tl.constexpr):
    """below | ((words >> SHIFT) & MASK), int16."""
    if PTX:
        text: tl.constexpr = _ptx(SHIFT, MASK, 0, True)
        return tl.inline_asm_elementwise(text, "=r,r,r", [words, below], dtype=tl.int16, is_pure=True, pack=2)
    wide = words.to(tl.int32) & 0xFFFF
    moved = wide >> SHIFT if SHIFT >= 0 else wide << -SHIFT
    return (below | (moved & MASK)).to(tl.int16)


@triton.jit
def half(bits):
    """int16 bits as the float16 that they are."""
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def exp2(x, PTX: tl.constexpr):
    """2**x, float32; results below 2**-126 are 0."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def page_at(pages, index, PTX: tl.constexpr):
    """pages[index] as int64. Not tl.load: Triton would pipeline it too, one stage before the page itself, and every step of the
    loop would wait for its page id."""
    if PTX:
        address = (pages + index).to(tl.int64)
        page = tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=True, pack=1)
        return page.to(tl.int64)
    return tl.load(pages + index).to(tl.int64)


@triton.jit
def dot(a, b, acc, PTX: tl.constexpr):
    """tl.dot. The interpreter has no bfloat16 numbers, only their bits: it multiplies in float32."""
    if PTX:
        return tl.dot(a, b, acc)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
