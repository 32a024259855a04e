"""FP4 and FP8: every value of the element formats, ties, scales, and bounds."""

from __future__ import annotations

import math

import pytest
import torch

from sgl_hq.baselines.floats import E2M1, FP8, MXFP4, NVFP4, _from_e2m1, _to_e2m1
from sgl_hq.baselines.side import unpack_codes

SIDES = [MXFP4(), NVFP4(), FP8(), FP8(amax=True)]


def round_trip(side, x: torch.Tensor) -> torch.Tensor:
    return side.decode(side.encode(x), tuple(x.shape))


def test_e2m1_is_what_its_bits_say():
    """Sign, 2 exponent bits with bias 1, 1 mantissa bit; exponent 0 is subnormal."""
    for code, value in enumerate(_from_e2m1(torch.arange(16, dtype=torch.uint8)).tolist()):
        exponent, mantissa = code >> 1 & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        assert value == (-size if code & 8 else size)
        assert math.copysign(1, value) == (-1 if code & 8 else 1)


def test_e2m1_rounds_to_nearest_ties_to_even_and_saturates():
    assert _to_e2m1(torch.tensor([*E2M1, *(-m for m in E2M1)])).tolist() == list(range(16))
    ties = torch.tensor([(a + b) / 2 for a, b in zip(E2M1, E2M1[1:])])
    assert _to_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert _to_e2m1(torch.nextafter(ties, torch.tensor(9.0))).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert _to_e2m1(torch.nextafter(ties, torch.tensor(0.0))).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert _to_e2m1(torch.tensor([6.1, 1e30, -7.0])).tolist() == [7, 7, 15]


def test_mxfp4_scale_is_the_power_of_two_below_the_maximum_over_four():
    x = torch.zeros(1, 64, 64)
    x[0, :, 0] = torch.tensor([2.0**exponent * 1.9 for exponent in range(-32, 32)])
    plane, biased = MXFP4().encode(x)
    assert biased[0, :, 0, 0].tolist() == [127 + exponent - 2 for exponent in range(-32, 32)]
    assert biased[0, :, 1, 0].tolist() == [0] * 64  # the second block of 32 is zero
    codes = unpack_codes([plane], 4, (1, 64, 64))
    assert codes[0, :, 0].tolist() == [7] * 64  # 1.9 * 4 = 7.6 saturates to 6


def test_mxfp4_is_within_a_cell(prefix):
    """The block maximum is in [4, 8) scales: below 6 half the widest cell (1 scale), above it up to 2 scales."""
    groups = prefix.unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, torch.exp2(largest.log2().floor() - 2), 0)
    error = (round_trip(MXFP4(), prefix).unflatten(-1, (-1, 32)) - groups).abs()
    assert (error <= torch.where(groups.abs() > 6 * scale, 2 * scale, scale)).all()


def test_nvfp4_is_within_a_cell(prefix, tolerances):
    """Half the widest cell is 1 block scale. E4M3 rounds the scale by 1/16 at most, so the end of the block is off by
    6/16 of one; below E4M3's normal range (2**-6 of the tensor's scale) by up to 6 * 2**-10."""
    groups = prefix.unflatten(-1, (-1, 16))
    largest = groups.abs().amax(-1, keepdim=True)
    tensor_scale = largest.amax() / (6 * 448)
    bound = largest / 6 * (1 + 1 / 16) + 6 * 2.0**-10 * tensor_scale
    error = (round_trip(NVFP4(), prefix).unflatten(-1, (-1, 16)) - groups).abs()
    assert (error <= bound * (1 + 8 * tolerances.U)).all()


def test_nvfp4_uses_all_of_e4m3():
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    _, scale, tensor_scale = NVFP4().encode(x)
    assert scale.float().max() == 448 and tensor_scale.item() == x.abs().max() / (6 * 448)


def test_fp8_is_torchs_cast(prefix):
    assert torch.equal(FP8().encode(prefix)[0].view(torch.uint8), prefix.to(torch.float8_e4m3fn).view(torch.uint8))
    # 3 mantissa bits: half an ulp is 1/16 of the value, or half the smallest subnormal
    within_range = prefix.abs() <= 464
    error = (round_trip(FP8(), prefix) - prefix).abs()
    assert (error[within_range] <= (prefix.abs() / 16 + 2.0**-10).clamp(max=16)[within_range]).all()


def test_fp8_with_scale_one_loses_what_is_above_464():
    x = torch.tensor([448.0, 464.0, 466.0, -1000.0]).repeat(16).expand(1, 64, 64)
    restored = round_trip(FP8(), x)[0, 0, :4]
    assert restored[:2].tolist() == [448.0, 448.0] and restored[2:].isnan().all()
    assert round_trip(FP8(amax=True), x)[0, 0, 3] == pytest.approx(-1000.0, rel=2.0**-22)


def test_fp8_amax_is_within_half_an_ulp(prefix, tolerances):
    scale = prefix.abs().amax() / 448
    error = (round_trip(FP8(amax=True), prefix) - prefix).abs()
    assert (error <= prefix.abs() * (1 / 16 + 4 * tolerances.U) + scale * 2.0**-10).all()


@pytest.mark.parametrize("side", SIDES)
def test_codes_survive_a_second_pass(random_prefix, side):
    x = random_prefix("random").transpose(0, 1).float().contiguous()
    once = side.encode(x)
    again = side.encode(side.decode(once, tuple(x.shape)))
    for a, b in zip(once, again, strict=True):
        if a.dtype == torch.float32:  # the scale of the tensor went through a product and a quotient
            torch.testing.assert_close(a, b, rtol=2.0**-22, atol=0)
        else:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
