"""Memory of two tiers whose boundary moves: no byte is lost or seen in the wrong tier, addresses stay, the sum stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_hq.layer_codecs import layer_codecs
from sgl_hq.page_format import PAGE_TOKENS as P
from sgl_hq.pool.chunks import granularity
from sgl_hq.pool.elastic_memory import ElasticMemory
from sgl_hq.pool.packed_tier import PackedTier
from sgl_hq.pool.sizing import KVShape
from sgl_hq.pool.slabs import slabs_of_dense

SHAPE = KVShape(layers=2, kv_heads=1, head_dim=16, v_head_dim=16)  # a page's K is 2 KiB, a slab two pages
SLABS, SLAB = 6, 2


def _tiers(name: str) -> tuple[ElasticMemory, PackedTier]:
    codecs = layer_codecs(name, SHAPE.layers, SHAPE.head_dim, SHAPE.v_head_dim)
    layouts = [codec.layout for codec in codecs]
    slabs = slabs_of_dense((SLABS * SLAB - 1) * P, layouts, SHAPE, granularity("cpu"))
    assert (slabs.slabs, slabs.pages) == (SLABS, SLAB)
    memory = ElasticMemory(slabs, layouts, SHAPE, "cpu")
    return memory, PackedTier(codecs, SHAPE, slabs.sizes(layouts), "cpu", memory)


def _lend(memory, tier, slab):
    memory.lend(slab)
    tier.set_capacity(memory.slabs.packed_pages(len(memory.lent)))


def _give_back(memory, tier, slab):
    tier.set_capacity(memory.slabs.packed_pages(len(memory.lent) - 1))
    memory.give_back(slab)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["bf16", "hq6"]),
    steps=st.lists(st.tuples(st.sampled_from(["write", "free", "lend", "shrink"]), st.integers(0, 99), st.booleans()), max_size=40),
)
def test_packed_pages_keep_their_values_wherever_the_boundary_goes(name, steps):
    memory, tier = _tiers(name)
    k, v = ([torch.randn(SLAB * P, 1, 16).bfloat16() for _ in range(2)] for _ in "kv")
    addresses = [tensor.data_ptr() for tensor in (*memory.k_buffers, *memory.v_buffers, *memory.records)]
    held: list[tuple[list[int], list]] = []  # pages, and what each reads as
    read = lambda pages: [tuple(x.clone() for x in tier.read(layer, torch.tensor([p]), p)) for p in pages for layer in range(2)]
    for step, n, starts in steps:
        if step == "write" and tier.has_room(1 + n % SLAB, starts):
            pages = tier.write(k, v, torch.arange((1 + n % SLAB) * P), starts).pages
            held.append((pages, read(pages)))
        elif step == "free" and held:
            tier.free(held.pop(n % len(held))[0])
        elif step == "lend" and len(memory.lent) < SLABS - 1:
            dense = [slab for slab in range(1, SLABS) if slab not in memory.lent]
            _lend(memory, tier, dense[n % len(dense)])
        elif step == "shrink" and memory.lent and tier.pages_used <= (left := memory.slabs.packed_pages(len(memory.lent) - 1)):
            sources, targets = tier.moves_below(left)
            tier.move(sources, targets)
            now = dict(zip(sources, targets, strict=True))
            held = [([now.get(page, page) for page in pages], values) for pages, values in held]
            _give_back(memory, tier, memory.lent[n % len(memory.lent)])
        tier.check_books([page for pages, _ in held for page in pages])
        assert memory.dense_bytes + memory.packed_bytes == memory.bytes_created == (SLABS + 1) * memory.slabs.slab_bytes
        for pages, values in held:
            for was, is_ in zip(values, read(pages), strict=True):
                assert torch.equal(was[0], is_[0]) and torch.equal(was[1], is_[1])
    assert addresses == [tensor.data_ptr() for tensor in (*memory.k_buffers, *memory.v_buffers, *memory.records)]


def test_dense_pages_of_other_slabs_are_left_alone():
    memory, tier = _tiers("bf16")
    for buffer in (*memory.k_buffers, *memory.v_buffers):
        buffer[:] = torch.arange(SLABS).repeat_interleave(SLAB * P)[:, None, None]
    _lend(memory, tier, 3)
    for records in memory.records:
        records[: tier.pages_total] = 0xFF
    _give_back(memory, tier, 3)
    for buffer in (*memory.k_buffers, *memory.v_buffers):
        assert [sorted(set(slab[:, 0, 0].tolist())) for slab in buffer.split(SLAB * P)] == [[0], [1], [2], [0], [4], [5]]


@pytest.mark.parametrize("wrong", [lambda m: m.lend(0), lambda m: m.lend(2), lambda m: m.give_back(3), lambda m: m.lend(SLABS)])
def test_a_slab_is_in_one_tier_and_the_first_stays_where_it_is(wrong):
    memory, _ = _tiers("bf16")
    memory.lend(2)
    with pytest.raises(AssertionError, match="slab"):
        wrong(memory)
    assert memory.lent == [2]


def test_a_page_in_use_does_not_cease_to_be():
    memory, tier = _tiers("bf16")
    _lend(memory, tier, 1)
    k, v = ([torch.zeros(3 * P, 1, 16).bfloat16()] * 2 for _ in "kv")
    tier.write(k, v, torch.arange(3 * P), False)
    with pytest.raises(AssertionError, match="in use"):
        tier.set_capacity(2)
