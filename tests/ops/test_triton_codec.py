"""The Triton kernels under Triton's interpreter against the PyTorch codec, bit for bit."""

from __future__ import annotations

import pytest
import torch
from interpreted import checks_of

AFFINE = ["hq6", "hq5", "hq4", "hq3", "hq2", "sink3-K7tV8", "K8V7", "K2tV5", "K6tV4"]
OTHERS = ["lossless", "int8", "bf16"]
CONTENTS = ["offset", "constant", "zero", "huge", "tiny", "subnormal", "one_outlier", "outlier_channels"]


@pytest.fixture(scope="module")
def interpreted():
    with checks_of("triton_checks") as call:
        yield call


@pytest.mark.parametrize("fmt", [*AFFINE, *OTHERS])
def test_formats(interpreted, fmt):
    interpreted("check_pack", fmt, (64, 32), "random", pages=2)
    interpreted("check_unpack", fmt, (64, 32), "random", pages=2)


@pytest.mark.parametrize("dims", [(128, 128), (80, 96), (8, 24)], ids=str)
@pytest.mark.parametrize("fmt", ["hq6", "K3tV7", *OTHERS])
def test_head_dims(interpreted, fmt, dims):
    interpreted("check_pack", fmt, dims, "random", pages=2, heads=1, layers=1)
    interpreted("check_unpack", fmt, dims, "random", pages=2, heads=1, layers=1)


@pytest.mark.parametrize("fmt", ["sink4-K6tV5", "hq4", *OTHERS])
def test_wide_heads(interpreted, fmt):
    interpreted("check_pack", fmt, (256, 256), "random", pages=1, heads=1, layers=1)
    interpreted("check_unpack", fmt, (256, 256), "random", pages=1, heads=1, layers=1)


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("fmt", ["hq6", "K5tV3", "int8"])
def test_contents(interpreted, fmt, contents):
    interpreted("check_pack", fmt, (64, 96), contents, heads=1, layers=1, first_has_sink=False)
    interpreted("check_unpack", fmt, (64, 96), contents, heads=1, layers=1, first_has_sink=False)


@pytest.mark.parametrize("pages", [0, 1, 5])
def test_page_lists(interpreted, pages):
    for fmt in ("hq6", "lossless"):
        interpreted("check_pack", fmt, (64, 64), "random", pages=pages, heads=3, index_dtype=torch.int32)
        interpreted("check_unpack", fmt, (64, 64), "random", pages=pages, heads=3, all_layers=False)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2.0**113, -(2.0**112) * 1.01])
@pytest.mark.parametrize("fmt", ["hq6", "K6tV5", "int8"])
def test_what_cannot_be_packed_is_flagged(interpreted, fmt, bad):
    for side in (0, 1):
        interpreted("check_refused", fmt, bad, side)


def test_sink_tokens_may_hold_anything(interpreted):
    interpreted("check_sink_tokens_may_hold_anything", "hq6")


@pytest.mark.parametrize("dims, escapes", [
    ((64, 64), (0, 0)), ((64, 64), (17, 3)), ((64, 64), (0, 39)), ((64, 64), (39, 0)), ((64, 64), (20, 19)),
    ((64, 64), (20, 20)), ((64, 64), (2000, 3000)), ((256, 256), (100, 59)), ((80, 96), (55, 0)), ((8, 24), (5, 3)),
    ((512, 512), (255, 0)), ((512, 512), (256, 0)), ((512, 512), (0, 256)),
], ids=str)  # fmt: skip
def test_escapes(interpreted, dims, escapes):
    interpreted("check_escapes", dims, *escapes)


def test_arena_slices_and_no_pages(interpreted):
    interpreted("check_arena_slices")


def test_wrong_inputs_are_named(interpreted):
    interpreted("check_wrong_inputs")
