"""Small floating-point formats: FP4 with a scale per block, and FP8."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .side import pack_codes, steps_of, unpack_codes

# OCP Microscaling Formats v1.0: E2M1 magnitudes by code; the sign is bit 3.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX = 448.0
_E2M1_MAX_EXPONENT = 2  # 6 = 1.5 * 2**2
_E8M0_BIAS = 127
_E2M1_BITS, _SCALE_BITS, _FLOAT32_BITS = 4, 8, 32


@dataclass(frozen=True)
class MXFP4:
    """E2M1 values, one power of two per 32 (E8M0, one byte): 2**(floor(log2 max|x|) - 2). 4.25 bits.

    OCP Microscaling Formats v1.0, section 6.3: nearest, ties to even, above 6 to 6.
    """

    group: int = 32

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.unflatten(-1, (-1, self.group))
        largest = x.abs().amax(-1, keepdim=True)
        exponent = torch.frexp(largest).exponent - 1 - _E2M1_MAX_EXPONENT  # frexp: largest = m * 2**e, m in [1/2, 1)
        biased = torch.where(largest > 0, exponent + _E8M0_BIAS, 0).clamp_(0, 254).to(torch.uint8)
        return [*pack_codes(_to_e2m1(x / _power(biased)), _E2M1_BITS), biased]

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        plane, biased = parts
        codes = unpack_codes([plane], _E2M1_BITS, shape).unflatten(-1, (-1, self.group))
        return (_from_e2m1(codes) * _power(biased)).view(shape)

    def bits(self, dim: int, tokens: int) -> float:
        return _E2M1_BITS + _SCALE_BITS / self.group


@dataclass(frozen=True)
class NVFP4:
    """E2M1 values, one E4M3 scale per 16 and one float32 scale per tensor = max|x| / (6 * 448). 4.5 bits.

    NVIDIA, "Introducing NVFP4 for efficient and accurate low-precision inference" (2025). The tensor is one side of
    one layer, all heads; its 4 bytes are left out of `bits`.
    """

    group: int = 16

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.unflatten(-1, (-1, self.group))
        largest = x.abs().amax(-1, keepdim=True)
        tensor_scale = (largest.amax() / (E2M1[-1] * E4M3_MAX)).reshape(1)
        scale = steps_of(largest / E2M1[-1], tensor_scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        codes = _to_e2m1(steps_of(x, scale.float() * tensor_scale))
        return [*pack_codes(codes, _E2M1_BITS), scale, tensor_scale]

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        plane, scale, tensor_scale = parts
        codes = unpack_codes([plane], _E2M1_BITS, shape).unflatten(-1, (-1, self.group))
        return (_from_e2m1(codes) * (scale.float() * tensor_scale)).view(shape)

    def bits(self, dim: int, tokens: int) -> float:
        return _E2M1_BITS + _SCALE_BITS / self.group


@dataclass(frozen=True)
class FP8:
    """E4M3. Scale 1 is what SGLang's `--kv-cache-dtype fp8_e4m3` stores without calibrated scales:
    `x.to(float8_e4m3fn)` (srt/mem_cache/memory_pool.py, set_kv_buffer); a magnitude above 464 becomes NaN.

    amax: divide by max|x| / 448 first, one float32 per tensor (one side of one layer, all heads), left out of `bits`.
    """

    amax: bool = False

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        if not self.amax:
            return [x.to(torch.float8_e4m3fn)]
        scale = (x.abs().amax() / E4M3_MAX).reshape(1)
        return [steps_of(x, scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale]

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        return parts[0].float() * parts[1] if self.amax else parts[0].float()

    def bits(self, dim: int, tokens: int) -> float:
        return 8.0


def _to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 code, ties to the even code, saturating, `uint8` below 16."""
    magnitudes = torch.tensor(E2M1, device=x.device)
    edges = (magnitudes[1:] + magnitudes[:-1]) / 2
    # bucketize leaves a value on an edge in the lower cell: right for even codes, so lower the edges below even ones.
    edges[1::2] = torch.nextafter(edges[1::2], torch.zeros_like(edges[1::2]))
    return (torch.bucketize(x.abs(), edges) + torch.signbit(x) * 8).to(torch.uint8)


def _from_e2m1(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor((*E2M1, *(-magnitude for magnitude in E2M1)), device=codes.device)[codes.int()]


def _power(biased: torch.Tensor) -> torch.Tensor:
    return torch.exp2(biased.float() - _E8M0_BIAS)
