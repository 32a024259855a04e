"""The boundary between the tiers moves: one scenario each, on the real tree and pools. A slab is four of 24 dense pages here."""

from __future__ import annotations

import pytest

from sgl_hq.config import AUTO
from two_tier_machine import DENSE_PAGES, MAX_TOKENS, SINKS, P, TwoTierMachine

SLAB = 4


def _machine(pack="insert", fmt="bf16") -> TwoTierMachine:
    machine = TwoTierMachine()
    machine.start(pack=pack, packed_fraction=AUTO, fmt=fmt)
    assert (machine.pool.memory.slabs.pages, machine.pool.packed.pages_total) == (SLAB, SLAB if fmt == "bf16" else 6)
    return machine


def _chat(machine, family: int, pages: int, leaves=True):
    """One request with `pages` whole pages of its family; it leaves them in the tree."""
    machine.arrive(family=family, shared_pages=pages, own=1, salt=0, chunk=MAX_TOKENS)
    if leaves:
        machine.leave(pick=len(machine.live) - 1, insert=True)
    machine.idle()


def _is_sound(machine) -> None:
    machine.no_token_is_lost()
    machine.leaves_go_in_the_order_of_a_sort()
    machine.every_request_reads_its_own_tokens()
    machine.teardown()


def test_packing_lends_what_it_needs_and_no_more():
    machine = _machine()
    _chat(machine, 0, pages=4)
    assert machine.pool.memory.lent == []
    _chat(machine, 1, pages=5)
    assert machine.pool.memory.lent == [4, 5] and machine.pool.packed.pages_total == 3 * SLAB  # 9 pages, the highest slabs first
    assert machine.tree.evictable_size() == 2 * SLAB * P and machine.allocator.available_size() == (DENSE_PAGES - 1 - 2 * SLAB) * P
    assert machine.tree.counters.slabs_lent == 2 and not any(machine.tree.counters.refused.values())
    _is_sound(machine)


def test_cold_pages_are_copied_together_when_no_slab_is_free():
    """One dense page of every slab is cached, so there are 17 free pages and no free slab."""
    machine = _machine("shared")
    for first in (1, 4, 8, 12, 16, 20):
        free = machine.allocator.free_pages.tolist()
        machine.allocator.free_pages = machine.allocator.free_pages.new_tensor([first, *(page for page in free if page != first)])
        _chat(machine, family=first, pages=1)
    held = {int(node.value[0]) // P // SLAB for node in machine.tree.dense_nodes()}
    assert held == set(range(6)) and machine.allocator.available_size() == 17 * P
    assert machine.tree._lend()
    pages = [int(node.value[0]) // P for node in machine.tree.dense_nodes()]
    assert machine.pool.memory.lent == [1] and len(set(pages)) == 6 and 2 in pages, "the copy is in the lowest free page"
    _is_sound(machine)


def test_slabs_come_back_under_pressure_and_the_least_used_pages_are_lost():
    machine = _machine()
    for family, pages in ((0, 4), (1, 5), (2, 3)):
        _chat(machine, family, pages)
    assert len(machine.pool.memory.lent) == 2
    machine.evict(pages=DENSE_PAGES - 1 - 2 * SLAB + 1)  # evict is to free more than is cold in the dense tier: one slab
    counters = machine.tree.counters
    assert (len(machine.pool.memory.lent), counters.slabs_reclaimed) == (0, 2)
    assert [n.key.token_ids[0] for n, _ in machine.tree.packed_nodes()] == [2000], "the youngest is kept, in the packed tier's own slab"
    _is_sound(machine)


def test_what_running_requests_read_is_moved_and_read_on():
    machine = _machine()
    _chat(machine, 0, pages=5)
    _chat(machine, 1, pages=3, leaves=False)
    tail = machine.tree.live.run(machine.live[0].req_pool_idx).segments[0].pages
    assert min(tail) >= SLAB, "its pages are in a lent slab"
    machine.evict(pages=1)
    assert machine.pool.memory.lent == [] and machine.tree.live.run(machine.live[0].req_pool_idx).segments[0].pages != tail
    machine.decode(pick=0, steps=P, token=1)
    _is_sound(machine)


def test_what_is_read_by_running_requests_is_not_promised():
    machine = _machine()
    _chat(machine, 0, pages=5, leaves=False)
    _chat(machine, 1, pages=6, leaves=False)
    lent, live = machine.tree.lent_tokens, machine.tree.packed_live_pages
    assert (lent, live) == (2 * SLAB * P, 11)
    assert (machine.tree.evictable_size(), machine.tree.protected_size()) == (0, lent)
    before = machine.allocator.available_size()
    machine.evict(pages=2)
    assert machine.allocator.available_size() == before and machine.pool.memory.lent
    machine.leave(pick=0, insert=True)
    assert machine.tree.evictable_size() == (2 * SLAB - 6) * P
    _is_sound(machine)


def test_a_sixteenth_of_the_dense_tier_is_not_lent():
    """Two pages, while running requests hold two: five slabs are free, four are lent."""
    machine = _machine("shared")
    _chat(machine, 99, pages=2, leaves=False)
    for family in range(40):
        for _ in range(2):
            _chat(machine, family, pages=1)
    assert len(machine.pool.memory.lent) == 4 and machine.tree.counters.pages_dropped, "the packed tier is at its largest"
    _is_sound(machine)


def test_eviction_makes_room_for_what_it_packs_before_the_packed_tier_is_full():
    """Prompts used once: none of their pages needs to be dropped while memory can move."""
    machine = _machine("shared", SINKS)
    for family in range(3):
        _chat(machine, family, pages=5)
    machine.evict(pages=5)
    counters = machine.tree.counters
    assert machine.pool.packed.sizes.packed_pages > 10 > machine.pool.memory.slabs.packed_pages(0)
    assert (counters.slabs_lent, counters.pages_demoted, counters.pages_dropped, counters.dense_pages_dropped) == (1, 10, 0, 0)
    _is_sound(machine)


@pytest.mark.parametrize("pack", ["insert", "shared"])
def test_a_flush_gives_everything_back(pack):
    machine = _machine(pack)
    for family in range(3):
        _chat(machine, family, pages=6)
    machine.evict(pages=6)
    machine.flush()
    assert machine.pool.memory.lent == [] and machine.allocator.available_size() == (DENSE_PAGES - 1) * P
    _is_sound(machine)
