"""Lossy pages: error bounds on every kind of content, the rotation, sinks."""

from __future__ import annotations

import itertools

import pytest
import tolerances
import torch
from codec_checks import check_lossy, rotated, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from page_samples import CONTENTS, head_major, make

from sgl_hq.kernels.page_codec import NonFiniteError, PageCodec, hadamard
from sgl_hq.kernels.page_codec.affine import stored_codes
from sgl_hq.kernels.page_codec.hadamard import block_size, sign_matrix
from sgl_hq.page_format import FORMATS, get_format

LOSSY = [*(fmt for fmt in FORMATS.values() if fmt.lossy), get_format("K6tV5"), get_format("sink4-K2tV8")]
EVERY_WIDTH = [
    get_format(f"{sink}K{k}{group}V{v}")
    for sink, group in (("sink4-", ""), ("", "t"))
    for k, v in itertools.product(range(2, 9), repeat=2)
]
DIMS = [(64, 64), (80, 80), (96, 32), (128, 128), (256, 192)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(("dim", "block"), [(8, 8), (64, 64), (80, 16), (96, 32), (128, 128), (256, 256)])
def test_hadamard_is_orthonormal(dim, block):
    signs = sign_matrix(dim, torch.device("cpu"))
    assert block_size(dim) == block
    assert torch.equal(signs @ signs, block * torch.eye(dim))
    assert torch.equal(signs, signs.T)
    # unpack relies on this: the rotation of a constant only touches the first channel of a block
    assert torch.equal(signs.sum(0), torch.where(torch.arange(dim) % block == 0, block, 0).float())


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("fmt", LOSSY, ids=lambda fmt: fmt.name)
def test_errors_stay_within_half_a_stored_step(fmt, dims, contents):
    k, v = (make(contents, (3, 64, 2, dim), seed) for seed, dim in enumerate(dims))
    check_lossy(PageCodec(fmt, *dims), k, v)


@pytest.mark.parametrize("fmt", EVERY_WIDTH, ids=lambda fmt: fmt.name)
def test_every_width_stays_within_half_a_stored_step(fmt):
    k, v = (make("outlier_channels", (2, 64, 2, 64), seed) for seed in (1, 2))
    check_lossy(PageCodec(fmt, 64, 64), k, v)


@settings(max_examples=40, deadline=None)
@given(
    fmt=st.sampled_from([*LOSSY, *EVERY_WIDTH]),
    pages=st.integers(1, 5),
    heads=st.integers(1, 4),
    k_dim=st.integers(1, 20).map(lambda n: 8 * n),
    v_dim=st.integers(1, 20).map(lambda n: 8 * n),
    contents=st.sampled_from(CONTENTS),
    seed=st.integers(0, 1000),
)
def test_any_shape_stays_within_half_a_stored_step(fmt, pages, heads, k_dim, v_dim, contents, seed):
    k, v = (make(contents, (pages, 64, heads, dim), seed + i) for i, dim in enumerate((k_dim, v_dim)))
    check_lossy(PageCodec(fmt, k_dim, v_dim), k, v)


def test_constant_channels_of_k_are_exact():
    """A page whose channels all hold one and the same value has scale 0 and a bfloat16 minimum: nothing is lost."""
    codec = PageCodec(FORMATS["hq6"], 64, 64)
    for value in (0.0, -1.7, 3e30, 1e-30):
        page = torch.full((1, 64, 2, 64), value, dtype=torch.bfloat16)
        assert torch.equal(codec.unpack(codec.pack(page, page, first_has_sink=False)[0])[0], head_major(page).float())


def test_many_pages_use_many_tiles():
    """More tokens than one tile of the inverse rotation, and not a multiple of it."""
    pages = 2 * hadamard._TILE_TOKENS // 64 + 1
    k, v = (make("random", (pages, 64, 1, 8), seed) for seed in (1, 2))
    check_lossy(PageCodec(get_format("K6tV5"), 8, 8), k, v)


@pytest.mark.parametrize("dims", [(64, 64), (80, 96)], ids=str)
@pytest.mark.parametrize("name", ["hq6", "hq2", "sink1-K3V3", "sink63-K4tV4"])
def test_sink_tokens_are_bit_exact_and_leave_no_trace(name, dims):
    codec = PageCodec(get_format(name), *dims)
    sinks = codec.fmt.sink_tokens
    k, v = (make("random", (3, 64, 2, dim), seed) for seed, dim in enumerate(dims))
    wild_k, wild_v = k.clone(), v.clone()
    for wild in (wild_k, wild_v):
        wild[0, :sinks] = 1e4 * wild[0, :sinks]
        wild[0, 0, :, 0] = torch.inf
        wild[0, 0, :, 1] = -torch.nan
    records, sink = codec.pack(k, v, first_has_sink=True)
    wild_records, wild_sink = codec.pack(wild_k, wild_v, first_has_sink=True)
    assert torch.equal(records, wild_records), "sink tokens do not influence the page"
    assert not torch.equal(sink, wild_sink)

    for got, packed in zip(codec.unpack(wild_records, wild_sink), (wild_k, wild_v), strict=True):
        bits = head_major(packed)[:, :sinks].contiguous().view(torch.int16)
        widened = bits.int() << 16  # bfloat16 -> float32, by bits
        assert torch.equal(got[:, :sinks].contiguous().view(torch.int32), widened)
    for with_sink, without in zip(codec.unpack(records, sink), codec.unpack(records), strict=True):
        assert torch.equal(with_sink[:, sinks:], without[:, sinks:])
        assert without.isfinite().all()
    for side, dim in zip("kv", dims, strict=True):
        codes = stored_codes(codec.layout, records.transpose(0, 1), side).unflatten(-1, (64, dim))
        assert not codes[:, 0, :sinks].any(), "their codes are 0"
        assert codes[:, 1, :sinks].any()


def test_sink_tokens_are_left_out_of_the_statistics():
    """All values near 37: anything else in place of the sink tokens would widen the groups a hundredfold."""
    codec = PageCodec(FORMATS["hq6"], 64, 64)
    page = make("offset", (1, 64, 2, 64))
    records, _ = codec.pack(page, page, first_has_sink=True)
    packed = page.permute(2, 0, 1, 3).double()[:, :, 4:]  # [H, P, 60, D]
    scale, _ = stored(codec, records, "k")
    assert (scale <= tolerances.affine_scale(packed.amin(2), packed.amax(2), 63)).all()
    turned = rotated(packed)
    rotation = tolerances.forward_rotation_error(packed, 64)
    scale, _ = stored(codec, records, "v")
    bound = tolerances.affine_scale(turned.amin(-1) - rotation, turned.amax(-1) + rotation, 31)
    assert (scale[..., 4:] <= bound + 4 * rotation.amax(-1, keepdim=True)).all()
    minimum = stored(codec, records, "v")[1][..., 4:]
    assert (turned.amin(-1) - minimum <= 0.05).all(), "range of the minima: 1/255 of their spread, not of 0 .. 37"


def test_lossy_pages_of_a_real_model(real_pages):
    for name in ("hq6", "hq2", "K6tV5"):
        for k, v in (real_pages[0], real_pages[-1]):
            check_lossy(PageCodec(get_format(name), 64), k, v)


def test_only_the_first_page_of_a_sequence_has_a_sink():
    codec = PageCodec(FORMATS["hq6"], 64, 64)
    k, v = make("random", (2, 64, 2, 64), 1), make("random", (2, 64, 2, 64), 2)
    plain, none = codec.pack(k, v, first_has_sink=False)
    marked, sink = codec.pack(k, v, first_has_sink=True)
    assert none is None and list(sink.shape) == [2, codec.layout.sink_bytes]
    assert torch.equal(plain[1], marked[1])
    assert not torch.equal(plain[0], marked[0])
