"""Fixed orthonormal maps applied to each vector before it is quantised; made from seeds, so nothing is stored.

A map is `[D', D] float32` with orthonormal columns: y = x @ map.T, and x = y @ map. D' exceeds D only where blocks of
3 do not fit D.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sgl_hq.kernels.page_codec.hadamard import block_size, sign_matrix

from .side import Side

_SEED = 20250428


@dataclass(frozen=True)
class Rotated:
    """`side` on rotated vectors. rotation: head dim to its map."""

    side: Side
    rotation: Callable[[int], torch.Tensor]

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.side.encode((x @ self.rotation(x.shape[-1]).to(x.device).T).contiguous())

    def decode(self, parts: list[torch.Tensor], shape: tuple[int, int, int]) -> torch.Tensor:
        rotation = self.rotation(shape[-1])
        rotated = self.side.decode(parts, (*shape[:2], rotation.shape[0]))
        return rotated @ rotation.to(rotated.device)

    def bits(self, dim: int, tokens: int) -> float:
        width = self.rotation(dim).shape[0]
        return self.side.bits(width, tokens) * width / dim


@functools.lru_cache
def signed_hadamard(dim: int) -> torch.Tensor:
    """Alternating signs (- + - +), then Sylvester's Hadamard matrix / sqrt(dim), as in `_hadamard_wrap` of
    CrazyAngelm/megaquant-rag-compress, whose "random" signs depend on the parity of the channel only."""
    signs = torch.ones(dim)
    signs[::2] = -1
    return sign_matrix(dim, torch.device("cpu")) * signs / math.sqrt(block_size(dim))


@functools.lru_cache
def random_rotation(dim: int) -> torch.Tensor:
    """Haar random: Q of a Gaussian matrix, columns signed by R's diagonal. TurboQuant, arXiv 2504.19874."""
    q, r = torch.linalg.qr(_normal(dim, dim).double())
    return (q * r.diagonal().sign()).float()


@functools.lru_cache
def rotor_blocks(dim: int) -> torch.Tensor:
    """v to R v R~ on blocks of 3, R = s + b12 e12 + b13 e13 + b23 e23 a random unit rotor of Cl(3,0) per block.

    RotorQuant (scrya-com/rotorquant, turboquant/triton_kernels.py). The last block is padded with zeros, so
    ceil(dim / 3) * 3 coordinates are stored. The sandwich of a vector is a vector: its scalar, bivector and trivector
    parts are 0 and need no code.
    """
    blocks = [_rotor_matrix(*rotor) for rotor in _unit(_normal(-(-dim // 3), 4)).tolist()]
    return torch.block_diag(*blocks)[:, :dim].contiguous()


@functools.lru_cache
def quaternion_blocks(dim: int) -> torch.Tensor:
    """v to q_left v conj(q_right) on blocks of 4, a random unit pair per block: IsoQuant-Full, arXiv 2603.28430."""
    left, right = _unit(_normal(2, dim // 4, 4)).tolist()
    return torch.block_diag(*(_left(a) @ _right([b[0], -b[1], -b[2], -b[3]]) for a, b in zip(left, right, strict=True)))


@functools.lru_cache
def planar_blocks(dim: int) -> torch.Tensor:
    """[c -s; s c] with a random angle per pair: PlanarQuant, the 2-D case of IsoQuant (arXiv 2603.28430)."""
    angles = torch.rand(dim // 2, generator=torch.Generator().manual_seed(_SEED)) * 2 * math.pi
    cos, sin = angles.cos().tolist(), angles.sin().tolist()
    return torch.block_diag(*(torch.tensor([[c, -s], [s, c]]) for c, s in zip(cos, sin, strict=True)))


def _rotor_matrix(s: float, b12: float, b13: float, b23: float) -> torch.Tensor:
    """The matrix of v to R v R~, from (s^2 - |b|^2) v + 2 s (b . v) + the part along the axis."""
    x, y, z = -b23, b13, -b12  # the quaternion of the rotor: e12, e13, e23 are -k, j, -i
    return torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - s * z), 2 * (x * z + s * y)],
            [2 * (x * y + s * z), 1 - 2 * (x * x + z * z), 2 * (y * z - s * x)],
            [2 * (x * z - s * y), 2 * (y * z + s * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _left(q: list[float]) -> torch.Tensor:
    """The matrix of v to q v for quaternions (w, x, y, z)."""
    w, x, y, z = q
    return torch.tensor([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])


def _right(q: list[float]) -> torch.Tensor:
    """The matrix of v to v q."""
    w, x, y, z = q
    return torch.tensor([[w, -x, -y, -z], [x, w, z, -y], [y, -z, w, x], [z, y, -x, w]])


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(_SEED))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
