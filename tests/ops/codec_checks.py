"""What a lossy page format promises, checked against the dense pages that were packed (bounds: tests/tolerances.py)."""

from __future__ import annotations

import tolerances
import torch

from sgl_hq.kernels.page_codec import PageCodec
from sgl_hq.kernels.page_codec.affine import stored_groups
from sgl_hq.kernels.page_codec.hadamard import block_size, sign_matrix


def check_lossy(codec: PageCodec, k: torch.Tensor, v: torch.Tensor) -> None:
    """Pack and unpack k, v `[P, 64, H, D]`: every error within half a stored step, no stored step wider than needed."""
    records, _ = codec.pack(k, v, first_has_sink=False)
    for side, packed, got in zip("kv", (k, v), codec.unpack(records), strict=True):
        assert got.dtype == torch.float32
        packed, got = packed.permute(2, 0, 1, 3).double(), got.double().unflatten(1, (len(k), 64))  # [H, P, 64, D]
        if codec.fmt.kind == "int8":
            field = codec.layout[f"{side}_scale"]
            scale = records[..., field.offset : field.end].view(torch.bfloat16).transpose(0, 1).double()
            assert (scale <= tolerances.int8_scale(packed.abs().amax(-1))).all(), f"{side}: wasteful scale"
            assert ((got - packed).abs() <= tolerances.int8_error(scale).unsqueeze(-1)).all(), side
        elif side == "k" and codec.fmt.k_group == "channel":
            _check_by_channel(packed, got, *stored(codec, records, side), 2**codec.fmt.k_bits - 1)
        else:
            bits = codec.fmt.k_bits if side == "k" else codec.fmt.v_bits
            _check_by_token(packed, got, *stored(codec, records, side), 2**bits - 1)


def stored(codec: PageCodec, records: torch.Tensor, side: str) -> list[torch.Tensor]:
    """(scale, minimum), each `[H, P, G] float64`, as decoded."""
    return [part.double() for part in stored_groups(codec.layout, records.transpose(0, 1), side).decode()]


def rotated(values: torch.Tensor) -> torch.Tensor:
    """`[..., D] float64`, rotated exactly enough."""
    dim = values.shape[-1]
    return values @ sign_matrix(dim, torch.device("cpu")).double() / block_size(dim) ** 0.5


def _check_by_channel(x, got, scale, minimum, levels: int) -> None:
    low, high = x.amin(2), x.amax(2)
    assert (minimum <= low).all(), "the stored minimum is rounded down"
    assert (minimum + levels * scale >= high).all(), "the stored scale is rounded up"
    assert (scale <= tolerances.affine_scale(low, high, levels)).all(), "wasteful scale"
    assert ((got - x).abs() <= tolerances.affine_error(scale, minimum, levels).unsqueeze(2)).all()


def _check_by_token(x, got, scale, minimum, levels: int) -> None:
    dim = x.shape[-1]
    block = block_size(dim)
    rotation = tolerances.forward_rotation_error(x, block)
    turned = rotated(x)
    low, high = turned.amin(-1) - rotation, turned.amax(-1) + rotation
    assert (minimum <= low + 2 * rotation).all()
    assert (minimum + levels * scale >= high - 2 * rotation).all()
    most = tolerances.affine_scale(low, high, levels) + 4 * rotation.amax(-1, keepdim=True)
    assert (scale <= most).all(), "wasteful scale"
    error = got - x
    assert (error.abs() <= tolerances.rotated_error(scale, minimum, levels, block, rotation).unsqueeze(-1)).all()
    assert (error.norm(dim=-1) <= tolerances.rotated_norm_error(scale, minimum, levels, dim, rotation)).all()
