"""Prefixes with the contents that break quantisers, and the tolerances."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

CONTENTS = ("random", "outlier_channels", "offset", "constant", "zero", "one_token")


def make_prefix(contents: str, tokens: int = 128, heads: int = 2, dim: int = 64, seed: int = 0) -> torch.Tensor:
    """`[T, H, D] bfloat16`."""
    x = torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(seed))
    if contents == "outlier_channels":
        x[..., 3] += 60
        x[..., dim // 2] *= 40
    elif contents == "offset":
        x = x * 0.1 + 37
    elif contents == "constant":
        x = torch.full_like(x, -1.7)
    elif contents == "zero":
        x = torch.zeros_like(x)
    elif contents == "one_token":
        x[0] *= 300
    return x.to(torch.bfloat16)


@pytest.fixture(params=CONTENTS)
def prefix(request) -> torch.Tensor:
    """`[H, T, D] float32`, as a `Side` takes it."""
    return make_prefix(request.param).transpose(0, 1).float().contiguous()


@pytest.fixture
def random_prefix():
    return make_prefix


@pytest.fixture(scope="session")
def tolerances():
    spec = importlib.util.spec_from_file_location("tolerances", Path(__file__).parents[1] / "tolerances.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
