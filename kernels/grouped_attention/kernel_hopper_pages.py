"""Device code for Hopper: the warps that bring pages into shared memory as bfloat16, for kernel_hopper.py.

Expanded and bf16 pages are copied asynchronously. Others are unpacked on the way: words of a page are in registers while the
page before is written. A word holds four channels, one byte each. Its values are made of the codes' bits: a byte under the
exponent of 1.0 is 1 + code / 128 (of 2**23: 2**23 + code), so one multiply-add gives the value, with constants that
undo the offset; then two are rounded together. V of affine pages stays rotated.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

FEED_THREADS = gl.constexpr(128)

# Codes of up to 7 bits. The constants' rounding is 2**-24 of 128 scales: 2**-17 of a step.
_FOUR_VALUES = gl.constexpr("""{
.reg .b32 t, a; .reg .f32 f0, f1, f2, f3;
or.b32 t, $2, 0x80808080;
prmt.b32 a, t, 0x3F000000, 0x7044; mov.b32 f0, a; fma.rn.f32 f0, f0, $3, $7;
prmt.b32 a, t, 0x3F000000, 0x7144; mov.b32 f1, a; fma.rn.f32 f1, f1, $4, $8;
prmt.b32 a, t, 0x3F000000, 0x7244; mov.b32 f2, a; fma.rn.f32 f2, f2, $5, $9;
prmt.b32 a, t, 0x3F000000, 0x7344; mov.b32 f3, a; fma.rn.f32 f3, f3, $6, $10;
cvt.rn.bf16x2.f32 $0, f1, f0; cvt.rn.bf16x2.f32 $1, f3, f2;
}""")
# Codes of 8 bits: the offset is taken away first.
_FOUR_VALUES_8 = gl.constexpr("""{
.reg .b32 a; .reg .f32 f0, f1, f2, f3;
prmt.b32 a, $2, 0x4B000000, 0x7440; mov.b32 f0, a; add.rn.f32 f0, f0, 0fCB000000; fma.rn.f32 f0, f0, $3, $7;
prmt.b32 a, $2, 0x4B000000, 0x7441; mov.b32 f1, a; add.rn.f32 f1, f1, 0fCB000000; fma.rn.f32 f1, f1, $4, $8;
prmt.b32 a, $2, 0x4B000000, 0x7442; mov.b32 f2, a; add.rn.f32 f2, f2, 0fCB000000; fma.rn.f32 f2, f2, $5, $9;
prmt.b32 a, $2, 0x4B000000, 0x7443; mov.b32 f3, a; add.rn.f32 f3, f3, 0fCB000000; fma.rn.f32 f3, f3, $6, $10;
cvt.rn.bf16x2.f32 $0, f1, f0; cvt.rn.bf16x2.f32 $1, f3, f2;
}""")


@gluon.jit
def feed(
    records, scratch, work, shared, program, record_page, scratch_page, D: gl.constexpr, FIRST: gl.constexpr, STAGES: gl.constexpr,
    KIND: gl.constexpr, K_PLANES: gl.constexpr, V_PLANES: gl.constexpr, META: gl.constexpr, RECORD_BYTES: gl.constexpr,
):  # fmt: skip
    """Bring the pages of every item of a program into the ring, K and V of each, in order.

    KIND: "expanded" (all pages are in `scratch`), "affine" or "int8". PLANES: (bits, lowest bit, byte offset), widest first. META: byte
    offsets of K's scales and minima, of V's, and of the ranges; for int8 of the scales. RECORD_BYTES: of a packed page and head.
    """
    n = 0
    for at in range(gl.load(work + FIRST + program), gl.load(work + FIRST + program + 1), 8):
        item = work + at
        pages, count = work + gl.load(item), gl.load(item + 1)
        if KIND == "expanded":
            _copy(scratch, scratch_page, pages, count, shared, n, D, STAGES)
        elif gl.load(item + 6) == 1:
            _copy(scratch, scratch_page, pages, count, shared, n, D, STAGES)
        else:
            _unpack(records, record_page, pages, count, shared, n, D, STAGES, KIND, K_PLANES, V_PLANES, META, RECORD_BYTES)
        n += count


@gluon.jit
def _copy(scratch, scratch_page, pages, count, shared, n, D: gl.constexpr, STAGES: gl.constexpr):
    """Pages in bfloat16. As many are under way to shared memory as the ring holds."""
    ring, full, free = shared
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    token, channel = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, D, gl.SliceLayout(0, layout))
    where = token[:, None] * D + channel[None, :]
    following = gl.load(pages)
    for i in range(count):
        slot, phase = n % STAGES, n // STAGES & 1 ^ 1
        source = gl.multiple_of(scratch + following.to(gl.int64) * scratch_page, 16)
        following = gl.load(pages + gl.minimum(i + 1, count - 1))
        ahead = scratch + gl.load(pages + gl.minimum(i + STAGES + 1, count - 1)).to(gl.int64) * scratch_page
        _prefetch(ahead.to(gl.pointer_type(gl.int8)), 256 * D)
        for side in gl.static_range(2):
            mbarrier.wait(free.index(slot + side * STAGES), phase)
            async_copy.async_copy_global_to_shared(ring.index(slot + side * STAGES), source + side * 64 * D + where)
            async_copy.mbarrier_arrive(full.index(slot + side * STAGES), increment_count=False)
        n += 1


@gluon.jit
def _unpack(
    records, record_page, pages, count, shared, n, D: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr, K_PLANES: gl.constexpr,
    V_PLANES: gl.constexpr, META: gl.constexpr, RECORD_BYTES: gl.constexpr,
):  # fmt: skip
    """Packed pages. One side is written while the other side's words are on their way."""
    ring, full, free = shared
    record = gl.multiple_of(records + gl.load(pages).to(gl.int64) * record_page, 16)
    k = _words(record, D, K_PLANES)
    k_meta = _meta(record, 0, D, KIND, K_PLANES, META)
    following, after = gl.load(pages + gl.minimum(1, count - 1)), gl.load(pages + gl.minimum(2, count - 1))
    _prefetch(records + following.to(gl.int64) * record_page, RECORD_BYTES)
    for i in range(count):
        slot, phase = n % STAGES, n // STAGES & 1 ^ 1
        _prefetch(records + after.to(gl.int64) * record_page, RECORD_BYTES)
        v = _words(record, D, V_PLANES)
        v_meta = _meta(record, 1, D, KIND, V_PLANES, META)
        mbarrier.wait(free.index(slot), phase)
        _write(ring.index(slot), k, k_meta, 0, D, KIND, K_PLANES)
        _fill(full, slot)
        record = gl.multiple_of(records + following.to(gl.int64) * record_page, 16)
        following, after = after, gl.load(pages + gl.minimum(i + 3, count - 1))
        k = _words(record, D, K_PLANES)
        k_meta = _meta(record, 0, D, KIND, K_PLANES, META)
        mbarrier.wait(free.index(slot + STAGES), phase)
        _write(ring.index(slot + STAGES), v, v_meta, 1, D, KIND, V_PLANES)
        _fill(full, slot + STAGES)
        n += 1


