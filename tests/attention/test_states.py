"""Attention states: the CPU path and the merge against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_hq.attention.merge import empty_state, merge, merge_into
from sgl_hq.kernels.grouped_attention import attend_group
from sgl_hq.kernels.grouped_attention.naive import attend_naive
from sgl_hq.kernels.grouped_attention.reference import attend
from sgl_hq.records import AttnState

# float32: sums of <= 700 terms of size O(1): 700 * 2**-24 = 4e-5. bf16: o is rounded once, |o| <= 4, half an ulp of
# 2**-8 relative = 8e-3 * 4; the lse stays float32 but its inputs' products are accumulated in float32.
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (3.2e-2, 2e-3)}


def _tensors(seed, rows, q_heads, kv_heads, tokens, dim, dtype):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    return make(rows, q_heads, dim), make(kv_heads, tokens, dim), make(kv_heads, tokens, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, q_heads, kv_heads, tokens, dim",
    [(1, 9, 3, 64, 64), (1, 1, 1, 1, 16), (7, 14, 2, 193, 64), (33, 4, 4, 640, 80), (3, 12, 2, 65, 128)],
)
def test_attend_equals_the_definition(dtype, rows, q_heads, kv_heads, tokens, dim):
    q, k, v = _tensors(0, rows, q_heads, kv_heads, tokens, dim, dtype)
    got, want = attend(q, k, v, dim**-0.5), attend_naive(q, k, v, dim**-0.5)
    o_tolerance, lse_tolerance = TOLERANCE[dtype]
    assert (got.o.double() - want.o).abs().max() < o_tolerance
    assert (got.lse_nat.double() - want.lse_nat).abs().max() < lse_tolerance


@pytest.mark.parametrize("tokens", [1, 2, 63, 130])
def test_causal_attend_sees_no_later_token(tokens):
    q, k, v = _tensors(1, tokens, 6, 2, tokens, 32, torch.float32)
    got, want = attend(q, k, v, 0.2, causal=True), attend_naive(q, k, v, 0.2, causal=True)
    assert (got.o.double() - want.o).abs().max() < 1e-4
    assert (got.lse_nat.double() - want.lse_nat).abs().max() < 1e-4


def test_a_group_is_computed_in_the_dtype_the_codec_returned():
    q, k, v = _tensors(2, 5, 6, 2, 64, 32, torch.bfloat16)
    got = attend_group(q, k.float(), v.float(), 0.2)
    want = attend_naive(q, k, v, 0.2)
    assert (got.o.double() - want.o).abs().max() < 1e-4, "bf16 queries must not round float32 keys"


@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_merging_parts_equals_attending_to_the_whole(cuts, seed):
    q, k, v = _tensors(seed, 3, 6, 2, 60, 16, torch.float32)
    edges = [0, *sorted(cuts), 60]
    state = empty_state(3, 6, 16, "cpu")
    for a, b in zip(edges, edges[1:]):  # empty parts included
        part = attend_naive(q, k[:, a:b], v[:, a:b], 0.25)
        state = merge(state, AttnState(part.o.float(), part.lse_nat.float()))
    want = attend_naive(q, k, v, 0.25)
    assert (state.o.double() - want.o).abs().max() < 1e-5
    assert (state.lse_nat.double() - want.lse_nat).abs().max() < 1e-5


def test_merging_two_empty_states_gives_an_empty_state_without_nan():
    both = merge(empty_state(2, 3, 4, "cpu"), empty_state(2, 3, 4, "cpu"))
    assert torch.equal(both.o, torch.zeros(2, 3, 4)) and (both.lse_nat == float("-inf")).all()


def test_merging_scores_of_very_different_size_does_not_overflow():
    big = AttnState(torch.ones(1, 1, 2), torch.full((1, 1), 3e4))
    small = AttnState(torch.full((1, 1, 2), 7.0), torch.full((1, 1), -3e4))
    assert torch.equal(merge(big, small).o, big.o) and torch.equal(merge(small, big).o, big.o)


def test_merge_into_touches_only_the_named_rows():
    state = AttnState(torch.zeros(4, 1, 2), torch.zeros(4, 1))
    merge_into(state, torch.tensor([3, 1]), AttnState(torch.tensor([[[4.0, 4.0]], [[2.0, 2.0]]]), torch.zeros(2, 1)))
    assert state.o[:, 0, 0].tolist() == [0.0, 1.0, 0.0, 2.0]
    assert state.lse_nat[[0, 2]].abs().max() == 0
