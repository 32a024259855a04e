"""One side (K or V) of one layer's prefix in a packed form, and the prefix codec made of two of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from sgl_hq.kernels.page_codec import NonFiniteError
from sgl_hq.kernels.page_codec.bitplanes import pack_planes, unpack_planes
from sgl_hq.prefix_codec import PackedPrefix

_RUN = 64  # bit planes are unpacked in runs of 64 codes


class Side(Protocol):
    """Packs `[H, T, D] float32`: kv heads, tokens, channels."""

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Everything `decode` needs, at its true width, without padding."""
        ...

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        """The values, `shape` = `[H, T, D]`, float32."""
        ...

    def bits(self, dim: int, tokens: int) -> float:
        """Codes and metadata, in bits per value."""
        ...


@dataclass(frozen=True)
class PackedSides(PackedPrefix):
    """heads, dim: constants of the model, which nobody stores. The first `k_parts` tensors are K, the rest is V."""

    heads: int
    dim: int
    k_parts: int


@dataclass(frozen=True)
class SidesCodec:
    """A `PrefixCodec` that packs K and V apart; the same in every layer."""

    name: str
    k: Side
    v: Side

    def pack(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> PackedSides:
        if k.shape != v.shape or k.shape[0] == 0 or k.shape[0] % _RUN or k.shape[2] % _RUN:
            raise ValueError(
                f"{self.name}: K is {list(k.shape)} and V is {list(v.shape)}; reference formats take equal shapes "
                f"[tokens, heads, dim] with tokens and dim positive multiples of {_RUN}"
            )
        if not (k.isfinite().all() and v.isfinite().all()):
            raise NonFiniteError(f"{self.name}: the prefix holds NaN or infinity; keep it in bfloat16")
        tokens, heads, dim = k.shape
        k_parts, v_parts = (
            side.encode(x.transpose(0, 1).float().contiguous()) for side, x in ((self.k, k), (self.v, v))
        )
        return PackedSides((*k_parts, *v_parts), tokens, heads, dim, len(k_parts))

    def unpack(self, layer: int, packed: PackedSides) -> tuple[torch.Tensor, torch.Tensor]:
        shape, parts = (packed.heads, packed.tokens, packed.dim), list(packed.tensors)
        return self.k.decode(parts[: packed.k_parts], shape), self.v.decode(parts[packed.k_parts :], shape)

    def effective_bits_per_dim(self, head_dim: int, v_head_dim: int, prefix_tokens: int) -> float:
        if head_dim != v_head_dim:
            raise ValueError(f"{self.name}: head_dim is {head_dim} and v_head_dim {v_head_dim}; they must be equal")
        return (self.k.bits(head_dim, prefix_tokens) + self.v.bits(head_dim, prefix_tokens)) / 2


@dataclass(frozen=True)
class Transposed:
    """`side` with tokens and channels exchanged: groups along the tokens instead of along the channels."""

    side: Side

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.side.encode(x.mT.contiguous())

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        heads, tokens, dim = shape
        return self.side.decode(parts, (heads, dim, tokens)).mT.contiguous()

    def bits(self, dim: int, tokens: int) -> float:
        return self.side.bits(tokens, dim)


def pack_codes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """`[H, ...] uint8` of H * 64 n codes to bit planes, one row per head."""
    return pack_planes(codes.flatten(1), bits)


def unpack_codes(planes: list[torch.Tensor], bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    return unpack_planes(planes, bits).view(shape)


def half(values: torch.Tensor) -> torch.Tensor:
    """float16, the metadata of most published formats. Raises ValueError where it would be infinite."""
    rounded = values.to(torch.float16)
    if rounded.isinf().any():
        raise ValueError(f"metadata of {values.abs().max():.3g} overflows float16 (65504): keep this prefix dense")
    return rounded


def steps_of(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """values / step, and 0 where the step is 0 (a constant group)."""
    return values / torch.where(step > 0, step, torch.inf)
