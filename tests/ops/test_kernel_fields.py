"""PTX texts of kernel_fields.py, which the interpreter never runs, against what they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_hq.kernels.grouped_attention.kernel_fields import _ptx_restore

WORDS = np.random.default_rng(0).integers(0, 2**32, (2, 4096), dtype=np.uint64)


@pytest.mark.parametrize("shift", [0, 4])
def test_restore_pair(shift):
    raw, plane = WORDS
    text = _ptx_restore(shift)
    got = _run(getattr(text, "value", text), {"$2": raw, "$3": plane})
    for name, first in (("$0", 0), ("$1", 8)):
        for at in (0, 16):  # both halves
            byte, code = (raw >> (at + first)) & 0xFF, (plane >> (at + first + shift)) & 0xF
            want = (byte & 0x80) << 8 | (127 - code) << 7 | byte & 0x7F
            assert np.array_equal((got[name] >> at) & 0xFFFF, want)


def _run(text: str, registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Registers, uint64 of 32 bits, after the instructions of `text`: shifts, lop3 and prmt."""
    registers = dict(registers)
    for line in text.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        to, *names = (operand.strip() for operand in operands.split(","))
        values = [registers[n] if n in registers else np.uint64(int(n, 0)) for n in names]
        registers[to] = _OPERATIONS[name](*values) & np.uint64(0xFFFFFFFF)
    return registers


def _lop3(a, b, c, table):
    out = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def _prmt(a, b, selector):
    both = a | b << 32
    return sum(((both >> 8 * (int(selector) >> 4 * i & 7)) & 0xFF) << 8 * i for i in range(4))


_OPERATIONS = {"shl.b32": lambda a, n: a << n, "shr.u32": lambda a, n: a >> n, "lop3.b32": _lop3, "prmt.b32": _prmt}
