"""The rotation of V: an orthonormal block Hadamard matrix over head_dim (Sylvester's order)."""

from __future__ import annotations

import functools
import math

import torch

_TILE_TOKENS = 2048  # tokens rotated at a time: 0.5 MiB of float32 at 64 channels stays in a core's L2


def block_size(dim: int) -> int:
    """Largest power of two that divides `dim`: 64 -> 64, 80 -> 16, 96 -> 32."""
    return dim & -dim


def rotate(v: torch.Tensor) -> torch.Tensor:
    """`[..., Dv] bfloat16` to `[..., Dv] float32`, each token's channels rotated.

    A butterfly: every value is a sum in one fixed order of float32 additions (pairs 1, 2, 4, ... channels apart), then
    one product. So every implementation gives the same bits (kernel_pack.py); a matrix product would not.
    """
    dim = v.shape[-1]
    out = torch.empty(v.shape, device=v.device)
    values, rotated = v.reshape(-1, dim), out.view(-1, dim)
    for start in range(0, len(values), _TILE_TOKENS):
        part = slice(start, start + _TILE_TOKENS)
        source = values[part].float().T.contiguous()  # [Dv, tokens]: every stage adds long rows
        target = torch.empty_like(source)
        for stage in range(block_size(dim).bit_length() - 1):
            shape = (dim >> (stage + 1), 2, 1 << stage, -1)
            (a, b), (plus, minus) = source.view(shape).unbind(1), target.view(shape).unbind(1)
            torch.add(a, b, out=plus)
            torch.sub(a, b, out=minus)
            source, target = target, source
        rotated[part] = source.mul_(1 / math.sqrt(block_size(dim))).T
    return out


def unrotate(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, *, out: torch.Tensor) -> None:
    """Rotates minimum + codes * scale back into `out`.

    The token's scale and minimum are taken out of the matrix product: the codes stay small integers, and the rotation
    of a constant only touches the first channel of each block (kernels/README.md).

    Args:
        codes: `[H, P, 64 * Dv] uint8`, contiguous. scale, minimum: `[H, P, 64] float32`, one per token.
        out: `[H, P, 64, Dv] float32`, contiguous.
    """
    dim, device = out.shape[-1], out.device
    root = math.sqrt(block_size(dim))
    scale, minimum = (scale * (1 / root)).reshape(-1, 1), (minimum * root).reshape(-1, 1)
    codes, tokens = codes.view(-1, dim), out.view(-1, dim)
    wide = torch.empty((min(_TILE_TOKENS, len(tokens)), dim), device=device)
    for start in range(0, len(tokens), _TILE_TOKENS):
        part = slice(start, start + _TILE_TOKENS)
        tile = tokens[part]
        torch.mm(wide[: len(tile)].copy_(codes[part]), sign_matrix(dim, device), out=tile)
        tile *= scale[part]
        tile[:, :: block_size(dim)] += minimum[part]


@functools.lru_cache(maxsize=32)
def sign_matrix(dim: int, device: torch.device) -> torch.Tensor:
    """`[dim, dim] float32` of +1, -1 and, outside the blocks, 0. Symmetric; its square is block_size(dim) * identity.

    Unnormalised on purpose: bfloat16 values and codes up to 255 times +-1 are exact even where a matrix product
    runs in TF32 or bfloat16, so the 1 / sqrt(block) is applied outside the product.
    """
    block = torch.ones(1, 1)
    while block.shape[0] < block_size(dim):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)], 0)
    return torch.block_diag(*[block] * (dim // block_size(dim))).to(device)
