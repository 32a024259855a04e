"""One byte budget in slabs: what fits, what a lent slab gives, what live packed pages pin."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_hq.page_format import FORMATS, PAGE_TOKENS, get_format
from sgl_hq.pool.sizing import KVShape, sink_slot_bytes
from sgl_hq.pool.slabs import FEWEST_SLABS, MOST_SLABS, Slabs, slabs_of_budget, slabs_of_dense

BUDGETS = {
    "budget": st.integers(2**24, 2**37), "name": st.sampled_from(sorted(FORMATS)), "dim": st.sampled_from([64, 80, 128]),
    "heads": st.integers(1, 8), "layers": st.integers(1, 40), "granularity": st.sampled_from([2**12, 2**21]),
}  # fmt: skip


def _of(budget, name, dim, heads, layers, granularity):
    shape, layouts = KVShape(layers, heads, dim, dim), [get_format(name).layout(dim)] * layers
    return slabs_of_budget(budget, layouts, shape, granularity), layouts, shape


@given(**BUDGETS)
def test_slabs_fit_the_budget_and_use_it(granularity, **given):
    try:
        slabs, layouts, shape = _of(**given, granularity=granularity)
    except ValueError as error:
        assert "--hq-packed-fraction 0.5" in str(error)
        return
    sizes = slabs.sizes(layouts)
    taken = (slabs.slabs + 1) * slabs.slab_bytes + sizes.sinks * sink_slot_bytes(layouts, shape)
    one_more = slabs.slab_bytes + (slabs.packed_pages(1) + 1) // 8 * sink_slot_bytes(layouts, shape) + sink_slot_bytes(layouts, shape)
    assert taken <= given["budget"] < taken + 5 * one_more  # at first, slabs may have been twice as large
    assert FEWEST_SLABS <= slabs.slabs <= MOST_SLABS and slabs.chunk_bytes % granularity == 0
    assert slabs.slab_bytes == slabs.pages * PAGE_TOKENS * shape.dense_bytes_per_token
    assert slabs_of_dense(slabs.dense_tokens, layouts, shape, granularity) == slabs, "the pool knows the dense size alone"


@given(**BUDGETS, pages=st.integers(0, 10**6), more=st.integers(0, 10**4))
def test_live_packed_pages_pin_no_more_than_packing_them_freed(pages, more, **given):
    try:
        slabs, _, _ = _of(**given)
    except ValueError:
        return
    lent = slabs.fewest_lent(pages)
    assert slabs.packed_pages(lent) >= pages and (not lent or slabs.packed_pages(lent - 1) < pages)
    assert lent * slabs.pages <= slabs.pinned_pages(pages), "what is promised back could not be had back"
    assert slabs.pinned_pages(pages + more) - slabs.pinned_pages(pages) <= more, "packing would take from what was promised"


def test_a_budget_too_small_to_be_moved_says_what_to_do():
    shape = KVShape(30, 3, 64, 64)
    with pytest.raises(ValueError, match=r"takes 4 parts, at least 1800\.0 MiB"):
        slabs_of_budget(2**30, [get_format("bf16").layout(64)] * 30, shape, 2**21)


def test_a_model_of_seven_billion_parameters():
    """Qwen2.5-7B on 100 GiB: a slab is 512 pages, 1,792 MiB."""
    shape, layouts = KVShape(28, 4, 128, 128), [get_format("hq4").layout(128)] * 28
    slabs = slabs_of_budget(100 << 30, layouts, shape, 2 << 20)
    assert slabs == Slabs(28, 54, 512, 32 << 20, 4 * get_format("hq4").layout(128).record_bytes)
    assert slabs.packed_pages(1) - slabs.packed_pages(0) == 1953
