"""Affine pages: codes in bit planes, a scale and a minimum per group (groups.py), a rotation where a group is a token.

Dimensions: P pages, 64 tokens a page, H kv heads, D = head_dim, Dv = v_head_dim.
"""

from __future__ import annotations

import torch

from sgl_hq.page_format import PageLayout, plane_widths

from .bitplanes import pack_planes, unpack_planes
from .groups import Groups, encode, fit_groups
from .hadamard import rotate, unrotate
from .record import get, put

_OVER_TOKENS, _OVER_CHANNELS = 2, 3  # dimension of `[P, H, 64, D]` that a group runs over


def pack_affine(
    layout: PageLayout, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sink_tokens: int = 0
) -> None:
    """Fill `records`, `[P, H, record_bytes] uint8`, from k `[P, H, 64, D]` and v `[P, H, 64, Dv]`, bfloat16.

    The codes of the first `sink_tokens` tokens of page 0 are set to 0.
    """
    ranges = []
    for side, values in (("k", k), ("v", v)):
        over = _OVER_CHANNELS if _by_token(layout, side) else _OVER_TOKENS
        values = rotate(values) if over == _OVER_CHANNELS else values.float()
        bits = _bits(layout, side)
        levels = 2**bits - 1
        groups = fit_groups(values.amin(over), values.amax(over), levels)
        scale, minimum = groups.decode()
        codes = encode(values, scale.unsqueeze(over), minimum.unsqueeze(over), levels)
        codes[:1, :, :sink_tokens] = 0
        for width, plane in zip(plane_widths(bits), pack_planes(codes.flatten(2), bits), strict=True):
            put(records, layout[f"{side}_plane{width}"], plane)
        put(records, layout[f"{side}_scale"], groups.scale_codes)
        put(records, layout[f"{side}_min"], groups.min_codes)
        ranges.append(groups.ranges)
    put(records, layout["ranges"], torch.cat(ranges, -1))


def unpack_affine(layout: PageLayout, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Fill k `[H, P, 64, D]` and v `[H, P, 64, Dv]`, contiguous float32, from records `[H, P, record_bytes] uint8`."""
    for side, out in (("k", k), ("v", v)):
        codes, (scale, minimum) = stored_codes(layout, records, side), stored_groups(layout, records, side).decode()
        if _by_token(layout, side):
            unrotate(codes, scale, minimum, out=out)
        else:
            out.flatten(2).copy_(codes)
            torch.addcmul(minimum.unsqueeze(2), out, scale.unsqueeze(2), out=out)  # [H, P, 1, D] over the page's tokens


def stored_groups(layout: PageLayout, records: torch.Tensor, side: str) -> Groups:
    """Scales and minima of side "k" or "v", as stored."""
    ranges = get(records, layout["ranges"], torch.bfloat16)
    return Groups(
        get(records, layout[f"{side}_scale"], torch.uint8),
        get(records, layout[f"{side}_min"], torch.uint8),
        ranges[..., :4] if side == "k" else ranges[..., 4:],
    )


def stored_codes(layout: PageLayout, records: torch.Tensor, side: str) -> torch.Tensor:
    """`[H, P, 64 * D] uint8`, token-major, of side "k" or "v"."""
    bits = _bits(layout, side)
    planes = [get(records, layout[f"{side}_plane{width}"], torch.uint8) for width in plane_widths(bits)]
    return unpack_planes(planes, bits)


def _by_token(layout: PageLayout, side: str) -> bool:
    return side == "v" or layout.fmt.k_group == "token"


def _bits(layout: PageLayout, side: str) -> int:
    return layout.fmt.k_bits if side == "k" else layout.fmt.v_bits
