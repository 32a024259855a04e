"""Codes of 1 to 8 bits as bit planes of 8, 4, 2 and 1 bits: the only place that knows the bit order.

A plane of width w over n codes has n * w / 8 bytes, and cuts the codes into 8 / w equal runs ("slots"): byte j holds,
from its low bits up, code j of slot 0, code j of slot 1, and so on. So unpacking writes whole runs, and nothing
interleaves. The widest plane holds the low bits of the code, the next plane the bits above it.
"""

from __future__ import annotations

import torch

from sgl_hq.page_format import plane_widths

_EVERY_BYTE = 0x0101010101010101  # times a byte mask: eight codes in one int64
_EVERY_16_BITS = 0x0001000100010001


def pack_planes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Split codes into planes, widest first.

    Args:
        codes: `[..., n] uint8`, each below 2**bits; n a multiple of 8.
    Returns:
        one `[..., n * width // 8] uint8` per width of `plane_widths(bits)`.
    """
    planes, base = [], 0
    for width in plane_widths(bits):
        part = (codes >> base) & ((1 << width) - 1)
        slots = part.unflatten(-1, (8 // width, -1))
        plane = slots[..., 0, :].clone()
        for slot in range(1, 8 // width):
            plane |= slots[..., slot, :] << (slot * width)
        planes.append(plane)
        base += width
    return planes


def unpack_planes(planes: list[torch.Tensor], bits: int) -> torch.Tensor:
    """The inverse of `pack_planes`.

    Args:
        planes: `[..., n * width // 8] uint8` per width of `plane_widths(bits)`, widest first. Views into a record are
            fine if their offsets and outer strides are multiples of 8 bytes: eight codes move at once, as one int64.
    Returns:
        `[..., n] uint8`, contiguous; n is a multiple of 64.
    """
    codes, base = None, 0
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        slots = 8 // width
        words = plane.view(torch.int64).unsqueeze(-2)  # [..., 1, words of a slot]
        part = torch.empty((*words.shape[:-2], slots, words.shape[-1]), dtype=torch.int64, device=plane.device)
        if slots == 1:
            part.copy_(words)
        else:
            # The shift drags bits in from the neighbour byte (and copies of the sign): the mask drops them.
            shifts = torch.arange(0, 8, width, device=plane.device).unsqueeze(-1)
            torch.bitwise_right_shift(words, shifts, out=part)
            part &= ((1 << width) - 1) * _EVERY_BYTE
        if codes is None:
            codes = part.flatten(-2)
        else:
            codes.add_(
                part.flatten(-2), alpha=1 << base
            )  # bits above `base` are still 0: no byte carries into the next
        base += width
    return codes.view(torch.uint8)


def unpack_nibbles(plane: torch.Tensor, *, shift: int) -> torch.Tensor:
    """A single 4-bit plane as 16-bit codes, each shifted left by `shift` (4 .. 12).

    Args:
        plane: `[..., n / 2] uint8`; n a multiple of 64.
    Returns:
        `[..., n] int16`, contiguous.
    """
    words = plane.to(torch.int16, memory_format=torch.contiguous_format).view(torch.int64)
    codes = torch.empty((*words.shape[:-1], 2, words.shape[-1]), dtype=torch.int64, device=plane.device)
    for slot in range(2):  # low nibbles, then high ones
        torch.bitwise_left_shift(words, shift - 4 * slot, out=codes[..., slot, :])
    codes &= (0xF << shift) * _EVERY_16_BITS
    return codes.flatten(-2).view(torch.int16)
