"""Dense pages of every kind that a codec may meet."""

from __future__ import annotations

import torch

CONTENTS = ["random", "offset", "constant", "zero", "huge", "tiny", "subnormal", "one_outlier", "outlier_channels"]


def make(contents: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """`[P, 64, H, D] bfloat16`."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if contents == "offset":
        x = x * 0.1 + 37
    elif contents == "constant":
        x = torch.full(shape, -1.7)
    elif contents == "zero":
        x = torch.zeros(shape)
    elif contents in ("huge", "tiny", "subnormal"):
        x = x * {"huge": 1e30, "tiny": 1e-30, "subnormal": 1e-39}[contents]
    elif contents == "one_outlier" and x.numel():
        x[-1, 17, -1, 5] = 1e30
    elif contents == "outlier_channels":
        x[..., 3] += 200
        x[..., 6] *= 50
    return x.to(torch.bfloat16)


def head_major(x: torch.Tensor) -> torch.Tensor:
    """`[P, 64, H, D]` to `[H, P * 64, D]`."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)
