"""Tables of levels: NF4, Lloyd-Max, QJL, and the four signed levels."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from sgl_hq.baselines import codebook
from sgl_hq.baselines.codebook import (
    NF4_LEVELS,
    MaxScaled,
    NormScaled,
    SinkChannelFourLevel,
    lloyd_max_levels,
    look_up,
    nearest,
)

# J. Max, "Quantizing for minimum distortion", 1960, table I: positive output levels and mean squared error.
MAX_1960 = {
    1: ((0.7980,), 0.3634),
    2: ((0.4528, 1.510), 0.1175),
    3: ((0.2451, 0.7560, 1.344, 2.152), 0.03454),
    4: ((0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733), 0.009497),
}


def round_trip(side, x: torch.Tensor) -> torch.Tensor:
    return side.decode(side.encode(x), tuple(x.shape))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_max_against_the_published_table(bits):
    levels, published = lloyd_max_levels(bits), MAX_1960[bits][0]
    assert levels == tuple(-level for level in reversed(levels)) and len(levels) == 2**bits
    for level, wanted in zip(levels[2 ** (bits - 1) :], published, strict=True):
        assert level == pytest.approx(wanted, abs=6e-4 if wanted > 1 else 2e-4)  # the last printed digit


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_distortion_on_the_normal_distribution(bits, tolerances):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(3))
    squares = (look_up(nearest(x, lloyd_max_levels(bits)), lloyd_max_levels(bits)) - x).square()
    last_digit = 5e-5 if bits < 3 else 5e-6
    assert abs(squares.mean() - MAX_1960[bits][1]) <= tolerances.standard_error(squares) + last_digit


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_norm_scaled_is_within_the_worst_cell(prefix, tolerances, bits):
    side = NormScaled(bits)
    levels = torch.tensor(lloyd_max_levels(bits)) / prefix.shape[-1] ** 0.5
    error = (round_trip(side, prefix) - prefix).abs()
    assert (error <= tolerances.norm_scaled_error(prefix, levels)).all()


def test_nf4_levels_are_the_quantiles_of_the_normal():
    """As bitsandbytes builds them (functional.py, create_normal_map): 8 steps below and 7 above 0, scaled to 1."""
    quantile, offset = NormalDist().inv_cdf, 0.9677083
    above, below = ([quantile(offset + (0.5 - offset) * i / n) for i in range(n)] for n in (8, 7))
    wanted = sorted([*above, 0.0, *(-value for value in below)])
    assert list(NF4_LEVELS) == pytest.approx([value / max(wanted) for value in wanted], abs=2e-6)


def test_nf4_is_within_half_the_widest_gap(prefix, tolerances):
    error = (round_trip(MaxScaled(NF4_LEVELS, 64), prefix) - prefix).abs()
    widest = max(b - a for a, b in zip(NF4_LEVELS, NF4_LEVELS[1:]))
    assert (error <= tolerances.max_scaled_error(prefix.abs().amax(-1, keepdim=True), widest)).all()


def test_nf4_codes_against_a_search_of_the_table(random_prefix):
    x = random_prefix("random").transpose(0, 1).float().contiguous()
    plane, scale = MaxScaled(NF4_LEVELS, 64).encode(x)
    wanted = (x.unsqueeze(-1) / scale.float() - torch.tensor(NF4_LEVELS)).abs().argmin(-1)
    low, high = (plane & 15).int(), (plane >> 4).int()  # bitplanes.py: the first half of the codes has the low nibbles
    assert torch.equal(torch.cat([low, high], 1), wanted.flatten(1).int())


def test_nf4_codes_survive_a_second_pass(random_prefix):
    x = random_prefix("outlier_channels").transpose(0, 1).float().contiguous()
    side = MaxScaled(NF4_LEVELS, 64)
    once = side.encode(x)
    again = side.encode(side.decode(once, tuple(x.shape)))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_qjl_makes_inner_products_unbiased(monkeypatch, tolerances, bits):
    """Over independent S the mean of <q, K'> - <q, K> vanishes; without QJL it does not (1 bit keeps 2 / pi of it)."""
    draw = torch.Generator().manual_seed(11)
    k, q = (torch.randn(1, 64, 64, generator=draw) for _ in range(2))
    q = q + k  # inner products of the size of |K|**2, so that a bias shows
    exact = (q * k).sum(-1).flatten()
    matrices = torch.randn(600, 64, 64, generator=draw)
    estimates = []
    for matrix in matrices:
        monkeypatch.setattr(codebook, "gaussian_matrix", lambda dim, matrix=matrix: matrix)
        estimates.append((q * round_trip(NormScaled(bits, qjl=True), k)).sum(-1).flatten())
    error = torch.stack(estimates) - exact
    # |r| is float16: off by U16 of the residual's share, which is below |q| |K|.
    rounding = 2 * tolerances.U16 * (q.norm(dim=-1) * k.norm(dim=-1)).flatten()
    assert (error.mean(0).abs() <= tolerances.standard_error(error) + rounding).all()
    without = (q * round_trip(NormScaled(bits - 1), k)).sum(-1).flatten() - exact
    assert without.mean() < -5 * without.std() / 8  # 64 inner products


def test_qjl_spends_one_bit_and_one_norm(random_prefix):
    x = random_prefix("random").transpose(0, 1).float().contiguous()
    parts = NormScaled(3, qjl=True).encode(x)
    assert [part.numel() * part.element_size() for part in parts] == [x.numel() // 4, 2 * 256, x.numel() // 8, 2 * 256]


def test_four_levels_by_the_published_code(random_prefix):
    """`sink1_channelwise_four_level_2bit` written as in the source, for NumPy `[T, D]`. The scale is float16 here."""
    x = random_prefix("outlier_channels", tokens=192).transpose(0, 1).float().contiguous()
    restored = round_trip(SinkChannelFourLevel(), x)
    for head in range(x.shape[0]):
        a = x[head].numpy()
        size = np.abs(a)
        s = (0.6 * np.median(size, axis=0) + 0.4 * np.mean(size, axis=0)).astype(np.float16).astype(np.float32)
        wanted = np.where(size < 0.75 * s, np.where(a >= 0, 0.55 * s, -0.55 * s), np.where(a >= 0, 1.85 * s, -1.85 * s))
        wanted[0] = a[0]
        np.testing.assert_allclose(restored[head].numpy(), wanted, rtol=2.0**-10)  # one ulp of float16, if s is a tie
