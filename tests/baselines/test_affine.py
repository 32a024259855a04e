"""Uniform steps over groups: error against the step, codes that survive a second pass, and the published rounding."""

from __future__ import annotations

import pytest
import torch

from sgl_hq.baselines.affine import Affine, Symmetric
from sgl_hq.baselines.rotations import Rotated, signed_hadamard
from sgl_hq.baselines.side import Transposed


def round_trip(side, x: torch.Tensor) -> torch.Tensor:
    return side.decode(side.encode(x), tuple(x.shape))


def in_groups(x: torch.Tensor, group: int | None) -> torch.Tensor:
    return x.unflatten(-1, (-1, group or x.shape[-1]))


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 64), (3, 32), (2, 32), (8, 16)])
def test_symmetric_is_within_half_a_step(prefix, tolerances, bits, group):
    side = Symmetric(bits, group)
    error = in_groups((round_trip(side, prefix) - prefix).abs(), group)
    largest = in_groups(prefix.abs(), group).amax(-1, keepdim=True)
    assert (error <= tolerances.symmetric16_error(largest, 2 ** (bits - 1) - 1)).all()


@pytest.mark.parametrize("bits, group", [(4, 32), (3, 32), (2, 64), (3, None), (8, 32)])
def test_affine_is_within_half_a_step(prefix, tolerances, bits, group):
    check_affine(Affine(bits, group), prefix, group, tolerances)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kivi_keys_are_within_half_a_step_of_their_channel(prefix, tolerances, bits):
    side = Transposed(Affine(bits, 64))
    error = (round_trip(side, prefix) - prefix).abs()
    pages = prefix.unflatten(1, (-1, 64))  # [H, pages, 64, D]
    bound = affine_bound(pages.amin(2), pages.amax(2), 2**bits - 1, tolerances)
    assert (error.unflatten(1, (-1, 64)) <= bound.unsqueeze(2)).all()


@pytest.mark.parametrize("bits, meta_bits", [(3, 4), (2, 8)])
def test_coded_metadata_is_within_half_a_step_of_its_range(prefix, tolerances, bits, meta_bits):
    side, levels, most = Affine(bits, 64, meta_bits=meta_bits), 2**bits - 1, 2**meta_bits - 1
    error = in_groups((round_trip(side, prefix) - prefix).abs(), 64).amax(-1)
    groups = in_groups(prefix, 64)
    low, high = groups.amin(-1), groups.amax(-1)
    bound = tolerances.affine16_error(
        low,
        high,
        levels,
        tolerances.coded_metadata_error(low, most),
        tolerances.coded_metadata_error((high - low) / levels, most),
    )
    assert (error <= bound).all()


def test_the_hadamard_rotation_spreads_the_error_but_keeps_its_norm(prefix, tolerances):
    side = Rotated(Affine(2, 32), signed_hadamard)
    error = (round_trip(side, prefix) - prefix).norm(dim=-1)
    rotated = in_groups(prefix @ signed_hadamard(64).T, 32)
    bound = affine_bound(rotated.amin(-1), rotated.amax(-1), 3, tolerances)  # [H, T, 2], each for 32 values
    rounding = 2 * 64 * tolerances.rounded_sum(64) * prefix.norm(dim=-1)
    assert (error <= (32 * bound.square()).sum(-1).sqrt() + rounding).all()


KEEP_THEIR_CODES = [
    Symmetric(4, 32),
    Affine(4, 32),
    Affine(3),
    Transposed(Affine(2, 64)),
    Rotated(Affine(2, 32), signed_hadamard),
]


@pytest.mark.parametrize("side", KEEP_THEIR_CODES)
def test_codes_survive_a_second_pass(random_prefix, side):
    x = random_prefix("random").transpose(0, 1).float().contiguous()
    once = side.encode(x)
    again = side.encode(side.decode(once, tuple(x.shape)))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_three_bits_hold_eight_levels_seven_steps():
    """Published as "seven level": `qmax = 7.0`."""
    x = torch.arange(8.0).repeat(64, 8).unsqueeze(0)
    assert torch.equal(round_trip(Affine(3, 32), x), x)


def test_coded_metadata_by_hand():
    """Two kinds of token: one group of 0 .. 3 (scale 1), one of 0 .. 6 (scale 2). The range 1 .. 2 has both ends."""
    x = torch.stack([torch.arange(64.0) % 4, torch.arange(64.0) % 4 * 2]).repeat(32, 1).unsqueeze(0)
    plane, scale_codes, scale_range, low_codes, low_range = Affine(2, 64, meta_bits=8).encode(x)
    assert [part.dtype for part in (plane, scale_codes, scale_range)] == [torch.uint8, torch.uint8, torch.float16]
    assert scale_codes.tolist() == [[0, 255] * 32] and low_codes.unique().tolist() == [0]
    assert scale_range.flatten().tolist() == [1.0, float(torch.tensor(1 / 255).half())]
    assert low_range.flatten().tolist() == [0.0, 0.0]


def check_affine(side, x, group, tolerances):
    error = in_groups((round_trip(side, x) - x).abs(), group).amax(-1)
    groups = in_groups(x, group)
    assert (error <= affine_bound(groups.amin(-1), groups.amax(-1), 2**side.bits_per_code - 1, tolerances)).all()


def affine_bound(low, high, levels, tolerances):
    scale = (high - low) / levels
    return tolerances.affine16_error(
        low, high, levels, tolerances.float16_rounding(low), tolerances.float16_rounding(scale)
    )
