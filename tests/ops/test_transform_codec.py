"""Calibrated pages: half a stored step in every component, every width, sinks, and what is refused."""

from __future__ import annotations

import pytest
import torch
from page_samples import CONTENTS, head_major, make

from sgl_hq.kernels.page_codec import NonFiniteError, PageCodec
from sgl_hq.kernels.page_codec.transform import Basis, Transform
from sgl_hq.page_format import PageFormat

HEADS = 2
WIDTHS = (8, 7, 6, 5, 4, 3, 2, 2)
U = 2.0**-24

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _basis(dim: int, seed: int, scale: float = 1.0) -> Basis:
    """Orthonormal, so that an error in components is as long as the error in values."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(HEADS, dim, dim, generator=generator, dtype=torch.float64))[0]
    return Basis((turn * scale).float(), (turn.mT / scale).float().contiguous())


def _codec(dim: int, v_dim: int | None = None, sinks: int = 0, scale: float = 1.0) -> PageCodec:
    v_dim = v_dim or dim
    widths = [tuple(sorted((WIDTHS * 4)[: d // 8], reverse=True)) for d in (dim, v_dim)]
    fmt = PageFormat("t", "transform", widths[0][0], widths[1][0], sinks, k_widths=widths[0], v_widths=widths[1])
    return PageCodec(fmt, dim, v_dim, Transform(_basis(dim, 0, scale), _basis(v_dim, 1, scale)))


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 128), (80, 96)], ids=str)
def test_every_component_is_within_half_a_step_of_its_range(dims, contents):
    """A step is at most the component's range over the page, plus 1/255 of the spread of minima and of ranges (the 8-bit
    metadata), times 1 + 2**-7 (bfloat16), over its levels. Rotating there and back in float32 adds at most 8 D u times the
    token's length."""
    codec = _codec(*dims)
    k, v = (make(contents, (3, 64, HEADS, dim), seed) for seed, dim in enumerate(dims))
    records, sink = codec.pack(k, v, first_has_sink=True)
    assert sink is None
    for side, x, got, basis in zip("kv", (k, v), codec.unpack(records), (codec_basis(codec)), strict=True):
        x = x.permute(2, 0, 1, 3).double()  # [H, P, 64, D]
        turn = basis.forward.double().unsqueeze(1)
        y, error = x @ turn, (got.double().unflatten(1, (3, 64)) - x) @ turn
        low, high = y.amin(2), y.amax(2)
        spread = (low.amax(-1) - low.amin(-1)).unsqueeze(-1) / 255
        ranges = high - low + spread
        ranges = ranges + (ranges.amax(-1) - ranges.amin(-1)).unsqueeze(-1) / 255
        levels = torch.cat([torch.full((s.end - s.first,), 2.0**s.bits - 1) for s in codec.layout.spans(side)])
        slack = 8 * x.shape[-1] * U * x.norm(dim=-1, keepdim=True).amax(2) + low.abs().amax(-1, keepdim=True) * 2**-7 / 255
        allowed = 0.5 * ranges * (1 + 2**-6) / levels + slack + 256 * 2.0**-126  # no step is subnormal
        assert (error.abs() <= allowed.unsqueeze(2)).all(), side


def codec_basis(codec: PageCodec) -> tuple[Basis, Basis]:
    """Bases of `_codec`, K then V."""
    dims = codec.layout.head_dim, codec.layout.v_head_dim
    return _basis(dims[0], 0), _basis(dims[1], 1)


def test_wider_components_are_closer():
    codec = _codec(64)
    k = make("random", (8, 64, HEADS, 64), 0)
    got, _ = codec.unpack(codec.pack(k, k, first_has_sink=False)[0])
    error = (got - head_major(k).float()) @ _basis(64, 0).forward
    by_span = error.pow(2).mean((0, 1)).view(8, 8).mean(1)
    assert (by_span.diff()[:6] > 0).all() and by_span[0] < by_span[5] / 1000


@pytest.mark.parametrize("sinks", [0, 4])
def test_sinks_are_exact_and_add_nothing_to_the_ranges(sinks):
    codec = _codec(64, sinks=sinks)
    k, v = (make("random", (2, 64, HEADS, 64), seed) for seed in (0, 1))
    loud = k.clone()
    loud[0, :4] *= 1000
    records, sink = codec.pack(loud, v, first_has_sink=True)
    got, _ = codec.unpack(records, sink)
    quiet_error = (got[:, 4:] - head_major(k).float()[:, 4:]).abs().max()
    if sinks:
        assert torch.equal(got[:, :4], head_major(loud).float()[:, :4])
        assert quiet_error < 2.0
    else:
        assert quiet_error > 10.0


def test_packing_twice_gives_the_same_bytes_and_no_gap_is_unwritten():
    codec = _codec(64, sinks=4)
    k, v = (make("random", (2, 64, HEADS, 64), seed) for seed in (0, 1))
    first, second = (codec.pack(k, v, first_has_sink=True) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    covered = torch.zeros(codec.layout.record_bytes, dtype=torch.bool)
    for field in codec.layout.fields:
        assert not covered[field.offset : field.end].any(), "fields overlap"
        covered[field.offset : field.end] = True
    assert (first[0][..., ~covered] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**113])
def test_values_that_cannot_be_packed_are_refused(value):
    codec = _codec(64)
    k = make("random", (1, 64, HEADS, 64), 0)
    k[0, 5, 1, 7] = value
    with pytest.raises(NonFiniteError):
        codec.pack(k, k, first_has_sink=False)


def test_components_that_the_basis_makes_too_large_are_refused():
    codec = _codec(64, scale=2.0**40)
    k = make("random", (1, 64, HEADS, 64), 0)
    codec.pack(k, k, first_has_sink=False)
    with pytest.raises(NonFiniteError, match="basis"):
        codec.pack(k * 2.0**90, k, first_has_sink=False)


def test_a_basis_is_asked_for_exactly_where_it_is_used():
    with pytest.raises(ValueError, match="needs a transform"):
        PageCodec(_codec(64).fmt, 64)
    from sgl_hq.page_format import get_format

    with pytest.raises(ValueError, match="take none"):
        PageCodec(get_format("hq6"), 64, 64, Transform(_basis(64, 0), _basis(64, 1)))


@pytest.mark.parametrize("widths", [(4, 5, 3, 3, 3, 3, 3, 3), (5, 4, 4), (9, 4, 4, 4, 4, 4, 4, 4)])
def test_bad_widths_are_refused(widths):
    with pytest.raises(ValueError):
        PageFormat("t", "transform", max(widths), 4, k_widths=widths, v_widths=(4,) * 8).layout(64)
