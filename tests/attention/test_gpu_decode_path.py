"""Decode as a GPU backend runs it, packed and dense pages by our kernels, under Triton's interpreter and against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "ops")]
from interpreted import checks_of


@pytest.fixture(scope="module")
def interpreted():
    with checks_of("gpu_decode_checks") as call:
        yield call


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("lens", [[259, 70, 195], [131, 3, 132]], ids=["long", "short"])
def test_decode(interpreted, lens, graph):
    interpreted("check_decode", "bf16", lens, graph)
