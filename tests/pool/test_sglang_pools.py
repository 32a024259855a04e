"""SGLang's own tests of its paged allocator and its MHA pool, asked of ours at page size 64.

Re-expressed from sgl-project/sglang, test/registered/unit/mem_cache/: test_allocator_cpu.py (commit 6204cdc6),
test_allocator_gpu.py (aabffd3c; ours does on a CPU what Triton does there), test_paged_allocator.py (74c09f0d),
test_allocator_oot_contract.py (4a012dde), test_asymmetric_mha_pool.py (090e42ed).

Left out: TokenToKVPoolAllocator (page size 1); need_sort (PD disaggregation, which is refused); backup_state, the legacy free, the
declaration of legacy allocation and rejected partial pages (SGLang before or after 0.5.17); copies to the host (refused);
quantised stores and the prefix-valid kernel (other dtypes than bfloat16 are refused); ReqToTokenPool (SGLang's class, unchanged).
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from two_tier_parts import P

PAGES = 8


def _allocator(pages: int = PAGES):
    from sgl_hq.platform_cpu.allocator import CPUPagedAllocator

    return CPUPagedAllocator(pages * P, page_size=P, dtype=torch.bfloat16, device="cpu", kvcache=SimpleNamespace(), need_sort=False)


def _extend(allocator, requests: list[tuple[int, int, int]]):
    """requests: (tokens that have slots, tokens that shall have, slot of the last that has or -1)."""
    prefix, end, last = (torch.tensor(column) for column in zip(*requests))
    return allocator.alloc_extend(prefix, prefix, end, end, last, int((end - prefix).sum()))


def _decode(allocator, requests: list[tuple[int, int]]):
    """requests: (tokens with the new one, slot of the last before it)."""
    end, last = (torch.tensor(column) for column in zip(*requests))
    return allocator.alloc_decode(end, end, last)


def _page(number: int) -> list[int]:
    return list(range(number * P, (number + 1) * P))


# ---- whole pages -----------------------------------------------------------------------------------------------------


def test_alloc_gives_whole_aligned_pages_once():
    allocator = _allocator()
    first, second = allocator.alloc(2 * P), allocator.alloc(3 * P)
    assert first.tolist() == _page(1) + _page(2)
    assert second.tolist() == _page(3) + _page(4) + _page(5)
    assert allocator.available_size() == 3 * P


def test_the_padding_page_is_never_given_away():
    assert _allocator().alloc(PAGES * P).min() == P


def test_more_than_there_is_gives_none_and_takes_nothing():
    allocator = _allocator()
    assert allocator.alloc((PAGES + 1) * P) is None
    assert allocator.available_size() == PAGES * P
    assert len(allocator.alloc(PAGES * P)) == PAGES * P
    assert allocator.available_size() == 0 and allocator.alloc(P) is None


def test_nothing_asked_for_takes_nothing():
    allocator = _allocator()
    assert len(allocator.alloc(0)) == 0
    allocator.free(torch.empty(0, dtype=torch.int64))
    assert allocator.available_size() == PAGES * P


def test_freed_pages_are_given_again():
    allocator = _allocator()
    allocator.free(allocator.alloc(PAGES * P))
    assert sorted(allocator.alloc(PAGES * P).tolist()) == [slot for page in range(1, PAGES + 1) for slot in _page(page)]


def test_a_group_frees_at_its_end():
    allocator = _allocator()
    first, second = allocator.alloc(P), allocator.alloc(2 * P)
    allocator.free_group_begin()
    allocator.free(first)
    allocator.free_segment(second, start_pos=0)
    assert allocator.available_size() == (PAGES - 3) * P
    allocator.free_group_end()
    assert allocator.available_size() == PAGES * P
    allocator.free_group_begin()
    allocator.free_group_end()
    assert sorted(allocator.free_pages.tolist()) == list(range(1, PAGES + 1))


def test_a_page_between_two_segments_is_freed_once():
    allocator = _allocator()
    row = allocator.alloc(3 * P)
    allocator.free_segments([(row[: P + 10], 0), (row[P + 10 :], P + 10)])
    assert sorted(allocator.free_pages.tolist()) == list(range(1, PAGES + 1))


def test_clear_gives_everything_back():
    allocator = _allocator()
    allocator.alloc(PAGES * P)
    allocator.clear()
    assert allocator.available_size() == PAGES * P


@patch.dict(os.environ, {"SGLANG_DEBUG_MEMORY_POOL": "1"})
def test_debug_mode_refuses_a_second_free_and_a_part_of_a_page():
    allocator = _allocator()
    with pytest.raises(AssertionError):
        allocator.alloc(P - 1)
    slots = allocator.alloc(2 * P)
    allocator.free(slots[:P])
    with pytest.raises(AssertionError):
        allocator.free(slots[:P])


# ---- slots of requests -----------------------------------------------------------------------------------------------

# What a request's new tokens may be made of: the rest of its last page, whole pages, the beginning of a page.
PIECES = {
    "rest": ((P - 2, P, 5 * P - 3), [5 * P - 2, 5 * P - 1]),
    "pages": ((0, 2 * P, -1), _page(1) + _page(2)),
    "beginning": ((P, P + 3, 6 * P - 1), _page(1)[:3]),
    "rest, pages": ((P - 2, 2 * P, 5 * P - 3), [5 * P - 2, 5 * P - 1, *_page(1)]),
    "rest, beginning": ((P - 2, P + 3, 5 * P - 3), [5 * P - 2, 5 * P - 1, *_page(1)[:3]]),
    "pages, beginning": ((P, 2 * P + 3, 6 * P - 1), _page(1) + _page(2)[:3]),
    "rest, pages, beginning": ((P - 2, 2 * P + 3, 5 * P - 3), [5 * P - 2, 5 * P - 1, *_page(1), *_page(2)[:3]]),
    "nothing": ((P, P, 6 * P - 1), []),
}  # fmt: skip


@pytest.mark.parametrize("request_, slots", PIECES.values(), ids=PIECES)
def test_extend_fills_the_last_page_then_takes_new_ones(request_, slots):
    assert _extend(_allocator(), [request_]).tolist() == slots


def test_extend_of_several_requests():
    allocator = _allocator()
    slots = _extend(allocator, [(0, P, -1), (3, 7, 6 * P + 2), (0, P + 1, -1)]).tolist()
    assert slots == _page(1) + [6 * P + 3 + i for i in range(4)] + _page(2) + _page(3)[:1]
    assert allocator.available_size() == (PAGES - 3) * P


def test_decode_takes_a_page_only_at_its_border():
    allocator = _allocator()
    assert _decode(allocator, [(P, 6 * P - 2), (5, 7 * P + 3)]).tolist() == [6 * P - 1, 7 * P + 4]
    assert allocator.available_size() == PAGES * P
    assert _decode(allocator, [(P + 1, 6 * P - 1), (5, 7 * P + 3), (2 * P + 1, 8 * P - 1)]).tolist() == [P, 7 * P + 4, 2 * P]
    assert allocator.available_size() == (PAGES - 2) * P


def test_out_of_pages_gives_none_and_takes_nothing():
    allocator = _allocator(pages=1)
    assert _extend(allocator, [(0, P + 1, -1)]) is None
    assert _decode(allocator, [(P + 1, 6 * P - 1), (2 * P + 1, 7 * P - 1)]) is None
    assert allocator.available_size() == P


@given(st.lists(st.one_of(st.tuples(st.just("extend"), st.lists(st.integers(1, 3 * P), min_size=1, max_size=3)), st.just("decode")), max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_request_has_consecutive_slots_in_pages_of_its_own(steps):
    """Against the plain rule: token t of a request lies at offset t mod 64 of its page t // 64, and no page has two owners."""
    allocator = _allocator(pages=24)
    rows: list[list[int]] = []
    for step in steps:
        if step == "decode":
            slots = _decode(allocator, [(len(row) + 1, row[-1]) for row in rows]) if rows else None
            new = [[slot] for slot in slots.tolist()] if slots is not None else []
        else:
            rows += [[] for _ in step[1]]
            requests = [(len(row), len(row) + n, row[-1] if row else -1) for row, n in zip(rows[-len(step[1]) :], step[1])]
            slots = _extend(allocator, requests)
            if slots is None:
                del rows[-len(step[1]) :]
            new = [[]] * (len(rows) - len(step[1])) + [part.tolist() for part in slots.split(step[1])] if slots is not None else []
        for row, slots_of_row in zip(rows, new):
            row += slots_of_row
        pages = [[row[start] // P for start in range(0, len(row), P)] for row in rows]
        assert all(row == [pages[i][t // P] * P + t % P for t in range(len(row))] for i, row in enumerate(rows))
        owned = [page for of_row in pages for page in of_row]
        assert sorted(owned + allocator.free_pages.tolist()) == list(range(1, 25))


# ---- the pool --------------------------------------------------------------------------------------------------------


def _pool(head_dim: int, v_head_dim: int):
    from sgl_hq.config import HQConfig
    from sgl_hq.pool.two_tier_pool import HQTokenToKVPool

    with patch.dict(os.environ, HQConfig("bf16", "insert", 0.5).to_env()):
        return HQTokenToKVPool(
            PAGES * P, page_size=P, dtype=torch.bfloat16, head_num=2, head_dim=head_dim, v_head_dim=v_head_dim, layer_num=2, device="cpu",
            enable_memory_saver=False,
        )  # fmt: skip


@pytest.mark.parametrize("head_dim, v_head_dim", [(16, 16), (16, 8), (8, 16)])
def test_kv_goes_to_its_slots_and_nowhere_else(head_dim, v_head_dim):
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool = _pool(head_dim, v_head_dim)
    buffers = [*pool.k_buffer, *pool.v_buffer]
    assert [tuple(b.shape) for b in buffers] == [((PAGES + 1) * P, 2, dim) for dim in (head_dim, head_dim, v_head_dim, v_head_dim)]
    for buffer in buffers:
        buffer.copy_(torch.randn(buffer.shape))
    pages = pool.packed.write(pool.k_buffer, pool.v_buffer, torch.arange(P, 3 * P), starts_sequence=True).pages
    before, packed = [b.clone() for b in buffers], [r.clone() for r in pool.packed.records]
    loc = torch.randperm(PAGES * P)[:16] + P  # packed from and not
    k, v = torch.randn(16, 2, head_dim).bfloat16(), torch.randn(16, 2, v_head_dim).bfloat16()

    pool.set_kv_buffer(SimpleNamespace(layer_id=1), KVWriteLoc(loc), k, v)

    assert torch.equal(pool.k_buffer[1][loc], k) and torch.equal(pool.v_buffer[1][loc], v)
    pool.k_buffer[1][loc], pool.v_buffer[1][loc] = before[1][loc], before[3][loc]
    assert all(map(torch.equal, buffers, before)), "other slots or layers were written"
    assert all(map(torch.equal, pool.packed.records, packed)), "packed pages were written"
    got_k, got_v = pool.packed.read(1, torch.tensor(pages), pages[0])
    assert torch.equal(got_k.transpose(0, 1), before[1][P : 3 * P]) and torch.equal(got_v.transpose(0, 1), before[3][P : 3 * P])


def test_the_size_is_that_of_both_tiers():
    pool = _pool(16, 8)
    k_bytes, v_bytes = pool.get_kv_size_bytes()
    dense = sum(b.nbytes for b in (*pool.k_buffer, *pool.v_buffer))
    assert k_bytes + v_bytes == dense + pool.packed.bytes_allocated and pool.packed.bytes_allocated > 0


def test_movers_that_take_ids_for_slots_are_refused():
    pool, ids = _pool(16, 16), torch.arange(P)
    for move in (lambda: pool.move_kv_cache(ids, ids), lambda: pool.get_cpu_copy(ids), lambda: pool.load_cpu_copy(None, ids)):
        with pytest.raises(NotImplementedError, match="sgl_hq"):
            move()
