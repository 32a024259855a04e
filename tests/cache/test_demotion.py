"""What happens to cold pages when the dense tier is short: one scenario each, on the real tree and pools."""

from __future__ import annotations

import pytest

from sgl_hq.kernels.page_codec import NonFiniteError
from two_tier_machine import MAX_TOKENS, SINKS, P, TwoTierMachine


def _machine(pack="shared", packed_fraction=0.5, fmt="bf16") -> TwoTierMachine:
    machine = TwoTierMachine()
    machine.start(pack=pack, packed_fraction=packed_fraction, fmt=fmt)
    return machine


def _chat(machine, family: int, pages: int, leaves=True):
    """One request with `pages` whole pages of its family; it leaves them in the tree."""
    machine.arrive(family=family, shared_pages=pages, own=1, salt=0, chunk=MAX_TOKENS)
    if leaves:
        machine.leave(pick=len(machine.live) - 1, insert=True)
    machine.idle()


def _cached_pages(machine, family: int) -> tuple[int, int]:
    """Pages of the family's prefix that are (packed, dense) in the tree."""
    packed = dense = 0
    stack = [n for n in machine.tree.root_node.children.values() if n.key.token_ids[0] == family * 1000]
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        if node.id in machine.tree._pages_of:
            packed += len(node.key) // P
        else:
            dense += len(node.key) // P
    return packed, dense


def _is_sound(machine) -> None:
    machine.no_token_is_lost()
    machine.every_request_reads_its_own_tokens()
    machine.teardown()


@pytest.mark.parametrize("pack", ["shared", "insert", "pressure"])
def test_a_page_used_once_is_packed_instead_of_dropped(pack):
    machine = _machine(pack)
    _chat(machine, family=0, pages=5)
    machine.evict(pages=10)
    assert _cached_pages(machine, 0) == (5, 0)
    counters = machine.tree.counters
    assert (counters.pages_demoted, counters.dense_pages_dropped) == (0 if pack == "insert" else 5, 0)
    _is_sound(machine)


def test_a_packed_leaf_gives_way_to_a_younger_dense_one():
    machine = _machine(packed_fraction=0.2)  # 6 packed pages
    _chat(machine, family=0, pages=4)
    machine.evict(pages=4)
    _chat(machine, family=1, pages=5)
    machine.evict(pages=5)
    assert _cached_pages(machine, 0) == (0, 0) and _cached_pages(machine, 1) == (5, 0)
    assert (machine.tree.counters.pages_dropped, machine.tree.counters.dense_pages_dropped) == (4, 0)
    _is_sound(machine)


def test_a_packed_leaf_does_not_give_way_to_an_older_dense_one():
    machine = _machine(packed_fraction=0.2)
    _chat(machine, family=1, pages=6)
    machine.evict(pages=6)
    _chat(machine, family=0, pages=5)
    machine.wait(family=1, shared_pages=6, own=1, salt=0)  # the packed pages are asked for once more
    machine.evict(pages=5)
    assert _cached_pages(machine, 0) == (0, 0) and _cached_pages(machine, 1) == (6, 0)
    assert (machine.tree.counters.pages_dropped, machine.tree.counters.dense_pages_dropped) == (0, 5)
    _is_sound(machine)


def test_a_leaf_packed_a_moment_ago_gives_way_as_well():
    """Two leaves of one eviction: the packed tier is full again when the second, younger one comes."""
    machine = _machine(packed_fraction=0.2)
    _chat(machine, family=0, pages=4)
    machine.evict(pages=4)
    _chat(machine, family=1, pages=5)
    _chat(machine, family=2, pages=3)
    machine.evict(pages=8)
    assert [_cached_pages(machine, family) for family in (0, 1, 2)] == [(0, 0), (0, 0), (3, 0)]
    assert (machine.tree.counters.pages_dropped, machine.tree.counters.dense_pages_dropped) == (9, 0)
    _is_sound(machine)


def test_of_a_node_that_does_not_fit_the_first_pages_stay():
    machine = _machine(packed_fraction=0.2)
    machine.arrive(family=2, shared_pages=6, own=2 * P, salt=0, chunk=MAX_TOKENS)
    machine.leave(pick=0, insert=True)
    machine.evict(pages=8)
    assert _cached_pages(machine, 2) == (6, 0)
    assert (machine.tree.counters.pages_demoted, machine.tree.counters.dense_pages_dropped) == (6, 2)
    assert machine.tree.counters.refused["no_pages"] == 1, "it is said why two pages were lost"
    _is_sound(machine)


def test_a_part_that_was_split_off_is_as_old_as_its_node():
    """Else the first pages of a cold prefix would outlive prefixes used since."""
    machine = _machine(packed_fraction=0.2)
    _chat(machine, family=0, pages=7)
    _chat(machine, family=1, pages=2)
    machine.evict(pages=7)
    assert _cached_pages(machine, 0) == (6, 0)
    machine.evict(pages=2)
    assert _cached_pages(machine, 0) == (0, 0) and _cached_pages(machine, 1) == (2, 0)
    _is_sound(machine)


