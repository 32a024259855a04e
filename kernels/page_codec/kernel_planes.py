"""Device code: words of codes to bit planes. Same bits as bitplanes.py.

A word is the codes of four neighbouring channels of a token, one byte each. A plane: its width in bits, the bits of the
code below it (`BASE`), and an int32 pointer to its start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_powers import next_power_of_2


@triton.jit
def store_runs(words, target, mask, D: tl.constexpr, WIDTH: tl.constexpr, BASE: tl.constexpr):
    """One plane from eight `[8, W] int32` runs of tokens: run t of slot s is tile t + WIDTH * s."""
    for run in tl.static_range(WIDTH):
        packed = _part(words[run], WIDTH, BASE)
        for slot in tl.static_range(1, 8 // WIDTH):
            packed |= _part(words[run + WIDTH * slot], WIDTH, BASE) << (WIDTH * slot)
        tl.store(target + run * 2 * D, packed, mask=mask)  # eight rows of D // 4 words


@triton.jit
def store_lanes(words, plane, lane, WORDS: tl.constexpr, WIDTH: tl.constexpr, BASE: tl.constexpr):
    """One plane from `WORDS` words of a token per lane.

    A byte joins one word of all `SLOTS` lanes of a token row. So each lane first puts the fields of SLOTS of its words
    into one, and then the lanes exchange fields until lane s has word s, with the field of lane t as slot t: the
    transpose of a SLOTS x SLOTS matrix of fields in log2(SLOTS) exchanges.
    """
    SLOTS: tl.constexpr = 8 // WIDTH
    RUN: tl.constexpr = min(4, next_power_of_2(max(1, WORDS // SLOTS) + 1) // 2)  # words a lane gets in a row
    first = lane % 8 // WIDTH * RUN
    row = plane + (lane // 8 + lane % WIDTH * 8) * WORDS
    for group in tl.static_range(0, WORDS, SLOTS * RUN):
        got = ()
        for j in tl.static_range(RUN):
            mine = tl.zeros((64,), tl.int32)
            for slot in tl.static_range(SLOTS):
                if group + slot * RUN + j < WORDS:
                    mine |= _part(words[group + slot * RUN + j], WIDTH, BASE) << (WIDTH * slot)
            if SLOTS == 8:
                mine = _exchange(_exchange(_exchange(mine, 1, 1, 0x55555555), 2, 2, 0x33333333), 4, 4, 0x0F0F0F0F)
            elif SLOTS == 4:
                mine = _exchange(_exchange(mine, 2, 2, 0x33333333), 4, 4, 0x0F0F0F0F)
            elif SLOTS == 2:
                mine = _exchange(mine, 4, 4, 0x0F0F0F0F)
            got = got + (mine,)
        if RUN == 4:
            run = tl.reshape(tl.join(tl.join(got[0], got[2]), tl.join(got[1], got[3])), (64, 4))
        elif RUN == 2:
            run = tl.join(got[0], got[1])
        else:
            run = got[0][:, None]
        word = (group + first)[:, None] + tl.arange(0, RUN)[None, :]
        tl.store(row[:, None] + word, run, mask=word < WORDS)


@triton.jit
def _part(word, WIDTH: tl.constexpr, BASE: tl.constexpr):
    """Bits BASE .. BASE + WIDTH - 1 of the four codes of a word."""
    if WIDTH == 8:
        return word
    else:
        return (word >> BASE) & ((1 << WIDTH) - 1) * 0x01010101


@triton.jit
def _exchange(mine, LANES: tl.constexpr, SHIFT: tl.constexpr, LOW: tl.constexpr):
    """Lanes LANES apart swap: the lower one keeps its LOW fields and gets the other's above them, and the reverse."""
    pairs = tl.reshape(mine, (64 // (2 * LANES), 2, LANES))
    theirs = tl.sum(pairs, 1, keep_dims=True) - pairs
    upper = tl.arange(0, 2)[None, :, None] == 1
    mine_low, mine_high = pairs & LOW, pairs & (-1 - LOW)
    swapped = tl.where(upper, (theirs >> SHIFT) & LOW | mine_high, mine_low | (theirs & LOW) << SHIFT)
    return tl.reshape(swapped, (64,))
