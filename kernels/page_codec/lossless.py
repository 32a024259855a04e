"""Lossless pages: sign and mantissa as they are, the exponent as a 4-bit distance from the largest one near it.

V spans few powers of two within a page and head, and K within eight neighbouring channels of one (some channels of K are
large throughout), so nearly every biased exponent lies within 14 of the largest finite one there, the *base*. Code c in
0..14 means exponent base - c. The rest, code 15, are *escapes*: the record lists their positions and exponents (NaN and
infinity, exponent 255, are always among them).

Dimensions: P pages, 64 tokens a page, H kv heads, D = head_dim, Dv = v_head_dim. bfloat16 is handled as int16 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sgl_hq.page_format import BASE_CHANNELS, PAGE_TOKENS, PageLayout

from .bitplanes import pack_planes, unpack_nibbles
from .errors import EscapeOverflowError
from .record import get, put

_ESCAPE = 15
_MANTISSA_BITS = 7
_SPECIAL = 255  # biased exponent of NaN and infinity
_MAX_COUNT = 255  # escapes of one side; the count is one byte
_SIGN_AND_MANTISSA = -0x7F81  # 0x807F as int16
_TILE_PAGES = 64  # pages and heads unpacked at a time: 0.5 MiB of bfloat16 at 64 channels stays in a core's L2


class _Side(NamedTuple):
    """K or V of a batch of pages. Escapes are listed in ascending order, page by page and head by head."""

    raw: torch.Tensor  # [P, H, 64 * D] uint8: sign << 7 | mantissa
    codes: torch.Tensor  # [P, H, 64 * D] uint8, 0 .. 15
    base: torch.Tensor  # [P, H, groups] int16
    escapes: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # page, head, position, each [escapes] int64
    exponents: torch.Tensor  # [escapes] uint8
    counts: torch.Tensor  # [P, H] int64: escapes of each page and head


def pack_lossless(layout: PageLayout, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Fill `records`, `[P, H, record_bytes] uint8` of zeros, from k `[P, H, 64, D]` and v `[P, H, 64, Dv]`, bfloat16.

    Raises EscapeOverflowError, and writes nothing, if any page's escapes do not fit its list.
    """
    sides = {"k": _split(k, k.shape[-1] // BASE_CHANNELS), "v": _split(v, 1)}
    k_count, v_count = (side.counts for side in sides.values())
    too_many = (k_count + v_count > layout.escape_budget) | (k_count > _MAX_COUNT) | (v_count > _MAX_COUNT)
    if too_many.any():
        raise EscapeOverflowError(
            f"{int(too_many.sum())} of {too_many.numel()} pages have more exponents far below their largest than a "
            f"lossless page can list ({layout.escape_budget}): keep these pages dense"
        )
    positions, exponents, tail = _escape_views(layout, records)
    tail[:] = torch.cat([*(side.base for side in sides.values()), torch.stack([k_count, v_count], -1)], -1)
    for name, side in sides.items():
        put(records, layout[f"{name}_raw"], side.raw)
        put(records, layout[f"{name}_exp"], pack_planes(side.codes, 4)[0])
        page, row, position = side.escapes
        before = side.counts.flatten().cumsum(0).view_as(side.counts) - side.counts  # escapes of earlier pages, heads
        entry = torch.arange(len(page), device=page.device) - before[page, row]
        if name == "v":
            entry += k_count[page, row]
        positions[page, row, entry] = position.to(torch.int16)
        exponents[page, row, entry] = side.exponents


def unpack_lossless(layout: PageLayout, records: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Fill k `[H, P, 64, D]` and v `[H, P, 64, Dv]`, contiguous bfloat16, from records `[H, P, record_bytes] uint8`."""
    positions, exponents, tail = _escape_views(layout, records)
    k_count, v_count = tail[..., -2:-1].int(), tail[..., -1:].int()
    bases = {"k": tail[..., :-3].repeat_interleave(BASE_CHANNELS, -1), "v": tail[..., -3:-2]}
    entry = torch.arange(layout.escape_budget, device=records.device)
    listed = {"k": entry < k_count, "v": (entry >= k_count) & (entry < k_count + v_count)}
    tile = max(1, _TILE_PAGES // records.shape[0])
    for name, side in (("k", k), ("v", v)):
        out = side.view(torch.int16).flatten(2)
        raw = get(records, layout[f"{name}_raw"], torch.int8)
        plane = get(records, layout[f"{name}_exp"], torch.uint8)
        for start in range(0, records.shape[1], tile):
            part = slice(start, start + tile)
            _join(raw[:, part], plane[:, part], bases[name][:, part], out=out[:, part])
        where = listed[name].nonzero(as_tuple=True)
        place = (*where[:2], positions[where].long() & 0xFFFF)
        out[place] = (raw[place].short() & _SIGN_AND_MANTISSA) | (exponents[where].short() << _MANTISSA_BITS)


def _split(values: torch.Tensor, groups: int) -> _Side:
    """`[P, H, 64, D] bfloat16`, its channels in `groups` equal runs that have a base each."""
    bits = values.flatten(2).contiguous().view(torch.int16)
    exponents = (bits >> _MANTISSA_BITS) & 0xFF
    exponents.masked_fill_(exponents == _SPECIAL, -_SPECIAL)  # far from any base
    grouped = exponents.unflatten(-1, (PAGE_TOKENS, groups, -1))
    base = grouped.amax((2, 4)).clamp_(min=0)
    codes = (base[:, :, None, :, None] - grouped).clamp_(max=_ESCAPE).to(torch.uint8).flatten(2)
    escapes = (codes == _ESCAPE).nonzero(as_tuple=True)
    counts = torch.bincount(escapes[0] * bits.shape[1] + escapes[1], minlength=bits[..., 0].numel()).view(bits.shape[:2])
    raw = ((bits >> 8) & 0x80) | (bits & 0x7F)
    return _Side(
        raw.to(torch.uint8), codes, base, escapes, ((bits[escapes] >> _MANTISSA_BITS) & 0xFF).to(torch.uint8), counts
    )


def _join(raw: torch.Tensor, plane: torch.Tensor, base: torch.Tensor, *, out: torch.Tensor) -> None:
    """Bits of all values but escapes into `out`, `[H, P, n] int16`, from raw `[H, P, n] int8`, the plane of codes
    `[H, P, n / 2] uint8` and base `[H, P, D or 1] uint8`."""
    out.copy_(raw)  # the sign fills the high byte
    out &= _SIGN_AND_MANTISSA
    out.unflatten(-1, (PAGE_TOKENS, -1)).add_((base.short() << _MANTISSA_BITS).unsqueeze(2))
    out -= unpack_nibbles(plane, shift=_MANTISSA_BITS)


def _escape_views(layout: PageLayout, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions `[.., budget] int16` (uint16 bits: few operations know that type), exponents `[.., budget] uint8`, tail
    `[.., D / 8 + 3] uint8`."""
    dtypes = (torch.int16, torch.uint8, torch.uint8)
    positions, exponents, tail = (
        get(records, field, dtype) for field, dtype in zip(layout.escape_fields, dtypes, strict=True)
    )
    return positions, exponents, tail
