"""One byte budget, two tiers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_hq.page_format import FORMATS, PAGE_TOKENS, get_format
from sgl_hq.pool.sizing import PAGES_PER_SINK, KVShape, packed_page_bytes, sink_slot_bytes, split_budget, tiers_of_dense

SMOL = KVShape(layers=30, kv_heads=3, head_dim=64, v_head_dim=64)


def _layouts(name):
    return [get_format(name).layout(SMOL.head_dim)] * SMOL.layers


@given(
    budget=st.integers(2**26, 2**36), fraction=st.floats(0.05, 0.95), name=st.sampled_from(sorted(FORMATS)),
    dim=st.sampled_from([64, 80, 128]), heads=st.integers(1, 8), layers=st.integers(1, 40),
)
def test_tiers_fit_the_budget_and_use_it(budget, fraction, name, dim, heads, layers):
    fmt, shape = get_format(name), KVShape(layers, heads, dim, dim)
    layouts = [fmt.layout(dim)] * layers
    try:
        sizes = split_budget(budget, fraction, layouts, shape)
    except ValueError as error:
        assert "raise --max-total-tokens" in str(error)
        return
    page, sink = packed_page_bytes(layouts, shape), sink_slot_bytes(layouts, shape)
    dense = sizes.dense_tokens * shape.dense_bytes_per_token
    packed = sizes.packed_pages * page + sizes.sinks * sink
    assert dense + packed <= budget
    dense_page = PAGE_TOKENS * shape.dense_bytes_per_token
    assert dense > budget * (1 - fraction) - dense_page - 1, "a whole dense page of the budget is unused"
    left = budget - dense - packed
    assert left < dense_page + (dense_page * fraction / (1 - fraction)) + page + 2 * sink + 2, "packed bytes are unused"
    assert sizes.dense_tokens % PAGE_TOKENS == 0
    assert sizes.sinks == (-(-sizes.packed_pages // PAGES_PER_SINK) if fmt.sink_tokens else 0)


def test_the_pool_derives_the_same_tiers_from_the_dense_size_alone():
    for name in FORMATS:
        sizes = split_budget(360 * 2**20, 0.4, _layouts(name), SMOL)
        assert tiers_of_dense(sizes.dense_tokens, 0.4, _layouts(name), SMOL) == sizes


def test_a_budget_without_room_for_a_page_in_each_tier_says_what_to_do():
    page = PAGE_TOKENS * SMOL.dense_bytes_per_token
    with pytest.raises(ValueError, match="raise --max-total-tokens"):
        split_budget(page, 0.5, _layouts("bf16"), SMOL)
    assert split_budget(2 * page, 0.5, _layouts("bf16"), SMOL).packed_pages == 1
