"""A calibration of random numbers."""

from __future__ import annotations

import torch

from sgl_hq.calibration.sensitivity import Sensitivity
from sgl_hq.calibration.store import Calibration, SideCalibration
from sgl_hq.calibration.transform import fit_transform


def random_calibration(layers: int = 3, heads: int = 2, dim: int = 64, model: str = "0123456789abcdef", seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)

    def positive() -> torch.Tensor:
        root = torch.randn(layers, heads, dim, 2 * dim, generator=generator, dtype=torch.float64)
        root *= torch.logspace(0, -2, dim, dtype=torch.float64)[:, None]
        return root @ root.mT

    sides = [SideCalibration(*fit_transform(Sensitivity(positive(), positive()))) for _ in "kv"]
    return Calibration(model, *sides, {"windows": "none"})
