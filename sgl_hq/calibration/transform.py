"""The basis in which rounding errors of K or V add up independently and in the order of what they cost.

With metric M and covariance C, S = sqrt(M') and S C S = Q diag(importance) Q^T, the components y = x S Q / sqrt(importance)
are uncorrelated, have unit variance, and an error e_i in each costs sum_i importance_i * e_i^2 (Karhunen-Loeve transform
in the metric; Mallat & Falzon 1998 on transform coding). Attention can stay in this basis: scores are q . x = (B^-1 q) . y
and outputs are mapped back once per query head, so no key or value is ever transformed back one by one.
"""

from __future__ import annotations

import torch

from sgl_hq.calibration.sensitivity import Sensitivity

# M' = M + RIDGE * (mean of its diagonal): directions that no calibration text happened to use still get bits. Without it
# SmolLM2's worst steps are ten times worse (docs/quality.md).
RIDGE = 1.0
_COVARIANCE_RIDGE = 1e-6
_TINY = 1e-30


def fit_transform(found: Sensitivity) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(forward, inverse, importance): y = x @ forward, x = y @ inverse, both `[layers, H, D, D] float32`; importance
    `[layers, H, D] float64`, descending: the cost of an error as large as the component's standard deviation."""
    metric, covariance = _ridge(found.metric, RIDGE), _ridge(found.covariance, _COVARIANCE_RIDGE)
    weights, axes = torch.linalg.eigh(metric)
    weights = weights.clamp_min(_TINY)[..., None, :]
    root, inverse_root = (axes * weights.sqrt()) @ axes.mT, (axes * weights.rsqrt()) @ axes.mT
    importance, turn = torch.linalg.eigh(root @ covariance @ root)
    importance, turn = importance.flip(-1).clamp_min(_TINY), turn.flip(-1)
    deviation = importance.sqrt()
    forward = (root @ turn) / deviation[..., None, :]
    inverse = deviation[..., :, None] * (turn.mT @ inverse_root)
    return forward.float(), inverse.float(), importance


def _ridge(matrix: torch.Tensor, share: float) -> torch.Tensor:
    level = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_TINY)
    return matrix + share * level[..., None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype)
