"""Calibrated pages: components of K and V in a basis of the model's own, with a width for every 8 of them.

A component (one column of `x @ forward`) is affine over the page's tokens as a K channel of kind affine is: a minimum and
a range of 8 bits each. `forward` gives components of about unit variance, so one set of range parameters serves them all
(groups.py with one level: its scale is the whole range). Basis and widths: sgl_hq/calibration/.

Dimensions: P pages, 64 tokens a page, H kv heads, D = head_dim or v_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from sgl_hq.page_format import PageLayout, plane_widths

from .bitplanes import pack_planes, unpack_planes
from .errors import MAX_MAGNITUDE, NonFiniteError
from .groups import Groups, fit_groups
from .record import get, put

_OVER_TOKENS = 2


@dataclass(frozen=True)
class Basis:
    """Of one layer and side: `forward`, `inverse` `[H, D, D] float32`; rows of values times `forward` are components."""

    forward: torch.Tensor
    inverse: torch.Tensor


@dataclass(frozen=True)
class Transform:
    """Of one layer."""

    k: Basis
    v: Basis


def pack_transformed(
    layout: PageLayout, transform: Transform, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sink_tokens: int = 0
) -> None:
    """Fill `records`, `[P, H, record_bytes] uint8`, from k `[P, H, 64, D]` and v `[P, H, 64, Dv]`, bfloat16.

    The codes of the first `sink_tokens` tokens of page 0 are set to 0. Raises NonFiniteError for components that are too
    large.
    """
    ranges = []
    for side, values, basis in (("k", k, transform.k), ("v", v, transform.v)):
        values = values.float() @ basis.forward
        if values.numel() and not values.abs().amax() <= MAX_MAGNITUDE:  # the basis scales small directions up
            raise NonFiniteError(f"{side} has components above 2**112 in the model's basis: keep these pages dense")
        groups = fit_groups(values.amin(_OVER_TOKENS), values.amax(_OVER_TOKENS), levels=1)
        levels = _levels(layout, side, values.device)
        step, minimum = _decode(groups, levels)
        usable = torch.where(step > 0, step, torch.ones_like(step)).unsqueeze(_OVER_TOKENS)
        codes = ((values - minimum.unsqueeze(_OVER_TOKENS)) / usable).round_().clamp_(min=0)
        codes = torch.minimum(codes, levels).to(torch.uint8)
        codes[:1, :, :sink_tokens] = 0
        for span in layout.spans(side):
            part = codes[..., span.first : span.end].flatten(2)
            for width, plane in zip(plane_widths(span.bits), pack_planes(part, span.bits), strict=True):
                put(records, layout[span.plane(width)], plane)
        put(records, layout[f"{side}_scale"], groups.scale_codes)
        put(records, layout[f"{side}_min"], groups.min_codes)
        ranges.append(groups.ranges)
    put(records, layout["ranges"], torch.cat(ranges, -1))


def unpack_transformed(
    layout: PageLayout, transform: Transform, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Fill k `[H, P, 64, D]` and v `[H, P, 64, Dv]`, contiguous float32, from records `[H, P, record_bytes] uint8`."""
    all_ranges = get(records, layout["ranges"], torch.bfloat16)
    for side, out, basis in (("k", k, transform.k), ("v", v, transform.v)):
        ranges = all_ranges[..., :4] if side == "k" else all_ranges[..., 4:]
        groups = Groups(*(get(records, layout[f"{side}_{name}"], torch.uint8) for name in ("scale", "min")), ranges)
        step, minimum = _decode(groups, _levels(layout, side, out.device))
        components = torch.empty_like(out)
        for span in layout.spans(side):
            planes = [get(records, layout[span.plane(width)], torch.uint8) for width in plane_widths(span.bits)]
            codes = unpack_planes(planes, span.bits).unflatten(-1, (-1, span.end - span.first))
            components[..., span.first : span.end] = codes
        torch.addcmul(minimum.unsqueeze(2), components, step.unsqueeze(2), out=components)
        torch.bmm(components.flatten(1, 2), basis.inverse, out=out.view(out.shape[0], -1, out.shape[-1]))


def _decode(groups: Groups, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(step of a code, minimum), both `[..., D] float32`."""
    whole, minimum = groups.decode()
    return whole / levels, minimum


@cache  # unpacking asks for them in every layer of every decode step
def _levels(layout: PageLayout, side: str, device: torch.device) -> torch.Tensor:
    """`[D] float32`: the largest code of every component."""
    return torch.cat([torch.full((s.end - s.first,), 2.0**s.bits - 1, device=device) for s in layout.spans(side)])
