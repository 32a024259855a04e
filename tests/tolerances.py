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

    Pack: x - minimum, 1 / scale and their product, u each: 3 u * levels steps. Unpack: code * scale and the sum, u each
    of at most |minimum| + levels * scale. In total at most 5 u (|minimum| + levels * scale).
    """
    return 0.5 * scale + 5 * U * (minimum.abs() + levels * scale)


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


# --- reference formats (sgl_hq/baselines): metadata is rounded to nearest float16, so codes need not cover the data ---
U16 = 2.0**-11  # unit roundoff of float16
TINY16 = 2.0**-25  # half of float16's smallest subnormal


def float16_rounding(values: torch.Tensor) -> torch.Tensor:
    """Largest error of one value stored as float16."""
    return U16 * values.abs() + TINY16


def symmetric16_error(largest: torch.Tensor, levels: int) -> torch.Tensor:
    """Half a stored step: scale = largest / levels, rounded to float16. The end of the group moves by levels * U16 of a
    step, less than half of one. The quotient and the product add u each of at most `levels` steps."""
    scale = largest / levels
    return 0.5 * (scale + float16_rounding(scale)) + levels * TINY16 + 2 * U * largest


def affine16_error(
    low: torch.Tensor, high: torch.Tensor, levels: int, low_error: torch.Tensor, scale_error: torch.Tensor
) -> torch.Tensor:
    """Of a group [low, high] whose stored minimum and scale are off by at most `low_error` and `scale_error`: half a
    stored step, or what the codes fail to cover at an end of the group. Float32 adds as in `affine_error`."""
    scale = (high - low) / levels
    uncovered = low_error + levels * scale_error
    return torch.maximum(0.5 * (scale + scale_error), uncovered) + 4 * U * (low.abs() + high.abs() + uncovered)


def coded_metadata_error(values: torch.Tensor, levels: int) -> torch.Tensor:
    """Of a scale or minimum `[H, T, G]` stored as nearest code of a float16 range over T: half a step of the range, or
    what rounding base and step to float16 leaves uncovered at its ends."""
    base, top = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    base_error = float16_rounding(base)
    step = (top - base + base_error) / levels
    step_error = float16_rounding(step)
    return torch.maximum(0.5 * (step + step_error), base_error + levels * step_error) + 4 * U * (base.abs() + top.abs())


def max_scaled_error(largest: torch.Tensor, widest_gap: float) -> torch.Tensor:
    """Half the widest gap of a table that ends at +-1, times the stored maximum (which is off by U16, less than half a
    gap, at the end of the table)."""
    return (0.5 * widest_gap + U16 + 4 * U) * largest + TINY16


def norm_scaled_error(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Of every coordinate of `[..., D]` whose unit vector is coded by the nearest of the rising `levels`: half the
    widest gap times the norm, or the way to the outermost level times the norm. The stored norm (off by U16) divides
    and multiplies, so only what multiplies a level moves by U16; float32 (4 u) is far below that."""
    norm = x.norm(dim=-1, keepdim=True)
    half_gap = 0.5 * (levels[1:] - levels[:-1]).max()
    return torch.maximum(half_gap * norm, x.abs() - levels[-1] * norm) * (1 + U16) + U16 * norm * levels[-1] + TINY16


def rounded_sum(rows: int) -> float:
    """Relative rounding of a dot product of `rows` terms with entries off by u each: (rows + 1) u, of the sum of
    magnitudes."""
    return (rows + 1) * U


def standard_error(samples: torch.Tensor, sigmas: float = 5.0) -> torch.Tensor:
    """How far the mean over axis 0 of independent samples may lie from its expectation: 5 sigma is 6e-7 per mean."""
    return sigmas * samples.std(0) / math.sqrt(samples.shape[0])


# Served against offline log-probabilities, both in float32 with bfloat16 K and V, as a share of what packing itself changes.
# The sums run in another order, so K and V differ by some 2**-24 before they are rounded to bfloat16: about one value in 500
# falls to the other neighbour, and with it, or alone, about one code in 1,000 to the next one. Packing puts every value off
# by 1/sqrt(12) of a step, a flipped code one of 1,000 by a whole step: sqrt(12 / 1000) = 0.11 of the effect.
SERVED_AGAINST_OFFLINE = 0.11
