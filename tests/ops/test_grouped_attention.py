"""The grouped kernels under Triton's interpreter, against float64 attention over the unpacked pages."""

from __future__ import annotations

import pytest
from interpreted import checks_of

FAMILY = ["K8V7", "sink3-K7V2", "sink50-K4V4"]
FORMATS = ["bf16", "lossless", "int8", "hq7", "hq6", "hq5", "hq4", "hq3", "hq2", *FAMILY]


@pytest.fixture(scope="module")
def interpreted():
    with checks_of("grouped_checks") as call:
        yield call


@pytest.mark.parametrize("fmt", FORMATS)
def test_formats(interpreted, fmt):
    interpreted("check_format", fmt, 64)


@pytest.mark.parametrize("fmt", ["bf16", "lossless", "int8", "hq6", "hq3"])
def test_head_dim_128(interpreted, fmt):
    interpreted("check_format", fmt, 128, kv_heads=1)


@pytest.mark.parametrize("dim", [64, 128])
def test_lossless_escapes(interpreted, dim):
    interpreted("check_escapes", dim, kv_heads=1)


@pytest.mark.parametrize("group", [1, 7, 8, 16])
@pytest.mark.parametrize("fmt", ["bf16", "hq4"])
def test_query_heads_that_share_a_kv_head(interpreted, fmt, group):
    interpreted("check_format", fmt, 64, kv_heads=2 if group == 1 else 1, group=group)


@pytest.mark.parametrize("fmt", ["bf16", "hq5"])
def test_dense_states(interpreted, fmt):
    interpreted("check_dense_states", fmt, 64)


@pytest.mark.parametrize("fmt", ["bf16", "hq4"])
def test_nothing_to_read(interpreted, fmt):
    interpreted("check_nothing_to_read", fmt)


@pytest.mark.parametrize("fmt", ["bf16", "hq4"])
def test_kernels_without_work_are_not_launched(interpreted, fmt):
    interpreted("check_launches", fmt)


@pytest.mark.parametrize("fmt", ["int8", "hq4"])
def test_nan_in_the_padding_changes_nothing(interpreted, fmt):
    interpreted("check_padding", fmt, 64)


@pytest.mark.parametrize("fmt", ["bf16", "lossless", "int8", "hq5"])
def test_tolerances_do_not_forgive_wrong_pages(interpreted, fmt):
    interpreted("check_mutations", fmt)
