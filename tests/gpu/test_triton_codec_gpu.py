"""The Triton kernels on a GPU against the PyTorch codec on the CPU, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import triton_checks as checks

pytestmark = pytest.mark.gpu

FORMATS = ["hq6", "hq5", "hq4", "hq3", "hq2", "sink3-K7tV8", "K8V7", "K2tV5", "K6tV4", "lossless", "int8", "bf16"]
CONTENTS = ["offset", "constant", "zero", "huge", "tiny", "subnormal", "one_outlier", "outlier_channels"]


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (80, 96)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_formats(fmt, dims):
    checks.check_pack(fmt, dims, "random", device="cuda", pages=7, heads=3, layers=3)
    checks.check_unpack(fmt, dims, "random", device="cuda", pages=7, heads=3, layers=3)


@pytest.mark.parametrize("fmt", ["hq4", "K6tV5", "lossless"])
@pytest.mark.parametrize("dims", [(8, 24), (256, 256)], ids=str)
def test_other_head_dims(fmt, dims):
    checks.check_pack(fmt, dims, "random", device="cuda")
    checks.check_unpack(fmt, dims, "random", device="cuda")


@pytest.mark.parametrize("fmt, contents", [("hq6", "outlier_channels"), ("lossless", "random")])
def test_real_sizes(fmt, contents):
    """8,192 tokens x 4 heads x 128, 6 layers: every program of a large grid, and offsets of a large pool."""
    checks.check_pack(fmt, (128, 128), contents, device="cuda", pages=128, heads=4, layers=6)
    checks.check_unpack(fmt, (128, 128), contents, device="cuda", pages=128, heads=4, layers=6)


@pytest.mark.parametrize("fmt", ["hq6", "K6tV4", "int8"])
def test_contents(fmt):
    for contents in CONTENTS:
        checks.check_pack(fmt, (64, 64), contents, device="cuda", pages=3, first_has_sink=False)
        checks.check_unpack(fmt, (64, 64), contents, device="cuda", pages=3, first_has_sink=False)


@pytest.mark.parametrize("fmt", ["hq6", "K6tV4", "lossless", "int8", "bf16"])
def test_small_page_lists(fmt):
    """Every pack and unpack kernel; fits compute-sanitizer (`launch/sanitize.sh`)."""
    for pages in (0, 1, 5):
        checks.check_pack(fmt, (64, 64), "random", device="cuda", pages=pages, index_dtype=torch.int32)
        checks.check_unpack(fmt, (64, 64), "random", device="cuda", pages=pages, all_layers=False)


@pytest.mark.parametrize("fmt", ["hq6", "K6tV4", "int8"])
def test_what_cannot_be_packed_is_flagged(fmt):
    for bad in (torch.nan, torch.inf, -torch.inf, 2.0**113, -(2.0**112) * 1.01):
        for side in (0, 1):
            checks.check_refused(fmt, bad, side, device="cuda")


def test_sink_tokens_may_hold_anything():
    checks.check_sink_tokens_may_hold_anything("hq6", device="cuda")


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (80, 96)], ids=str)
def test_escapes(dims):
    budget = checks.Case("lossless", dims, "zero", pages=0).layout.escape_budget
    for escapes in ((0, 0), (17, 3), (0, budget), (budget, 0), (20, budget - 20), (20, budget - 19), (2000, 3000)):
        checks.check_escapes(dims, *escapes, device="cuda", pages=16)


def test_escapes_of_one_side_have_one_byte():
    for escapes in ((255, 0), (256, 0), (0, 256)):
        checks.check_escapes((512, 512), *escapes, device="cuda")


def test_arena_slices_and_no_pages():
    checks.check_arena_slices(device="cuda")


def test_wrong_inputs_are_named():
    checks.check_wrong_inputs(device="cuda")


def test_nothing_waits_for_the_gpu():
    """After a first call with a pool's buffers, packing and unpacking never synchronise."""
    case = checks.Case("hq6", (64, 64), "random", device="cuda")
    k, v = case.pool(0), case.pool(1)
    out = [checks.poisoned(2, 192, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def both() -> None:
        checks.pack_pages(case.layout, k, v, case.dense_pages, case.records, case.packed_pages, case.sinks, 1)
        checks.unpack_pages(case.layout, case.records, case.packed_pages, case.sinks[:, 1], *out)

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
