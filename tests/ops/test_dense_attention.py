"""The dense decode kernel under Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from interpreted import checks_of

from sgl_hq.kernels.grouped_attention.launcher_dense import dense_attention, list_pages, make_dense_work

RAGGED = [0, 1, 63, 64, 65, 400]


@pytest.fixture(scope="module")
def interpreted():
    with checks_of("dense_checks") as call:
        yield call


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kv_heads, group", [(2, 1), (1, 7), (1, 8), (1, 16)])
def test_ragged_rows(interpreted, dim, kv_heads, group):
    interpreted("check_lengths", RAGGED, dim, kv_heads=kv_heads, group=group)


@pytest.mark.parametrize("length", RAGGED[1:])
def test_one_row(interpreted, length):
    interpreted("check_lengths", [length], 64)


@pytest.mark.parametrize("programs", [1, 5, 40])
def test_padding_of_a_graph(interpreted, programs):
    interpreted("check_lengths", [100, 0, 0, 300, 64, 0], 64, programs=programs, lanes=9, max_rows=16)


def test_many_rows(interpreted):
    interpreted("check_lengths", [(7 * row) % 150 for row in range(300)], 64, kv_heads=1, group=2)


def test_tolerances_do_not_forgive_wrong_tokens(interpreted):
    interpreted("check_mutations", 64)


def test_plans(interpreted):
    interpreted("check_plans")


READS = [(range(1, 4), 2, True), ([1, 3], 1, False), ([5], 1, True), ([6], 3, False)]


@pytest.mark.parametrize("fmt", ["bf16", "hq4", "lossless", "sink3-K7V2"])
@pytest.mark.parametrize("programs", [2, 24])
def test_merge(interpreted, fmt, programs):
    interpreted("check_merge", fmt, READS, [65, 130, 0, 400, 0, 1, 900, 0], lanes=10, programs=programs)


def test_merge_of_large_tiles_and_dense_pages(interpreted):
    reads = [(range(0, 40), 3, True), (range(8, 20), 1, False)]
    interpreted("check_merge", "hq4", reads, [(31 * row) % 200 for row in range(45)], kv_heads=1, group=7)


def test_growing_rows(interpreted):
    interpreted("check_growing", "hq4", 64, kv_heads=1, group=7)


@pytest.mark.parametrize("group", [1, 7, 16])
def test_merge_without_packed_pages(interpreted, group):
    interpreted("check_merge", "hq4", [([0], 0, False)], RAGGED, 128, kv_heads=1, group=group)


def test_our_arm_of_the_benchmark(interpreted):
    interpreted("check_bench", "bf16")


def test_refusals():
    work = make_dense_work(4, 8, 14, 2, 64, "cpu")
    table, lanes = torch.zeros(6, 128, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)
    for arguments, words in (
        ((table, lanes, lanes, lanes, 4), "5 lanes"),
        ((table, lanes[:3], lanes[:3], lanes[:3], 4), "4 rows in 3 lanes"),
        ((table.repeat(1, 2), lanes[:3], lanes[:3], lanes[:3], 3), "256 tokens"),
        ((table.long(), lanes[:3], lanes[:3], lanes[:3], 3), "int32"),
    ):
        with pytest.raises(ValueError, match=words):
            list_pages(work, *arguments)
    q, kv = torch.zeros(4, 14, 64, dtype=torch.bfloat16), torch.zeros(128, 2, 64, dtype=torch.bfloat16)
    for wrong, words in (
        ((q.float(), kv, kv), "q is"),
        ((q[:, :12], kv, kv), "q is"),
        ((torch.cat([q, q]), kv, kv), "8 rows"),
        ((q, kv.half(), kv), "k is"),
        ((q, kv, kv[:, :1]), "v is"),
    ):
        with pytest.raises(ValueError, match=words):
            dense_attention(*wrong, work, 1.0)