def test_eviction_stops_when_enough_is_free():
    machine = _machine()
    _chat(machine, family=0, pages=3)
    _chat(machine, family=1, pages=3)
    machine.evict(pages=2)
    assert _cached_pages(machine, 0) == (3, 0) and _cached_pages(machine, 1) == (0, 3)
    _is_sound(machine)


def test_of_a_path_only_what_is_needed_is_packed():
    machine = _machine("pressure")
    for salt in (0, 1):
        machine.arrive(family=0, shared_pages=4, own=2 * P, salt=salt, chunk=MAX_TOKENS)
        machine.leave(pick=0, insert=True)
    machine.evict(pages=1)
    assert _cached_pages(machine, 0) == (4, 4) and machine.tree.counters.pages_demoted == 4
    oldest = min((n for n in machine.tree.dense_nodes()), key=machine.tree._eviction_key)
    machine.evict(pages=1)
    assert _cached_pages(machine, 0) == (6, 2) and machine.tree.packed_run(oldest).tokens == 6 * P
    _is_sound(machine)


def test_an_ancestor_that_a_running_request_reads_is_packed_and_read_on():
    machine = _machine("pressure")
    machine.arrive(family=0, shared_pages=4, own=2 * P, salt=0, chunk=MAX_TOKENS)
    machine.arrive(family=0, shared_pages=4, own=2 * P, salt=1, chunk=MAX_TOKENS)
    machine.leave(pick=0, insert=True)
    machine.evict(pages=6)
    assert _cached_pages(machine, 0) == (6, 2)  # the running request's own pages stay dense
    assert machine.tree.live.run(machine.live[0].req_pool_idx).tokens == 4 * P
    machine.decode(pick=0, steps=P, token=1)
    _is_sound(machine)


def test_nothing_is_dropped_for_a_node_that_cannot_be_packed_whole():
    """`pack` moves whole nodes: 7 pages never fit into 6, so the 4 that are there must not be lost on the way."""
    machine = _machine(packed_fraction=0.2)
    _chat(machine, family=0, pages=4)
    machine.evict(pages=4)
    machine.arrive(family=1, shared_pages=6, own=P + 1, salt=0, chunk=MAX_TOKENS)
    node = machine.live[0].last_node
    assert len(node.key) == 7 * P and not machine.tree.pack(node)
    assert _cached_pages(machine, 0) == (4, 0) and machine.tree.counters.refused["too_large"] == 1
    _is_sound(machine)


def test_nothing_is_dropped_when_only_a_sink_is_missing_and_none_comes_free():
    machine = _machine(packed_fraction=0.2, fmt=SINKS)
    tier = machine.pool.packed
    for _ in range(tier.sinks_free):  # every sink is held by a running request
        _chat(machine, family=machine.serial, pages=1)
        machine.evict(pages=1)
        machine.arrive(family=machine.serial - 1, shared_pages=1, own=1, salt=0, chunk=MAX_TOKENS)
    assert not tier.sinks_free and tier.pages_free
    before = tier.pages_used
    _chat(machine, family=9, pages=2)
    machine.evict(pages=2)
    assert tier.pages_used == before and machine.tree.counters.pages_dropped == 0
    assert _cached_pages(machine, 9) == (0, 0)
    _is_sound(machine)


def test_values_the_format_cannot_hold_are_dropped_as_before():
    machine = _machine()
    _chat(machine, family=0, pages=3)

    machine.refuse_next = True
    machine.tree._drop = machine.drop  # without the machine's check: there is room, and still nothing can be packed
    machine.evict(pages=3)
    assert _cached_pages(machine, 0) == (0, 0)
    assert (machine.tree.counters.refused["unpackable"], machine.tree.counters.dense_pages_dropped) == (1, 3)
    _is_sound(machine)


def test_below_values_that_the_format_cannot_hold_nothing_is_tried_again(monkeypatch):
    machine = _machine("pressure")
    for salt in (0, 1):
        machine.arrive(family=0, shared_pages=4, own=2 * P, salt=salt, chunk=MAX_TOKENS)
        machine.leave(pick=0, insert=True)
    tried, pack = [], machine.pool.pack_pages

    def refuse(*args):
        tried.append(1)
        return pack(*args)._replace(error=lambda: NonFiniteError("NaN"))

    monkeypatch.setattr(machine.pool, "pack_pages", refuse)
    machine.tree._drop = machine.drop
    machine.evict(pages=8)
    assert len(tried) == machine.tree.counters.refused["unpackable"] == 1
    assert _cached_pages(machine, 0) == (0, 0)
    _is_sound(machine)


def test_pages_are_demoted_least_recently_used_first():
    machine = _machine(packed_fraction=0.2)
    for family in (2, 0, 1):
        _chat(machine, family, pages=3)
    machine.wait(family=2, shared_pages=3, own=1, salt=0)
    machine.evict(pages=4)
    assert [_cached_pages(machine, family) for family in (0, 1, 2)] == [(3, 0), (3, 0), (0, 3)]
    _is_sound(machine)
