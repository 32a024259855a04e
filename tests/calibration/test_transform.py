"""The basis: components are uncorrelated, of unit variance, and their importances are what an error in them costs."""

from __future__ import annotations

import torch

from sgl_hq.calibration import transform
from sgl_hq.calibration.sensitivity import Sensitivity


def _positive(*shape: int) -> torch.Tensor:
    root = torch.randn(*shape, 2 * shape[-1], dtype=torch.float64)
    return root @ root.mT


def test_components_are_uncorrelated_and_importance_is_the_cost(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(transform, "RIDGE", 0.0)
    found = Sensitivity(_positive(2, 3, 16), _positive(2, 3, 16))
    forward, inverse, importance = (part.double() for part in transform.fit_transform(found))
    eye = torch.eye(16, dtype=torch.float64).expand(2, 3, 16, 16)
    near = {"rtol": 1e-4, "atol": 1e-4}  # forward and inverse are stored in float32; condition numbers stay below 1e3
    torch.testing.assert_close(forward @ inverse, eye, **near)
    torch.testing.assert_close(forward.mT @ found.covariance @ forward, eye, **near)
    cost = inverse @ found.metric @ inverse.mT  # of errors in components, in the metric
    torch.testing.assert_close(cost, torch.diag_embed(importance), rtol=1e-4, atol=1e-4 * importance.max().item())
    assert (importance.diff(dim=-1) <= 0).all()


def test_the_ridge_gives_every_direction_a_price():
    """A direction that the calibration texts never used must not become free."""
    metric = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    metric[..., 0, 0] = 1.0
    _, _, importance = transform.fit_transform(Sensitivity(metric, torch.eye(8, dtype=torch.float64)[None, None]))
    assert importance.min() > 0.05 * importance.max()


def test_a_constant_layer_gives_finite_bases():
    zeros = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    for part in transform.fit_transform(Sensitivity(zeros, zeros)):
        assert part.isfinite().all()
