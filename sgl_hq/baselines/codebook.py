"""Codes that name an entry of a fixed table of levels."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from sgl_hq.page_format import plane_widths

from .affine import FLOAT16_BITS
from .side import half, pack_codes, steps_of, unpack_codes

# bitsandbytes, csrc/kernels.cu (nf4 lookup); QLoRA, arXiv 2305.14314, section 3: quantiles of N(0, 1), scaled to 1.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SEED = 20250428


@dataclass(frozen=True)
class MaxScaled:
    """level * max|x| of the group; the maximum is float16. With `NF4_LEVELS` and groups of 64: NF4, 4.25 bits."""

    levels: tuple[float, ...]
    group: int

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.unflatten(-1, (-1, self.group))
        scale = half(x.abs().amax(-1, keepdim=True))
        return [*pack_codes(nearest(steps_of(x, scale.float()), self.levels), _width(self.levels)), scale]

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        *planes, scale = parts
        codes = unpack_codes(planes, _width(self.levels), shape).unflatten(-1, (-1, self.group))
        return (look_up(codes, self.levels) * scale.float()).view(shape)

    def bits(self, dim: int, tokens: int) -> float:
        return _width(self.levels) + FLOAT16_BITS / self.group


@dataclass(frozen=True)
class NormScaled:
    """Norm of the vector in float16, and each coordinate of the unit vector by the best levels for N(0, 1 / D).

    The quantiser of TurboQuant (arXiv 2504.19874, algorithm 1: TurboQuant_mse), for vectors that have been rotated.

    qjl: TurboQuant_prod (algorithm 2) instead. One bit of the code is spent on the residual r of the unit vector: the
    signs of S r, S of independent N(0, 1) entries (from a seed, not stored), and |r| in float16. Added back as
    sqrt(pi / 2) / D * |r| * S^T signs, which makes inner products with the result unbiased over S.
    """

    bits_per_code: int
    qjl: bool = False

    @property
    def _table_bits(self) -> int:
        return self.bits_per_code - self.qjl

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        norm = half(x.norm(dim=-1, keepdim=True))
        unit, levels = steps_of(x, norm.float()), self._levels(x.shape[-1])
        codes = nearest(unit, levels)
        parts = [*pack_codes(codes, self._table_bits), norm]
        if self.qjl:
            residual = unit - look_up(codes, levels)
            signs = residual @ gaussian_matrix(x.shape[-1]).to(x.device).T >= 0
            parts += [*pack_codes(signs.to(torch.uint8), 1), half(residual.norm(dim=-1, keepdim=True))]
        return parts

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        planes, dim = len(plane_widths(self._table_bits)), shape[-1]
        codes = unpack_codes(parts[:planes], self._table_bits, shape)
        unit = look_up(codes, self._levels(dim))
        if self.qjl:
            sign_plane, residual_norm = parts[planes + 1 :]
            signs = unpack_codes([sign_plane], 1, shape).float() * 2 - 1
            unit += math.sqrt(math.pi / 2) / dim * residual_norm.float() * (signs @ gaussian_matrix(dim).to(signs.device))
        return unit * parts[planes].float()

    def bits(self, dim: int, tokens: int) -> float:
        return self.bits_per_code + (1 + self.qjl) * FLOAT16_BITS / dim

    def _levels(self, dim: int) -> tuple[float, ...]:
        return tuple(level / math.sqrt(dim) for level in lloyd_max_levels(self._table_bits))


@dataclass(frozen=True)
class SinkChannelFourLevel:
    """+-0.55 s or +-1.85 s, split at 0.75 s, with s = 0.6 median|x| + 0.4 mean|x| of a channel over the *whole* prefix
    (float16); the first token stays bfloat16. Zero codes as +0.55 s: the format has no zero.

    `sink1_channelwise_four_level_2bit` of CrazyAngelm/megaquant-rag-compress (src/megaquant_hdc/efficient_methods.py,
    methods.py). Its accounting, 2 + 16 / T + (16 - 2) / T, gives the published 2.162 at T = 185.
    """

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        scale = half(0.6 * _median(x.abs()) + 0.4 * x.abs().mean(1, keepdim=True))
        rest = x[:, 1:]
        codes = (rest < 0).to(torch.uint8) * 2 + (rest.abs() >= 0.75 * scale.float()).to(torch.uint8)
        return [*pack_codes(codes, 2), scale, x[:, :1].to(torch.bfloat16)]

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        plane, scale, sink = parts
        heads, tokens, dim = shape
        codes = unpack_codes([plane], 2, (heads, tokens - 1, dim))
        levels = torch.tensor((0.55, 1.85, -0.55, -1.85), device=codes.device)
        return torch.cat([sink.float(), levels[codes.int()] * scale.float()], 1)

    def bits(self, dim: int, tokens: int) -> float:
        return 2 + FLOAT16_BITS / tokens + (16 - 2) / tokens


def nearest(values: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """Index of the nearest of the rising `levels`, uint8."""
    table = torch.tensor(levels, device=values.device)
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def look_up(codes: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(levels, device=codes.device)[codes.int()]


@functools.lru_cache
def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """The 2**bits rising levels of least squared error for N(0, 1) (Max 1960, Lloyd 1982).

    Lloyd's iteration on the upper half: a level is the mean of the normal between the midpoints around it.
    """
    half_count = 2 ** (bits - 1)
    upper = [3 * (index + 0.5) / half_count for index in range(half_count)]
    moved = 1.0
    while moved > 1e-12:
        edges = [0.0, *((a + b) / 2 for a, b in zip(upper, upper[1:], strict=False)), math.inf]
        means = [(_density(a) - _density(b)) / (_cumulative(b) - _cumulative(a)) for a, b in zip(edges, edges[1:])]
        moved = max(abs(a - b) for a, b in zip(means, upper, strict=True))
        upper = means
    return (*(-level for level in reversed(upper)), *upper)


@functools.lru_cache
def gaussian_matrix(dim: int) -> torch.Tensor:
    """S of QJL, `[dim, dim] float32`, from a fixed seed."""
    return torch.randn(dim, dim, generator=torch.Generator().manual_seed(_SEED + dim))


def _width(levels: tuple[float, ...]) -> int:
    return (len(levels) - 1).bit_length()


def _median(values: torch.Tensor) -> torch.Tensor:
    """Over axis 1, the mean of the middle two of an even count (NumPy's median; torch's takes the lower one)."""
    tokens = values.shape[1]
    return values.sort(1).values[:, (tokens - 1) // 2 : tokens // 2 + 1].mean(1, keepdim=True)


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cumulative(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2
