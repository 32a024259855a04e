"""Uniform steps over groups of neighbouring values: integers, with or without a minimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_hq.page_format import plane_widths

from .side import half, pack_codes, steps_of, unpack_codes

FLOAT16_BITS = 16


@dataclass(frozen=True)
class Symmetric:
    """code * scale, code in -levels .. levels, levels = 2**(bits - 1) - 1, scale = max|x| / levels in float16.

    With 4 bits and groups of 32 channels: `int4_sym_g32`, 4.5 bits, 16 / 4.5 = 3.56x.
    """

    bits_per_code: int
    group: int

    @property
    def levels(self) -> int:
        return 2 ** (self.bits_per_code - 1) - 1

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.unflatten(-1, (-1, self.group))
        scale = half(x.abs().amax(-1, keepdim=True) / self.levels)
        codes = steps_of(x, scale.float()).round_().clamp_(-self.levels, self.levels) + self.levels
        return [*pack_codes(codes.to(torch.uint8), self.bits_per_code), scale]

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        *planes, scale = parts
        codes = unpack_codes(planes, self.bits_per_code, shape).unflatten(-1, (-1, self.group))
        return ((codes.float() - self.levels) * scale.float()).view(shape)

    def bits(self, dim: int, tokens: int) -> float:
        return self.bits_per_code + FLOAT16_BITS / self.group


@dataclass(frozen=True)
class Affine:
    """minimum + code * scale, code in 0 .. 2**bits - 1, scale = (max - min) / (2**bits - 1), one pair per group.

    group: values per group; None = the whole last axis. meta_bits: 16 stores both as float16. 8 or 4 stores codes of
    that width, spread evenly between the smallest and the largest scale (and minimum) that a head's tokens have at
    this place of the vector; that range (base, step) is float16. Everything is rounded to nearest, as published, so a
    rounded minimum may cut off the end of its group.

    Sources: KIVI (arXiv 2402.02750); CrazyAngelm/megaquant-rag-compress, src/megaquant_hdc/{efficient_methods,
    registry}.py. There "seven level" is the name of the codes 0 .. 7: eight levels, seven steps.
    """

    bits_per_code: int
    group: int | None = None
    meta_bits: int = FLOAT16_BITS

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.unflatten(-1, (-1, self.group or x.shape[-1]))
        low, levels = x.amin(-1), 2**self.bits_per_code - 1
        scale_parts = self._pack_metadata((x.amax(-1) - low) / levels)
        low_parts = self._pack_metadata(low)
        scale, low = (self._unpack_metadata(parts, low.shape).unsqueeze(-1) for parts in (scale_parts, low_parts))
        codes = steps_of(x - low, scale).round_().clamp_(0, levels)  # under the stored scale and minimum
        return [*pack_codes(codes.to(torch.uint8), self.bits_per_code), *scale_parts, *low_parts]

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        planes = len(plane_widths(self.bits_per_code))
        codes = unpack_codes(parts[:planes], self.bits_per_code, shape).unflatten(-1, (-1, self.group or shape[-1]))
        metadata, half_way = parts[planes:], (len(parts) - planes) // 2
        scale, low = (
            self._unpack_metadata(stored, codes.shape[:-1]).unsqueeze(-1)
            for stored in (metadata[:half_way], metadata[half_way:])
        )
        return (codes.float() * scale + low).view(shape)

    def bits(self, dim: int, tokens: int) -> float:
        group = self.group or dim
        ranges = 0 if self.meta_bits == FLOAT16_BITS else 2 * 2 * FLOAT16_BITS / (tokens * group)
        return self.bits_per_code + 2 * self.meta_bits / group + ranges

    def _pack_metadata(self, values: torch.Tensor) -> list[torch.Tensor]:
        """`[H, T, G] float32` as float16, or as codes of `meta_bits` and `[H, 2, G] float16` of base and step."""
        if self.meta_bits == FLOAT16_BITS:
            return [half(values)]
        most = 2**self.meta_bits - 1
        base = half(values.amin(1, keepdim=True))
        step = half((values.amax(1, keepdim=True) - base.float()) / most)
        codes = steps_of(values - base.float(), step.float()).round_().clamp_(0, most)
        return [*pack_codes(codes.to(torch.uint8), self.meta_bits), torch.cat([base, step], 1)]

    def _unpack_metadata(self, parts: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        if self.meta_bits == FLOAT16_BITS:
            return parts[0].float()
        base, step = parts[-1].float().split(1, dim=1)
        return unpack_codes(parts[:-1], self.meta_bits, shape).float() * step + base
