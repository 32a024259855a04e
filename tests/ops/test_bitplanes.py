"""Codes as bit planes: the bit order is a promise to every kernel, so it is pinned by hand too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgl_hq.kernels.page_codec.bitplanes import pack_planes, unpack_nibbles, unpack_planes
from sgl_hq.page_format import plane_widths

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("pages", [0, 1, 3, 17])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_planes_round_trip(bits, pages):
    codes = torch.randint(
        0, 2**bits, (pages, 2, 64 * 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    planes = pack_planes(codes, bits)
    assert [plane.shape[-1] for plane in planes] == [64 * 24 * width // 8 for width in plane_widths(bits)]
    assert torch.equal(unpack_planes(planes, bits), codes)


def test_bit_order_is_the_documented_one():
    """Six bits, 64 codes, by hand: low nibble = first half; the 2-bit plane holds the bits above the nibble, in
    quarters."""
    codes = torch.arange(64, dtype=torch.uint8)
    four, two = pack_planes(codes, 6)
    assert four.tolist() == [(j % 16) | ((j + 32) % 16) << 4 for j in range(32)]
    assert two.tolist() == [sum(((j + 16 * slot) >> 4) << 2 * slot for slot in range(4)) for j in range(16)]


@given(data=st.data(), bits=st.integers(1, 8), tokens=st.integers(1, 5))
def test_bit_planes_keep_any_codes(data, bits, tokens):
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=64, max_size=64)), dtype=torch.uint8)
    codes = codes.repeat(tokens)
    assert torch.equal(unpack_planes(pack_planes(codes, bits), bits), codes)


@given(codes=st.lists(st.integers(0, 15), min_size=64, max_size=64), shift=st.integers(4, 12))
def test_nibbles_are_the_four_bit_plane_shifted(codes, shift):
    codes = torch.tensor(codes, dtype=torch.uint8).repeat(2, 3)
    shifted = unpack_nibbles(pack_planes(codes, 4)[0], shift=shift)
    assert torch.equal(shifted.int() & 0xFFFF, codes.int() << shift)
