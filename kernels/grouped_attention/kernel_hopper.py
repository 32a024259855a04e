"""Device code for Hopper: attention of many query rows over pages, with warps of two kinds. In place of kernel_large.py there.

A program has three warpgroups. Two *attend*, 64 of a tile's 128 (request, query head) pairs each, on asynchronous
tensor-core products (wgmma); one *feeds* pages into a ring in shared memory, unpacked once for both (kernel_hopper_pages.py). So
pages come straight from their packed form, and unpacking, softmax and products overlap. After FlashAttention-3 (Shah et al.,
2024): the products of one half run during the softmax of the other, which takes turns with it.

Gluon, Triton's language with explicit layouts: the interpreter does not know it, so these kernels are tested on GPUs only.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from .kernel_codes import NO_SCORE
from .kernel_hopper_pages import FEED_THREADS, feed


@gluon.jit(do_not_specialize=["record_page", "record_head", "scratch_page", "scratch_head", "scale"])
def attend_hopper(
    q, records, scratch, work, part_o, part_lse, record_page, record_head, scratch_page, scratch_head, scale,
    Q_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, FIRST: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr,
    KIND: gl.constexpr, K_PLANES: gl.constexpr, V_PLANES: gl.constexpr, META: gl.constexpr, RECORD_BYTES: gl.constexpr,
):  # fmt: skip
    """Grid: PROGRAMS * kv heads, 4 warps. records: bytes of one layer, strides in bytes; scratch `[pages, heads, 2, 64, D] bfloat16`:
    expanded pages, strides in values. An item says which of the two its pages are in (work.py). STAGES: pages in the ring.
    KIND, PLANES, META: kernel_hopper_pages.py. Other arguments as in kernel_small.py."""
    program, head = gl.program_id(0) % PROGRAMS, gl.program_id(0) // PROGRAMS
    records += head.to(gl.int64) * record_head
    scratch += head.to(gl.int64) * scratch_head
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_low = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile)
    q_high = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile)
    ring = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, 64, D], tile)  # K tiles, then V tiles
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=FEED_THREADS)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    rows = (q, work, part_o, part_lse)
    shared = (ring, full, free)
    gl.warp_specialize(
        [
            (_attend, (rows, q_low, shared, turn, program, head, scale, 0, Q_HEADS, GROUP, D, FIRST, STAGES)),
            (_attend, (rows, q_high, shared, turn, program, head, scale, 1, Q_HEADS, GROUP, D, FIRST, STAGES)),
            (feed, (records, scratch, work, shared, program, record_page, scratch_page, D, FIRST, STAGES, KIND, K_PLANES, V_PLANES, META, RECORD_BYTES)),
        ],
        [4, 4],
        [208, 88],  # registers a thread: all 65,536 of an SM; what feeds needs few
    )  # fmt: skip


@gluon.jit
def _attend(
    rows, q_tile, shared, turn, program, head, scale, HALF: gl.constexpr, Q_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    FIRST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Half a tile's rows over the pages of every item of a program. scale: softmax scale times log2(e)."""
    q, work, part_o, part_lse = rows
    ring, full, free = shared
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    n = 0  # pages so far: their place in the ring
    turns = 0
    for at in range(gl.load(work + FIRST + program), gl.load(work + FIRST + program + 1), 8):
        item = work + at
        count, q_rows, pairs = gl.load(item + 1), work + gl.load(item + 2), gl.load(item + 3) * GROUP
        part, skip = gl.load(item + 4), gl.load(item + 5)
        pair = 64 * HALF + gl.arange(0, 64, gl.SliceLayout(1, copy))
        inside = pair < pairs
        row = gl.load(q_rows + pair // GROUP, mask=inside, other=0).to(gl.int64)
        source = q + (row * Q_HEADS + head * GROUP + pair % GROUP) * D
        q_tile.store(gl.load(source[:, None] + gl.arange(0, D, gl.SliceLayout(0, copy))[None, :], mask=inside[:, None], other=0.0))
        gl.thread_barrier()
        query = q_tile.load(gl.DotOperandLayout(0, s_layout, 2))
        o = gl.zeros([64, D], gl.float32, o_layout)

        slot, phase = n % STAGES, n // STAGES & 1
        s = warpgroup_mma_wait(0, deps=[_scores(query, ring, full, slot, phase, s_layout)])
        _release(free, slot)
        s = gl.where((gl.arange(0, 64, gl.SliceLayout(0, s_layout)) >= skip)[None, :], s, NO_SCORE)
        m, keep, p = _weights(s, gl.full([64], NO_SCORE, gl.float32, gl.SliceLayout(1, s_layout)), scale)
        total = gl.sum(p, 1)
        weight = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, o_layout, 2))
        for _ in range(1, count):
            n += 1
            next_slot, next_phase = n % STAGES, n // STAGES & 1
            mbarrier.wait(turn.index(HALF), turns & 1 ^ 1 - HALF)  # the low half begins
            s_next = _scores(query, ring, full, next_slot, next_phase, s_layout)
            o_next = _values(weight, ring, full, slot + STAGES, phase, o)
            mbarrier.arrive(turn.index(1 - HALF))
            turns += 1
            s = warpgroup_mma_wait(1, deps=[s_next])
            _release(free, next_slot)
            m, keep, p = _weights(s, m, scale)
            total = total * keep + gl.sum(p, 1)
            o = warpgroup_mma_wait(0, deps=[o_next])
            _release(free, slot + STAGES)
            o = o * gl.convert_layout(keep, gl.SliceLayout(1, o_layout))[:, None]
            weight = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, o_layout, 2))
            slot, phase = next_slot, next_phase
        o = warpgroup_mma_wait(0, deps=[_values(weight, ring, full, slot + STAGES, phase, o)])
        _release(free, slot + STAGES)
        n += 1

        pair = 64 * HALF + gl.arange(0, 64, gl.SliceLayout(1, o_layout))
        inside = pair < pairs
        target = (part + pair // GROUP).to(gl.int64) * Q_HEADS + head * GROUP + pair % GROUP
        o = o / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
        gl.store(part_o + target[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, o_layout))[None, :], o, mask=inside[:, None])
        gl.store(part_lse + target, gl.convert_layout(m + gl.log2(total), gl.SliceLayout(1, o_layout)), mask=inside)


@gluon.jit
def _scores(query, ring, full, slot, phase, layout: gl.constexpr):
    """q K^T of a page, under way."""
    mbarrier.wait(full.index(slot), phase)
    fence_async_shared()  # here and not where pages are written: there it would wait for the loads of later pages
    zero = gl.zeros([64, 64], gl.float32, layout)
    return warpgroup_mma(query, ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _values(weight, ring, full, slot, phase, o):
    """o + p V of a page, under way."""
    mbarrier.wait(full.index(slot), phase)
    fence_async_shared()
    return warpgroup_mma(weight, ring.index(slot), o, is_async=True)


@gluon.jit
def _release(free, slot):
    gl.thread_barrier()  # all four warps have read it
    mbarrier.arrive(free.index(slot))


@gluon.jit
def _weights(s, m, scale):
    """Online softmax, base 2: the new maximum, the factor of what was summed before, the weights."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    return m_new, gl.exp2(m - m_new), gl.exp2(s * scale - m_new[:, None])
