"""Every tolerance of the tests, each with its derivation. No overrides.

u = 2**-24 is the unit roundoff of float32. `scale` and `minimum` are the *stored* parameters of a group, as decoded.
"""

from __future__ import annotations

import math

import torch

U = 2.0**-24
BF16_ULP = 2.0**-7  # distance between neighbours of bfloat16, relative to the smaller one: 8 significant bits


def int8_error(scale: torch.Tensor) -> torch.Tensor:
    """Half a stored step. The quotient x / scale is rounded once more in float32 (relative u, at most 127 steps: 127 u
    steps); code * scale is exact (7 by 8 significant bits)."""
    return scale * (0.5 + 128 * U)


def int8_scale(largest: torch.Tensor) -> torch.Tensor:
    """Largest stored scale for a row whose largest magnitude is `largest`: largest / 127 rounded up to bfloat16, never
    below the smallest normal float32."""
    return (largest / 127 * (1 + BF16_ULP)).clamp(min=2.0**-126)


def affine_error(scale: torch.Tensor, minimum: torch.Tensor, levels: int) -> torch.Tensor:
    """Half a stored step, since the codes cover the group, plus float32 rounding.

    Pack: x - minimum (u), the quotient (u): 2 u * levels steps. Unpack: code * scale and the sum, u each of at most
    |minimum| + levels * scale. In total below 4 u (|minimum| + levels * scale).
    """
    return 0.5 * scale + 4 * U * (minimum.abs() + levels * scale)


def rotated_error(
    scale: torch.Tensor, minimum: torch.Tensor, levels: int, block: int, rotation_error: torch.Tensor
) -> torch.Tensor:
    """Largest error of one V value after the inverse rotation, of a token with this scale and minimum.

    A value is the sum of `block` rotated ones with weights +-1 / sqrt(block): the errors add up to sqrt(block) times
    `affine_error` at worst. Unpack adds rounding on |minimum| + levels * scale, times sqrt(block): the product with
    integer codes is exact, then scale / root, the product, minimum * root, root itself and the sum: 8 u.
    `rotation_error` is what the forward rotation rounds, per rotated value (`forward_rotation_error`), and adds up the
    same way.
    """
    root = math.sqrt(block)
    size = minimum.abs() + levels * scale
    return root * (affine_error(scale, minimum, levels) + 8 * U * size + rotation_error)


def rotated_norm_error(
    scale: torch.Tensor, minimum: torch.Tensor, levels: int, dim: int, rotation_error: torch.Tensor
) -> torch.Tensor:
    """Largest L2 error of a V token: an orthonormal rotation keeps the norm, so sqrt(dim) values, each off by a half
    step."""
    size = minimum.abs() + levels * scale
    return math.sqrt(dim) * (affine_error(scale, minimum, levels) + rotation_error) + dim * 8 * U * size


def forward_rotation_error(values: torch.Tensor, block: int) -> torch.Tensor:
    """Rounding of one rotated value: a sum of `block` terms of at most max|x|, in any order, then one product with an
    inexact 1 / sqrt(block): (block + 2) u * sqrt(block) * max|x|."""
    return (block + 2) * U * math.sqrt(block) * values.abs().amax(-1)


def affine_scale(low: torch.Tensor, high: torch.Tensor, levels: int) -> torch.Tensor:
    """Largest scale a packer may store for groups [low, high] (`[..., G]`): keeps the metadata from being wasteful.

    Minimum: base is the smallest `low` rounded down to bfloat16 (at most 2**-7 of it), the step is the range / 255
    rounded up (1 + 2**-7), and a minimum is below its `low` by at most two steps (floor, and one code for float32
    rounding). Scale: the same on the wanted scales (high - minimum) / levels, upwards. 2**-120 covers the floor of
    steps at 2**-126.
    """

    def range_step(wanted: torch.Tensor) -> torch.Tensor:
        smallest, largest = wanted.amin(-1, keepdim=True), wanted.amax(-1, keepdim=True)
        return (largest - smallest + BF16_ULP * smallest.abs()) / 255 * (1 + 2 * BF16_ULP) + 2.0**-120

    # The bound on a step grows with the spread of what is fitted, so bound the spread from both ends.
    low_step = range_step(low)
    most, least = (high - low + 2 * low_step) / levels, (high - low) / levels
    spread = torch.cat([most.amax(-1, keepdim=True), least.amin(-1, keepdim=True)], -1)
    return most * (1 + 2.0**-20) + 2 * range_step(spread)
