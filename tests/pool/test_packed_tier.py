"""Pages in the packed tier: what is written is read, nothing is lost, nothing is shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_hq.kernels.page_codec import NonFiniteError
from sgl_hq.layer_codecs import layer_codecs
from sgl_hq.page_format import PAGE_TOKENS as P
from sgl_hq.page_format import get_format
from sgl_hq.pool.packed_tier import PackedTier
from sgl_hq.pool.sizing import KVShape, TierSizes

SHAPE = KVShape(layers=2, kv_heads=3, head_dim=64, v_head_dim=64)


def _dense(pages, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda: [torch.randn(pages * P, SHAPE.kv_heads, 64, generator=g).bfloat16() for _ in range(SHAPE.layers)]
    return make(), make()


def _tier(name, pages=12, sinks=2, shape=SHAPE):
    codecs = layer_codecs(name, shape.layers, shape.head_dim, shape.v_head_dim)
    return PackedTier(codecs, shape, TierSizes(0, pages, sinks if codecs[0].fmt.sink_tokens else 0), "cpu")


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.booleans()), max_size=40))
@settings(max_examples=60, deadline=None)
def test_books_hold_after_any_sequence_of_writes_and_frees(operations):
    tier = _tier("hq6")
    k, v = _dense(4)
    held: list[list[int]] = []
    for write, n, starts in operations:
        if write:
            if tier.has_room(n, starts):
                held.append(tier.write(k, v, torch.arange(n * P), starts).pages)
            else:
                assert n > tier.pages_free or (starts and tier.sinks_free == 0)
        elif held:
            tier.free(held.pop(n % len(held)))
        tier.check_books([p for pages in held for p in pages])
    assert tier.pages_used == sum(map(len, held))


def test_bf16_pages_come_back_bit_for_bit_in_any_order_of_slots():
    tier = _tier("bf16")
    k, v = _dense(6)
    slots = torch.arange(6 * P).view(6, P)[[4, 1, 3]].flatten()
    pages = tier.write(k, v, slots, starts_sequence=True).pages
    for layer in range(SHAPE.layers):
        got_k, got_v = tier.read(layer, torch.tensor(pages), pages[0])
        assert torch.equal(got_k, k[layer][slots].transpose(0, 1)) and torch.equal(got_v, v[layer][slots].transpose(0, 1))


def test_sink_tokens_of_a_sequence_stay_exact_and_others_do_not():
    tier = _tier("hq6")
    k, v = _dense(1)
    first = tier.write(k, v, torch.arange(P), starts_sequence=True).pages
    later = tier.write(k, v, torch.arange(P), starts_sequence=False).pages
    want = k[1].transpose(0, 1).float()
    got_first = tier.read(1, torch.tensor(first), first[0])[0].clone()  # the next read reuses the buffers
    got_later, _ = tier.read(1, torch.tensor(later), later[0])
    assert torch.equal(got_first[:, :4], want[:, :4]) and not torch.equal(got_later[:, :4], want[:, :4])
    assert not torch.equal(got_first[:, 4:], want[:, 4:]), "hq6 is lossy: equality would mean that nothing was packed"


def test_warming_up_leaves_the_tier_empty():
    tier = _tier("hq6")
    tier.warm_up(*_dense(1))
    tier.check_books([])
    assert tier.bytes_used == 0


def test_a_refused_page_can_be_freed_like_any_other():
    tier = _tier("hq6")
    k, v = _dense(2)
    v[1][70, 0, 0] = float("nan")  # the second layer, so that the first was already written
    packing = tier.write(k, v, torch.arange(2 * P), starts_sequence=True)
    tier.check_books(packing.pages)
    assert isinstance(packing.error(), NonFiniteError)
    tier.free(packing.pages)
    tier.check_books([])


def test_a_full_tier_is_a_caller_error_not_a_silent_overwrite():
    tier = _tier("bf16", pages=1)
    k, v = _dense(1)
    tier.write(k, v, torch.arange(P), False)
    with pytest.raises(AssertionError, match="packed tier is full"):
        tier.write(k, v, torch.arange(P), False)


def test_bytes_are_those_of_the_tensors():
    tier = _tier("hq6", pages=8, sinks=2)
    layout = get_format("hq6").layout(64, 64)
    assert tier.bytes_allocated == SHAPE.layers * SHAPE.kv_heads * (8 * layout.record_bytes + 2 * layout.sink_bytes)
    assert tier.bytes_used == 0
    k, v = _dense(3)
    tier.write(k, v, torch.arange(3 * P), True)
    assert tier.bytes_used == SHAPE.layers * SHAPE.kv_heads * (3 * layout.record_bytes + layout.sink_bytes)


def test_metadata_of_a_tier_for_a_million_tokens_is_below_sixteen_mebibytes():
    pages = 1_000_000 // P
    tier = _tier("hq6", pages, pages // 8, KVShape(1, 1, 8, 8))
    assert tier.metadata_bytes < 2**20