@gluon.jit
def _prefetch(record, RECORD_BYTES: gl.constexpr):
    """Bring a page into the L2 cache, a line a thread: registers and the ring hold too little for the latency of DRAM."""
    line = gl.arange(0, FEED_THREADS, gl.BlockedLayout([1], [32], [4], [0]))
    for first in gl.static_range(0, RECORD_BYTES, 128 * FEED_THREADS):
        at = gl.minimum(first + 128 * line, RECORD_BYTES - 1)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(record + at).to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def _fill(full, slot):
    gl.thread_barrier()
    mbarrier.arrive(full.index(slot), count=FEED_THREADS)


@triton.constexpr_function
def _word_layout(dim: int) -> gl.BlockedLayout:
    """Of a plane's words: a thread has eight channels of a row."""
    return gl.BlockedLayout([1, 2], [256 // dim, dim // 8], [4, 1], [1, 0])


@gluon.jit
def _words(record, D: gl.constexpr, PLANES: gl.constexpr):
    """A side's planes, each `[rows of the widest plane, D / 4] int32`. A narrower plane has fewer rows, which come again."""
    layout: gl.constexpr = _word_layout(D)
    row = gl.arange(0, 8 * PLANES[0][0], gl.SliceLayout(1, layout))
    word = gl.arange(0, D // 4, gl.SliceLayout(0, layout))
    out = ()
    for plane in gl.static_range(len(PLANES)):
        start = (record + PLANES[plane][2]).to(gl.pointer_type(gl.int32))
        out = out + (gl.load(start + (row % (8 * PLANES[plane][0]))[:, None] * (D // 4) + word[None, :]),)
    return out


@gluon.jit
def _meta(record, SIDE: gl.constexpr, D: gl.constexpr, KIND: gl.constexpr, PLANES: gl.constexpr, META: gl.constexpr):
    """A side's scales and minima as stored: affine K's per channel, four a word; V's and int8's per token, by slots."""
    layout: gl.constexpr = _word_layout(D)
    ROWS: gl.constexpr = 8 * PLANES[0][0]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    if KIND == "int8":
        return (gl.load((record + META[SIDE]).to(gl.pointer_type(gl.bfloat16)) + row),)
    else:
        ranges = (record + META[4] + 8 * SIDE).to(gl.pointer_type(gl.bfloat16))
        out = (gl.load(ranges), gl.load(ranges + 1), gl.load(ranges + 2), gl.load(ranges + 3))
        if SIDE == 0:
            word = gl.arange(0, D // 4, gl.SliceLayout(0, layout))
            scales, minima = (record + META[0]).to(gl.pointer_type(gl.int32)), (record + META[1]).to(gl.pointer_type(gl.int32))
            out = out + (gl.load(scales + word), gl.load(minima + word))
        else:
            for slot in gl.static_range(64 // ROWS):
                token = slot * ROWS + row
                out = out + (gl.load(record + META[2] + token).to(gl.int32), gl.load(record + META[3] + token).to(gl.int32))
        return out


@gluon.jit
def _write(tile, words, meta, SIDE: gl.constexpr, D: gl.constexpr, KIND: gl.constexpr, PLANES: gl.constexpr):
    """A side's `[64, D] bfloat16`, two channels a word of the tile."""
    layout: gl.constexpr = _word_layout(D)
    WIDEST: gl.constexpr = PLANES[0][0]
    ROWS: gl.constexpr = 8 * WIDEST
    target = tile._reinterpret(gl.int32, [64, D // 2], gl.NVMMASharedLayout(128, 32, rank=2))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    if KIND == "int8":
        scale = meta[0].to(gl.float32)[:, None]
        _store(target, words[0] ^ -0x7F7F7F80, _four(scale), _four(scale * -128.0), 0, WIDEST, D)  # codes + 128
    else:
        if SIDE == 0:
            s0, m0 = _affine(_byte(meta[4], 0)[None, :], _byte(meta[5], 0)[None, :], meta, WIDEST)
            s1, m1 = _affine(_byte(meta[4], 1)[None, :], _byte(meta[5], 1)[None, :], meta, WIDEST)
            s2, m2 = _affine(_byte(meta[4], 2)[None, :], _byte(meta[5], 2)[None, :], meta, WIDEST)
            s3, m3 = _affine(_byte(meta[4], 3)[None, :], _byte(meta[5], 3)[None, :], meta, WIDEST)
            for slot in gl.static_range(64 // ROWS):
                _store(target, _codes(words, row, slot, PLANES), (s0, s1, s2, s3), (m0, m1, m2, m3), slot, WIDEST, D)
        else:
            for slot in gl.static_range(64 // ROWS):
                scale, minimum = _affine(_byte(meta[4 + 2 * slot], 0)[:, None], _byte(meta[5 + 2 * slot], 0)[:, None], meta, WIDEST)
                _store(target, _codes(words, row, slot, PLANES), _four(scale), _four(minimum), slot, WIDEST, D)


@gluon.jit
def _four(x):
    return (x, x, x, x)


@gluon.jit
def _store(target, codes, scales, minima, slot: gl.constexpr, WIDEST: gl.constexpr, D: gl.constexpr):
    """The values of one slot of all words: code * scale + minimum, a scale and a minimum for each byte."""
    low, high = gl.inline_asm_elementwise(
        _FOUR_VALUES_8 if WIDEST == 8 else _FOUR_VALUES, "=r,=r,r,f,f,f,f,f,f,f,f",
        [codes, scales[0], scales[1], scales[2], scales[3], minima[0], minima[1], minima[2], minima[3]],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    target.slice(slot * 8 * WIDEST, 8 * WIDEST).store(gl.reshape(gl.join(low, high), [8 * WIDEST, D // 2]))


@gluon.jit
def _affine(scale_code, min_code, meta, WIDEST: gl.constexpr):
    """(scale, minimum) as `_store` needs them: x = 1 + code / 128 unless codes have 8 bits."""
    scale = meta[0].to(gl.float32) + scale_code * meta[1].to(gl.float32)
    minimum = meta[2].to(gl.float32) + min_code * meta[3].to(gl.float32)
    if WIDEST == 8:
        return scale, minimum
    else:
        return 128 * scale, minimum - 128 * scale


@gluon.jit
def _byte(words, NUMBER: gl.constexpr):
    """A byte of every word as float32."""
    return ((words >> (8 * NUMBER) & 0xFF) | 0x4B000000).to(gl.float32, bitcast=True) - 2.0**23


@gluon.jit
def _codes(words, row, slot: gl.constexpr, PLANES: gl.constexpr):
    """The codes of one slot, a byte each."""
    codes = _bits(words[0], row, slot, PLANES[0][0], PLANES[0][0]) << PLANES[0][1]
    for plane in gl.static_range(1, len(PLANES)):
        codes |= _bits(words[plane], row, slot, PLANES[plane][0], PLANES[0][0]) << PLANES[plane][1]
    return codes


@gluon.jit
def _bits(words, row, slot: gl.constexpr, WIDTH: gl.constexpr, WIDEST: gl.constexpr):
    """A plane's bits of token slot * 8 * WIDEST + row: the plane's own slots are finer."""
    if WIDTH == 8:
        return words
    else:
        shift = WIDTH * (slot * (WIDEST // WIDTH) + row // (8 * WIDTH))
        return words >> shift[:, None] & ((1 << WIDTH) - 1) * 0x01010101
