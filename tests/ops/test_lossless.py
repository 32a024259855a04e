"""Lossless pages: every bit comes back, the bytes are the documented ones, and a page that does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_samples import CONTENTS, head_major, make

from sgl_hq.kernels.page_codec import EscapeOverflowError, PageCodec, UnpackablePageError, lossless
from sgl_hq.page_format import get_format

DIMS = [(64, 64), (80, 80), (96, 32), (128, 128), (256, 192), (8, 16)]
TILE = lossless._TILE_PAGES
PATTERNS = torch.arange(2**16).to(torch.int16)  # as bits: all of them, NaN payloads and subnormals included

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def codec_of(*dims: int) -> PageCodec:
    return PageCodec(get_format("lossless"), *dims)


def check_bit_equal(codec: PageCodec, k_bits: torch.Tensor, v_bits: torch.Tensor) -> torch.Tensor:
    """Pack and unpack `[P, 64, H, D] int16` bits; returns the records."""
    records, sink = codec.pack(k_bits.view(torch.bfloat16), v_bits.view(torch.bfloat16), first_has_sink=True)
    assert sink is None
    for got, packed in zip(codec.unpack(records), (k_bits, v_bits), strict=True):
        assert got.dtype == torch.bfloat16 and got.is_contiguous()
        assert torch.equal(got.view(torch.int16), head_major(packed))
    return records


def decoded(record: bytes, k_dim: int, v_dim: int) -> tuple[list[int], list[int]]:
    """The bits of a record, token-major, read byte by byte as kernels/README.md says: shares no code with the codec."""
    k_values, v_values = 64 * k_dim, 64 * v_dim
    k_raw, v_raw = 0, k_values
    k_exp = v_raw + v_values
    v_exp = k_exp + k_values // 2
    escapes = v_exp + v_values // 2
    budget = (k_dim + v_dim - k_dim // 8 - 3) // 3
    positions, exponents, tail = escapes, escapes + 2 * budget, escapes + 3 * budget
    k_bases, (v_base, *counts) = record[tail:][: k_dim // 8], record[tail + k_dim // 8 :][:3]
    sides, listed = [], 0
    for side, (raw, codes, count) in enumerate(((k_raw, k_exp, k_values), (v_raw, v_exp, v_values))):
        base, escaped = (lambda i: v_base if side else k_bases[i % k_dim // 8]), counts[side]
        half = count // 2
        exponent = [base(i) - (record[codes + i % half] >> (4 if i >= half else 0) & 15) for i in range(count)]
        places = [int.from_bytes(record[positions + 2 * e :][:2], "little") for e in range(listed, listed + escaped)]
        assert places == sorted(set(places)) == [i for i in range(count) if base(i) - exponent[i] == 15]
        for e, place in enumerate(places, listed):
            exponent[place] = record[exponents + e]
        listed += escaped
        signs_and_mantissas = record[raw : raw + count]
        sides.append([(r >> 7) << 15 | exponent[i] << 7 | r & 127 for i, r in enumerate(signs_and_mantissas)])
    unused = record[positions + 2 * listed : exponents] + record[exponents + listed : tail] + record[tail + k_dim // 8 + 3 :]
    assert not any(unused), "unused entries and alignment are zero"
    return sides[0], sides[1]


def fuzzed(count: int, base: int, escapes: int, generator: torch.Generator) -> torch.Tensor:
    """`[count] int16` bits with exactly this base and this many escapes, at random places."""
    draw = lambda high, shape: torch.randint(0, high, shape, generator=generator)  # noqa: E731
    exponents = base - draw(min(base, 14) + 1, (count,))
    places = torch.randperm(count, generator=generator)
    exponents[places[-1]] = base
    outside = [*range(max(0, base - 14)), 255]
    exponents[places[:escapes]] = torch.tensor(outside)[draw(len(outside), (escapes,))]
    return (draw(2, (count,)) << 15 | exponents << 7 | draw(128, (count,))).to(torch.int16)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dims=st.sampled_from(DIMS), heads=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_a_page_comes_back_bit_for_bit_exactly_if_its_escapes_fit(data, dims, heads, seed):
    """Budgets hit exactly and passed by one, in any split over K and V."""
    codec = codec_of(*dims)
    budget = codec.layout.escape_budget
    generator = torch.Generator().manual_seed(seed)
    sides, total = [], [0] * heads
    for dim in dims:
        by_head = []
        for head in range(heads):
            left = budget - total[head]
            edge = st.sampled_from([0, max(left, 0), max(left, 0) + 1]) if sides else st.nothing()
            escapes = data.draw(edge | st.integers(0, budget + 1))
            total[head] += escapes
            by_head.append(fuzzed(64 * dim, data.draw(st.integers(0, 254)), escapes, generator).view(64, dim))
        sides.append(torch.stack(by_head, 1).unsqueeze(0))  # [1, 64, H, D]
    too_many = sum(escapes > budget for escapes in total)
    if too_many:
        with pytest.raises(UnpackablePageError, match=f"^{too_many} of {heads} pages .*keep these pages dense"):
            codec.pack(*(side.view(torch.bfloat16) for side in sides), first_has_sink=False)
        return
    records = check_bit_equal(codec, *sides)
    record = bytes(records[0, -1].tolist())
    for got, bits in zip(decoded(record, *dims), sides, strict=True):
        assert got == (bits[0, :, -1].flatten().int() & 0xFFFF).tolist()


@given(
    patterns=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=12),
    rare=st.lists(st.integers(0, 2**16 - 1), max_size=60),
    seed=st.integers(0, 999),
)
def test_any_bits_come_back_or_are_refused(patterns, rare, seed):
    """Nothing in between, wherever the base lands: no page comes back changed."""
    generator = torch.Generator().manual_seed(seed)
    page = torch.tensor(patterns)[torch.randint(0, len(patterns), (2 * 64 * 64,), generator=generator)]
    page[torch.randperm(len(page), generator=generator)[: len(rare)]] = torch.tensor(rare, dtype=torch.int64)
    k, v = page.to(torch.int16).view(2, 1, 64, 1, 64)
    escapes = 0
    for side in (*k.split(8, -1), v):  # what shares a base
        exponents = [pattern >> 7 & 255 for pattern in side.flatten().tolist()]
        base = max((exponent for exponent in exponents if exponent < 255), default=0)
        escapes += sum(not 0 <= base - exponent <= 14 for exponent in exponents)
    try:
        check_bit_equal(codec_of(64, 64), k, v)
        assert escapes <= 39
    except EscapeOverflowError:
        assert escapes > 39


def test_every_pattern_of_sixteen_bits_comes_back():
    """Exponents 0..254, fifteen a page; NaN and infinities as escapes, 39 a page."""
    codec = codec_of(64, 64)
    exponents = PATTERNS.int() >> 7 & 255
    specials = PATTERNS[exponents == 255].split(codec.layout.escape_budget)
    pages = []
    for number in range(17):
        finite = PATTERNS[(exponents // 15 == number) & (exponents < 255)]
        special = specials[number] if number < len(specials) else finite[:0]
        filler = finite[:1].expand(64 * 64 - len(finite) - len(special))
        pages.append(torch.cat([finite, special, filler]).flip(0).view(64, 1, 64))
    k = torch.stack(pages)
    assert torch.equal(k.unique(), PATTERNS.unique()), "all 65,536"
    check_bit_equal(codec, k, torch.zeros_like(k))
    check_bit_equal(codec, torch.zeros_like(k), k)


@pytest.mark.parametrize("pages, heads", [(1, 1), (3, 2), (2 * TILE + 1, 1), (3, TILE + 1)])
@pytest.mark.parametrize("contents", [name for name in CONTENTS if not name.startswith(("one_outlier", "outlier"))])
def test_ordinary_pages(contents, pages, heads):
    """Few pages and one head, or more than one tile of the unpacking."""
    k, v = (make(contents, (pages, 64, heads, dim), seed).view(torch.int16) for seed, dim in enumerate((64, 32)))
    check_bit_equal(codec_of(64, 32), k, v)


@pytest.mark.parametrize("bits", [0x0000, 0x8000, 0x0001, 0x807F, 0x7F7F], ids=hex)
def test_a_page_of_one_value_needs_no_escape(bits):
    """Both zeros, subnormals, the largest finite number: the base is where the values are."""
    page = torch.full((1, 64, 1, 64), bits, dtype=torch.int32).to(torch.int16)
    records = check_bit_equal(codec_of(64, 64), page, page)
    tail = codec_of(64, 64).layout.escape_fields[2]
    assert records[0, 0, tail.offset : tail.end].tolist() == [bits >> 7 & 255] * 9 + [0, 0]


@pytest.mark.parametrize("special", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF], ids=hex)
def test_nan_and_infinity_are_escapes_and_no_base(special):
    """One more than the list holds is refused; a page of nothing else too."""
    k = make("random", (1, 64, 1, 64)).clamp(1, 2).view(torch.int16)
    v = k.clone()
    k.view(-1)[:39] = PATTERNS[special]
    records = check_bit_equal(codec_of(64, 64), k, v)
    tail = codec_of(64, 64).layout.escape_fields[2]
    assert records[0, 0, tail.offset : tail.end].tolist() == [128] * 9 + [39, 0], "2.0 has the biased exponent 128"
    v.view(-1)[-1] = PATTERNS[special]
    with pytest.raises(EscapeOverflowError, match=r"^1 of 1 pages"):
        check_bit_equal(codec_of(64, 64), k, v)
    with pytest.raises(EscapeOverflowError):
        check_bit_equal(codec_of(64, 64), torch.full_like(k, PATTERNS[special]), v)


@pytest.mark.parametrize("k_dim, v_dim", [(1024, 8), (8, 1024), (512, 512)])
def test_the_largest_heads(k_dim, v_dim):
    """Positions up to 65,535 and counts up to 255, where the budget alone would allow 340."""
    codec = codec_of(k_dim, v_dim)
    generator = torch.Generator().manual_seed(0)
    sides = [fuzzed(64 * dim, 127, 0, generator).view(1, 64, 1, dim) for dim in (k_dim, v_dim)]
    check_bit_equal(codec, *sides)
    wide = 0 if k_dim >= v_dim else 1
    sides[wide].view(-1)[-255:] = PATTERNS[0x7FC1]
    check_bit_equal(codec, *sides)
    sides[wide].view(-1)[-256] = PATTERNS[0]
    assert codec.layout.escape_budget > 255
    with pytest.raises(EscapeOverflowError):
        check_bit_equal(codec, *sides)


def test_ten_thousand_real_pages(real_pages):
    """K and V of SmolLM2-135M: all fit. (Most escapes of a page when this was written: 13 of 39.)"""
    codec, pages = codec_of(64, 64), 0
    for k, v in real_pages:
        records = check_bit_equal(codec, k.view(torch.int16), v.view(torch.int16))
        pages += records.shape[0] * records.shape[1]
    assert pages >= 10_000
