"""Scale and minimum of every group of an affine page, 8 bits each, rounded so that the codes always cover the data.

A group is one K channel over the page's tokens, or one V token over the (rotated) channels. Stored per group: a scale
code and a minimum code. Stored per page, head and side, in bfloat16: scale base and step, minimum base and step. Then

    scale = scale_base + scale_code * scale_step        minimum = min_base + min_code * min_step
    value = minimum + code * scale                      code in 0 .. levels, levels = 2**bits - 1

The product of a code (8 bits) and a step (8 significant bits) is exact in float32, so scale and minimum decode to the
same bits everywhere, with or without fused multiply-add. bfloat16, not float16: values above 65504 must pack too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MAX_CODE = 255
_TINY = 2.0**-126  # smallest normal float32: a smaller step could be flushed to zero


@dataclass(frozen=True)
class Groups:
    """`scale_codes`, `min_codes`: `[..., G] uint8`; `ranges`: `[..., 4] bfloat16`, base and step of each in turn."""

    scale_codes: torch.Tensor
    min_codes: torch.Tensor
    ranges: torch.Tensor

    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, minimum), both `[..., G] float32`."""
        scale_base, scale_step, min_base, min_step = self.ranges.float().unsqueeze(-2).unbind(-1)
        return (
            torch.addcmul(scale_base, self.scale_codes.float(), scale_step),
            torch.addcmul(min_base, self.min_codes.float(), min_step),
        )


def fit_groups(low: torch.Tensor, high: torch.Tensor, levels: int) -> Groups:
    """Groups whose code range [minimum, minimum + levels * scale] contains [low, high], both `[..., G]` and finite."""
    low, high = low.double() + 0.0, high.double() + 0.0  # -0.0 becomes 0.0: which zero amin returns is anyone's guess
    min_codes, min_base, min_step, minimum = _fit_codes(low, round_up=False)
    # The scale is fitted to the *stored* minimum. The factor outweighs the rounding of this very line.
    needed = (high - minimum.double()) * ((1 + 2.0**-40) / levels)
    scale_codes, scale_base, scale_step, _ = _fit_codes(needed, round_up=True)
    return Groups(scale_codes, min_codes, torch.cat([scale_base, scale_step, min_base, min_step], -1))


def encode(values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: int) -> torch.Tensor:
    """Nearest codes, `uint8`, of `values` (float32); `scale` and `minimum` broadcast. Scale 0 means constant.

    One division a group instead of one a value: a scale is 0 or at least 2**-126, so its reciprocal is finite.
    """
    steps = (values - minimum) * torch.where(scale > 0, scale, torch.ones_like(scale)).reciprocal()
    return steps.round_().clamp_(0, levels).to(torch.uint8)


def bf16_ceil(values: torch.Tensor) -> torch.Tensor:
    """Smallest bfloat16 that is not below `values` (float64)."""
    nearest = values.to(torch.bfloat16)
    return torch.where(
        nearest.double() < values, torch.nextafter(nearest, torch.full_like(nearest, torch.inf)), nearest
    )


def step_ceil(values: torch.Tensor) -> torch.Tensor:
    """`bf16_ceil` of a step, but never between 0 and the smallest normal float32."""
    return bf16_ceil(torch.where(values > 0, values.clamp(min=_TINY), values))


def _fit_codes(
    wanted: torch.Tensor, *, round_up: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, base, step, decoded), where decoded >= wanted (round_up) or decoded <= wanted for every group."""
    base = -bf16_ceil(-wanted.amin(-1, keepdim=True))  # floor: code 0 is at or below every group
    if round_up:  # scales only: none may be subnormal (`encode`)
        base = torch.where(base < _TINY, torch.zeros_like(base), base)
    span = wanted.amax(-1, keepdim=True) - base.double()
    step = step_ceil(span * ((1 + 2.0**-20) / _MAX_CODE))  # the last code is at or above every group
    steps = (wanted - base.double()) * torch.where(step > 0, step, torch.ones_like(step)).double().reciprocal()
    codes = steps.round().clamp_(0, _MAX_CODE)

    def decoded() -> torch.Tensor:
        return torch.addcmul(base.float(), codes.float(), step.float())

    # Compared as decoded, so that float32 rounding cannot leave a group on the wrong side.
    short = (decoded().double() < wanted) if round_up else (decoded().double() > wanted)
    codes = (codes + (short.double() if round_up else -short.double())).clamp_(0, _MAX_CODE)
    return codes.to(torch.uint8), base, step, decoded()
