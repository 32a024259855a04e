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


@triton.constexpr_function
def _ptx_restore(shift: int) -> str:
    """Even values $0 and odd values $1 of two words of raw bytes $2 and of the exponent plane $3, whose fields are `shift` up in
    their bytes. Low and high bytes of all four are made first, then dealt out. Exponent 127 - code is 127 xor code."""
    up, down = f"shl.b32 t, $3, {7 - shift};", f"shr.u32 u, $3, {shift + 1};"
    return (
        "{ .reg .b32 t, u; "
        + up
        + " lop3.b32 t, t, $2, 0x80808080, 0x4E; "  # lowest exponent bit on top of the mantissa: c ? ~a : b
        + down
        + " lop3.b32 u, u, 0x07070707, 0x3F3F3F3F, 0x6A; "  # (a & b) ^ c
        + "lop3.b32 u, $2, u, 0x80808080, 0xE4; "  # the sign on top of the other exponent bits: c ? a : b
        + "prmt.b32 $0, t, u, 0x6240; prmt.b32 $1, t, u, 0x7351; }"
    )


@triton.jit
def restore_pair(raw, plane, SHIFT: tl.constexpr, PTX: tl.constexpr):
    """Lossless values without their base, of even and of odd channels, bfloat16: sign and mantissa from words of raw bytes, the
    exponent 127 - code from words of the exponent plane, SHIFT (0 or 4) bits up."""
    if PTX:
        text: tl.constexpr = _ptx_restore(SHIFT)
        even, odd = tl.inline_asm_elementwise(
            text, "=r,=r,r,r", [raw, plane], dtype=(tl.int16, tl.int16), is_pure=True, pack=2
        )
    else:
        own, code = raw.to(tl.int32), (plane.to(tl.int32) >> SHIFT) & 0x0F0F
        even = ((127 - (code & 0xFF)) << 7 | (own & 0x7F) | (own & 0x80) << 8).to(tl.int16)
        odd = ((127 - (code >> 8)) << 7 | (own >> 8 & 0x7F) | own & 0x8000).to(tl.int16)
    return even.to(tl.bfloat16, bitcast=True), odd.to(tl.bfloat16, bitcast=True)


@triton.jit
def times(a, b, PTX: tl.constexpr):
    """a * b, bfloat16, two at a time."""
    if PTX:
        return tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2)
    return (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def to_bfloat16(x, PTX: tl.constexpr):
    """float32 to bfloat16, rounded to even. Two values stay one register, also across a loop."""
    if PTX:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    return x.to(tl.bfloat16)


@triton.jit
def second_half_down(words, ACROSS: tl.constexpr, PTX: tl.constexpr):
    """Words of tokens 8 to 15 of a tile shifted right by one bit, int16. `[16, N]`, or ACROSS: `[N, 16]`. PTX: `words` must become
    a left operand of a product, of which a thread has 8 values of a 16 x 16 block in a row: (row, k), (row + 8, k), (row, k + 8)
    and (row + 8, k + 8), two of neighbouring k each. What an upper word loses is in the top bit of the lower one."""
    if PTX:
        text: tl.constexpr = (
            "mov.b32 $0, $4; mov.b32 $1, $5; shr.u32 $2, $6, 1; shr.u32 $3, $7, 1;"
            if ACROSS
            else "mov.b32 $0, $4; shr.u32 $1, $5, 1; mov.b32 $2, $6; shr.u32 $3, $7, 1;"
        )
        return tl.inline_asm_elementwise(text, "=r,=r,=r,=r,r,r,r,r", [words], dtype=tl.int16, is_pure=True, pack=8)
    late = tl.arange(0, 16) // 8
    late = late[None, :] if ACROSS else late[:, None]
    return ((words.to(tl.int32) & 0xFFFF) >> late).to(tl.int16)


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
def long_at(entries, index, PTX: tl.constexpr):
    """entries[index], int64; like page_at, not part of Triton's pipeline."""
    if PTX:
        address = (entries + index).to(tl.int64)
        return tl.inline_asm_elementwise("ld.global.nc.b64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=True, pack=1)
    return tl.load(entries + index)


@triton.jit
def byte_at(address, PTX: tl.constexpr):
    """Bytes at pointers, int32. Not tl.load: the width of an operand's tensor-core layout follows from the narrowest load
    that it was computed from."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.u8 $0, [$1];", "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.load(address).to(tl.int32)


@triton.jit
def word_at(address, PTX: tl.constexpr):
    """Four bytes at pointers, int32; like page_at, not part of Triton's pipeline."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.load(address.to(tl.pointer_type(tl.int32)))


@triton.jit
def as_operand(x, PTX: tl.constexpr):
    """`[16 m, 8 n]` of a tensor-core result, float16 or bfloat16, as the right operand of the next product. The two layouts are each
    other's transpose in every 8 x 8 block, which is one instruction; Triton would go through shared memory and two barriers."""
    if PTX:
        x = tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2
        )
        blocks = tl.reshape(x, (x.shape[0] // 8, 8, x.shape[1] // 8, 8))
        x = tl.reshape(tl.permute(blocks, (0, 3, 2, 1)), x.shape)
    return x


@triton.jit
def dot(a, b, acc, PTX: tl.constexpr):
    """tl.dot. The interpreter has no bfloat16 numbers, only their bits: it multiplies in float32."""
    if PTX:
        return tl.dot(a, b, acc)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
