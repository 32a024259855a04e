"""Between the beginning of a packing and its end: one scenario each, on the real tree and pools. The device is as slow as it may be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sgl_hq.cache.packings_under_way import BATCHES_UNTIL_DONE
from sgl_hq.config import AUTO
from sgl_hq.kernels.page_codec import NonFiniteError
from two_tier_machine import DENSE_PAGES, MAX_TOKENS, P, TwoTierMachine

PROMPT = {"shared_pages": 4, "own": 1, "salt": 0, "chunk": MAX_TOKENS}


@pytest.fixture
def machine() -> TwoTierMachine:
    machine = TwoTierMachine()
    machine.start(pack="insert", packed_fraction=0.5)
    return machine


def _is_sound(machine) -> None:
    machine.no_token_is_lost()
    machine.every_request_reads_its_own_tokens()
    machine.teardown()


def _packed(machine) -> list[int]:
    """Pages of each packed node, from the root down."""
    return [len(pages) for _, pages in machine.tree.packed_nodes()]


def test_a_node_stays_dense_until_the_device_is_done(machine):
    machine.arrive(family=0, **PROMPT)  # one batch
    for _ in range(BATCHES_UNTIL_DONE - 1):
        assert _packed(machine) == [] and machine.tree.protected_size() == 4 * P
        assert len(machine.tree.pages_under_way) == machine.pool.packed.pages_used == 4
        machine.no_token_is_lost()
        machine.every_request_reads_its_own_tokens()
        machine.decode(pick=0, steps=1, token=1)
    assert _packed(machine) == [4] and machine.tree.protected_size() == 0 and not machine.tree.pages_under_way
    assert machine.allocator.available_size() == (DENSE_PAGES - 1) * P, "but for the page of its answer"
    _is_sound(machine)


def test_no_token_is_stated_in_both_tiers(machine):
    """`bytes_used` counts what is being written, tokens and pages do not: an A/B would see more tokens than there are."""
    from sgl_hq import server_state
    from sgl_hq.metrics.bins import NO_GROUPS

    backend = SimpleNamespace(packed_tokens_read=0, packed_tokens_attended=0, workspace_bytes=0, group_requests=NO_GROUPS)
    sources = server_state.Sources(machine.tree, machine.allocator, backend, {})
    machine.arrive(family=0, **PROMPT)
    stated = []
    for _ in range(2):
        now = server_state.figures(sources, None)
        packed, dense = now["packed"], now["dense"]
        states = {state: packed[f"pages_{state}"] for state in ("free", "writing", "live", "cached")}
        assert sum(states.values()) == packed["pages_total"] and packed["bytes_used"] == 4 * packed["page_bytes"]
        assert dense["pages_live"] + packed["pages_used"] == 5, "the prompt has five pages"
        stated.append((states["writing"], packed["pages_used"], now["packed_token_fraction"]))
        machine.idle()
    assert stated == [(4, 0, 0.0), (0, 4, 0.8)]
    _is_sound(machine)


def test_a_node_that_is_split_meanwhile_is_packed_in_both_halves(machine):
    machine.arrive(family=0, **PROMPT)
    before = machine.tree.pages_under_way
    machine.wait(family=0, shared_pages=1, own=1, salt=1)
    assert _packed(machine) == [] and machine.tree.pages_under_way == before
    machine.idle()
    assert [list(pages) for _, pages in machine.tree.packed_nodes()] == [before[:1], before[1:]]
    _is_sound(machine)


def test_a_parent_that_turns_out_unpackable_keeps_its_children_dense(machine, monkeypatch):
    machine.refuse_next = True
    machine.arrive(family=0, **PROMPT | {"chunk": 2 * P})
    machine.next_chunk(pick=0, chunk=MAX_TOKENS)
    assert len(machine.tree.pages_under_way) == 4, "the rest is being packed below the first two pages"
    machine.idle()
    assert _packed(machine) == [] and machine.pool.packed.pages_used == 0
    assert machine.tree.counters.refused["unpackable"] == 1 and machine.tree.counters.nodes_packed == 0
    monkeypatch.setattr(machine.pool, "pack_pages", None)  # neither is tried again
    machine.arrive(family=0, **PROMPT)
    _is_sound(machine)


def test_both_halves_of_what_turns_out_unpackable_are_known_to_be(machine):
    machine.refuse_next = True
    machine.arrive(family=0, **PROMPT)
    machine.wait(family=0, shared_pages=1, own=1, salt=1)
    machine.idle()
    assert {len(n.key) // P for n in machine.tree.dense_nodes() if n.id in machine.tree._unpackable} == {1, 3}
    _is_sound(machine)


def test_eviction_frees_what_is_being_packed_first(machine):
    machine.arrive(family=0, **PROMPT)
    machine.leave(pick=0, insert=True)
    machine.evict(pages=4)
    assert _packed(machine) == [4] and machine.tree.counters.pages_demoted == 0
    assert machine.allocator.available_size() == DENSE_PAGES * P
    _is_sound(machine)


def test_what_is_being_packed_is_lent_before_packed_pages_are_dropped():
    """7 of 23 dense pages come free. Without them no slab may be lent, and family 0, which fits, would be lost."""
    machine = TwoTierMachine()
    machine.start(pack="insert", packed_fraction=AUTO)
    machine.arrive(family=0, **PROMPT | {"shared_pages": 2})
    machine.leave(pick=0, insert=True)
    machine.idle()
    machine.arrive(family=1, **PROMPT | {"shared_pages": 7})
    assert len(machine.tree.pages_under_way) == 7
    machine.arrive(family=2, **PROMPT)
    assert _packed(machine) == [2, 7] and len(machine.tree.pages_under_way) == 4
    assert machine.tree.counters.pages_dropped == 0
    _is_sound(machine)


def test_nothing_is_packed_below_what_turns_out_unpackable_while_a_slab_is_lent():
    machine = TwoTierMachine()
    machine.start(pack="insert", packed_fraction=AUTO)
    machine.refuse_next = True
    machine.arrive(family=1, **PROMPT | {"shared_pages": 11, "chunk": 4 * P})
    assert len(machine.tree.pages_under_way) == 4
    machine.next_chunk(pick=0, chunk=MAX_TOKENS)
    assert _packed(machine) == [] and not machine.tree.pages_under_way
    _is_sound(machine)


def test_a_flush_waits_for_the_device_and_keeps_nothing(machine):
    waited, pack = [], machine.pool.pack_pages

    def pack_pages(*args):
        packing = pack(*args)
        return packing._replace(error=lambda: waited.append(1) or NonFiniteError("not asked after a flush"))

    machine.pool.pack_pages = pack_pages
    machine.arrive(family=0, **PROMPT)
    machine.leave(pick=0, insert=True)
    machine.flush()
    assert waited and machine.pool.packed.pages_used == 0 and machine.tree.nodes() == []
    assert not any(machine.tree.counters.refused.values())
    _is_sound(machine)
