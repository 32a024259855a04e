"""The bookkeeping machine (tests/two_tier_machine.py) with random steps, and with mistakes planted that it must find."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from sgl_hq.audit.audit import AuditError
from sgl_hq.config import AUTO
from sgl_hq.kernels.page_codec import EscapeOverflowError, NonFiniteError
from sgl_hq.page_format import PAGE_TOKENS
from two_tier_machine import SINKS, TwoTierMachine

TestTwoTierMachine = TwoTierMachine.TestCase
TestTwoTierMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


class ElasticMachine(TwoTierMachine):
    """Memory moves between the tiers in every run."""

    @initialize(pack=st.sampled_from(["shared", "insert", "pressure"]), fmt=st.sampled_from(["bf16", SINKS]))
    def start(self, pack, fmt):
        TwoTierMachine.start(self, pack, AUTO, fmt)


TestElasticMachine = ElasticMachine.TestCase
TestElasticMachine.settings = TestTwoTierMachine.settings


# ---- the machine must be able to fail: each mutant breaks one rule of the bookkeeping ---------------------------------


def _keeps_dense_pages(monkeypatch, tree_class):
    original = tree_class._become_packed

    def become_packed(self, node, pages):
        allocator = self.token_to_kv_pool_allocator
        self.token_to_kv_pool_allocator = SimpleNamespace(free_segment=lambda *a, **k: None)
        try:
            original(self, node, pages)
        finally:
            self.token_to_kv_pool_allocator = allocator

    monkeypatch.setattr(tree_class, "_become_packed", become_packed)


def _counts_packed_as_dense(monkeypatch, tree_class):
    monkeypatch.setattr(tree_class, "_dense_tokens", lambda self, node: len(node.key))


def _forgets_epoch(monkeypatch, tree_class):
    original = tree_class._finish

    def finish(self, item):
        epoch = self.epoch
        freed = original(self, item)
        self.epoch = epoch
        return freed

    monkeypatch.setattr(tree_class, "_finish", finish)


def _splits_without_pages(monkeypatch, tree_class):
    from sglang.srt.mem_cache.radix_cache import RadixCache

    def split(self, key, child, at):
        upper = RadixCache._split_node(self, key, child, at)
        if child.id in self._pages_of:
            self._pages_of[upper.id] = self._pages_of[child.id]
        return upper

    monkeypatch.setattr(tree_class, "_split_node", split)


def _drops_without_freeing(monkeypatch, tree_class):
    original = tree_class._drop

    def drop(self, leaf):
        if leaf.id in self._pages_of:
            return self._delete_leaf(leaf)
        return original(self, leaf)

    monkeypatch.setattr(tree_class, "_drop", drop)


def _packs_out_of_order(monkeypatch, tree_class):
    def run(self, node):
        from sgl_hq.records import PackedRun, Segment

        packed = [n for n in self._path(node) if n.id in self._pages_of]
        segments = tuple(Segment(n.id, tuple(reversed(self._pages_of[n.id]))) for n in packed)
        return PackedRun(segments, sum(len(n.key) for n in packed))

    monkeypatch.setattr(tree_class, "packed_run", run)


def _frees_dense_pages_twice(monkeypatch, tree_class):
    original = tree_class._become_packed

    def become_packed(self, node, pages):
        dense_slots = node.value
        original(self, node, pages)
        self.token_to_kv_pool_allocator.free_segment(dense_slots, start_pos=0)

    monkeypatch.setattr(tree_class, "_become_packed", become_packed)


def _reads_what_the_device_has_not_written(monkeypatch, tree_class):
    original = tree_class._finish

    def finish(self, item):
        return original(self, item._replace(packing=item.packing._replace(error=lambda: None)))

    monkeypatch.setattr(tree_class, "_finish", finish)


def _packs_below_what_cannot_be_packed(monkeypatch, tree_class):
    original = tree_class._finish

    def finish(self, item):
        top = item.nodes[0]
        parent, top.parent = top.parent, self.root_node
        try:
            return original(self, item)
        finally:
            top.parent = parent

    monkeypatch.setattr(tree_class, "_finish", finish)


def _keeps_pages_that_could_not_be_packed(monkeypatch, tree_class):
    from sgl_hq.pool.packed_tier import PackedTier

    original = tree_class._finish

    def finish(self, item):
        if item.packing.error() is None:
            return original(self, item)
        with monkeypatch.context() as patch:
            patch.setattr(PackedTier, "free", lambda self, pages: None)
            return original(self, item)

    monkeypatch.setattr(tree_class, "_finish", finish)


def _flushes_while_the_device_writes(monkeypatch, tree_class):
    original = tree_class.reset

    def reset(self):
        queue, self._under_way._queue = self._under_way._queue, type(self._under_way._queue)()
        original(self)
        self._under_way._queue = queue

    monkeypatch.setattr(tree_class, "reset", reset)


def _promises_what_is_being_packed(monkeypatch, tree_class):
    monkeypatch.setattr(tree_class, "settle", lambda self: 0)


def _drops_dense_without_freeing(monkeypatch, tree_class):
    original = tree_class._drop

    def drop(self, leaf):
        if leaf.id not in self._pages_of:
            return self._delete_leaf(leaf)
        return original(self, leaf)

    monkeypatch.setattr(tree_class, "_drop", drop)


def _keeps_sinks(monkeypatch, tree_class):
    from sgl_hq.pool.packed_tier import NO_SINK, PackedTier

    original = PackedTier.free

    def free(self, pages):
        for page in pages:
            self._sink_of_page[page] = NO_SINK
        original(self, pages)

    monkeypatch.setattr(PackedTier, "free", free)


def _flush_keeps_packed_pages(monkeypatch, tree_class):
    from sgl_hq.pool.packed_tier import PackedTier

    original = PackedTier.clear
    monkeypatch.setattr(PackedTier, "clear", lambda self: None if hasattr(self, "_free_pages") else original(self))


def _takes_locked_for_evictable(monkeypatch, tree_class):
    original = tree_class._become_packed

    def become_packed(self, node, pages):
        locks, node.lock_ref = node.lock_ref, 0
        try:
            original(self, node, pages)
        finally:
            node.lock_ref = locks

    monkeypatch.setattr(tree_class, "_become_packed", become_packed)


def _forgets_leaves_on_unlock(monkeypatch, tree_class):
    original = tree_class.dec_lock_ref

    def dec_lock_ref(self, node, params=None):
        self._update_leaf_status = lambda n: None
        try:
            return original(self, node, params)
        finally:
            del self._update_leaf_status

    monkeypatch.setattr(tree_class, "dec_lock_ref", dec_lock_ref)


def _drops_locked_packed_leaves(monkeypatch, tree_class):
    from sgl_hq.cache.eviction_order import EvictionOrder

    monkeypatch.setattr(EvictionOrder, "_may_go", lambda self, node: not node.children and self._belongs(node))


def _changes_rooms(monkeypatch, tree_class, change):
    original = tree_class._room_for
    monkeypatch.setattr(tree_class, "_room_for", lambda self, node, *rest: change(original(self, node, *rest), node))


def _drops_parents_before_children(monkeypatch, tree_class):
    _changes_rooms(monkeypatch, tree_class, lambda room, node: room._replace(victims=room.victims[::-1]))


def _no_packed_page_gives_way(monkeypatch, tree_class):
    original = tree_class._room_for
    first = (float("-inf"), -1)
    monkeypatch.setattr(tree_class, "_room_for", lambda self, node, key: original(self, node, first))


def _counts_a_victim_too_many(monkeypatch, tree_class):
    _changes_rooms(monkeypatch, tree_class, lambda room, node: room._replace(victims=room.victims[:-1]))


def _drops_instead_of_demoting(monkeypatch, tree_class):
    monkeypatch.setattr(tree_class, "_demote", lambda self, leaf, wanted: 0)


def _demotes_below_dense_nodes(monkeypatch, tree_class):
    original = tree_class._demote

    def demote(self, leaf, wanted):
        path = self._path
        self._path = lambda node: path(node)[-1:] if node is leaf else path(node)
        try:
            return original(self, leaf, wanted)
        finally:
            del self._path

    monkeypatch.setattr(tree_class, "_demote", demote)


def _demotes_whole_nodes_only(monkeypatch, tree_class):
    from sgl_hq.cache.packed_room import Room

    _changes_rooms(monkeypatch, tree_class, lambda room, node: room if room.pages * PAGE_TOKENS == len(node.key) else Room(0, []))


def _promises_more_than_it_frees(monkeypatch, tree_class):
    original = tree_class._demote
    monkeypatch.setattr(tree_class, "_demote", lambda self, *args: 2 * original(self, *args))


def _forgets_what_it_has_just_packed(monkeypatch, tree_class):
    monkeypatch.setattr(tree_class, "_enter_order", lambda self, n: n in self.evictable_leaves and n.id not in self._pages_of and self._dense_order.add(n))


def _forgets_leaves_that_stay_dense(monkeypatch, tree_class):
    from sgl_hq.cache.eviction_order import EvictionOrder

    original, add = tree_class.evict, EvictionOrder.add

    def evict(self, params):
        self._dense_order.add = lambda node: node is last[-1] or add(self._dense_order, node)
        pop, last = self._dense_order.pop, [None]
        self._dense_order.pop = lambda: last.append(pop()) or last[-1]
        try:
            return original(self, params)
        finally:
            del self._dense_order.add, self._dense_order.pop

    monkeypatch.setattr(tree_class, "evict", evict)


def _orders_by_keys_of_old(monkeypatch, tree_class):
    from sgl_hq.cache.eviction_order import EvictionOrder

    original = EvictionOrder.first

    def first(self):
        self._key_of, key_of = dict((node, key) for key, node in self._heap).__getitem__, self._key_of
        try:
            return original(self)
        finally:
            self._key_of = key_of

    monkeypatch.setattr(EvictionOrder, "first", first)


def _keeps_victims_out_of_the_order(monkeypatch, tree_class):
    from sgl_hq.cache.packed_room import _Victims

    monkeypatch.setattr(_Victims, "put_back", lambda self: None)


def _lends_a_slab_with_a_page_in_use(monkeypatch, tree_class):
    monkeypatch.setattr(np, "bincount", lambda ids, minlength, real=np.bincount: (lambda n: n + (n == 3))(real(ids, minlength=minlength)))


def _copies_nothing_out_of_a_slab(monkeypatch, tree_class):
    from sgl_hq.pool.two_tier_pool import HQTokenToKVPool

    monkeypatch.setattr(HQTokenToKVPool, "move_dense_pages", lambda self, sources, targets: None)


def _counts_lent_pages_as_free(monkeypatch, tree_class):
    original = tree_class._set_free_pages

    def keep(self, pages):
        before = self.token_to_kv_pool_allocator.free_pages
        original(self, pages)
        if len(pages) < len(before):
            self.token_to_kv_pool_allocator.free_pages = before

    monkeypatch.setattr(tree_class, "_set_free_pages", keep)


def _forgets_the_pages_of_a_slab_that_comes_back(monkeypatch, tree_class):
    monkeypatch.setattr(tree_class, "_give_back", lambda self: self._pool.give_back(self._memory.lent[0]))


def _gives_a_slab_back_twice(monkeypatch, tree_class):
    original = tree_class._give_back

    def give_back(self):
        lent = list(self._memory.lent)
        original(self)
        self._memory.lent = lent

    monkeypatch.setattr(tree_class, "_give_back", give_back)


def _leaves_a_node_its_old_pages(monkeypatch, tree_class):
    def hold(self, node, pages, real=tree_class._hold_pages):
        if node.id not in self._pages_of:
            real(self, node, pages)

    monkeypatch.setattr(tree_class, "_hold_pages", hold)


def _leaves_a_node_its_old_ids(monkeypatch, tree_class):
    def hold(self, node, pages, real=tree_class._hold_pages):
        value, was_packed = node.value, node.id in self._pages_of
        real(self, node, pages)
        if was_packed:
            node.value = value

    monkeypatch.setattr(tree_class, "_hold_pages", hold)


def _moves_pages_without_telling_their_readers(monkeypatch, tree_class):
    def reclaim(self, real=tree_class._reclaim):
        epoch = self.epoch
        tokens = real(self)
        self.epoch = epoch
        return tokens

    monkeypatch.setattr(tree_class, "_reclaim", reclaim)


def _moves_books_without_bytes(monkeypatch, tree_class):
    from sgl_hq.pool.packed_tier import PackedTier

    def move(self, sources, targets, real=PackedTier.move):
        self.records, records = [layer.clone() for layer in self.records], self.records
        real(self, sources, targets)
        self.records = records

    monkeypatch.setattr(PackedTier, "move", move)


def _promises_all_that_is_lent(monkeypatch, tree_class):
    monkeypatch.setattr(tree_class, "_pinned_tokens", property(lambda self: 0))


def _never_reclaims(monkeypatch, tree_class):
    monkeypatch.setattr(tree_class, "_reclaim", lambda self: 0)


FREE = [_keeps_dense_pages, _frees_dense_pages_twice, _drops_without_freeing, _drops_dense_without_freeing, _keeps_sinks, _flush_keeps_packed_pages]
LOCK = [_counts_packed_as_dense, _takes_locked_for_evictable, _forgets_leaves_on_unlock, _drops_locked_packed_leaves]
SPLIT = [_splits_without_pages, _forgets_epoch, _packs_out_of_order]
ROOM = [_drops_parents_before_children, _no_packed_page_gives_way, _counts_a_victim_too_many]
ORDER = [_forgets_what_it_has_just_packed, _forgets_leaves_that_stay_dense, _orders_by_keys_of_old, _keeps_victims_out_of_the_order]
LATE = [
    _reads_what_the_device_has_not_written, _packs_below_what_cannot_be_packed,
    _keeps_pages_that_could_not_be_packed, _flushes_while_the_device_writes, _promises_what_is_being_packed,
]  # fmt: skip
DEMOTE = [_drops_instead_of_demoting, _demotes_below_dense_nodes, _demotes_whole_nodes_only, _promises_more_than_it_frees]


LEND = [_lends_a_slab_with_a_page_in_use, _copies_nothing_out_of_a_slab, _counts_lent_pages_as_free, _promises_all_that_is_lent]
RECLAIM = [_forgets_the_pages_of_a_slab_that_comes_back, _gives_a_slab_back_twice, _never_reclaims]
MOVE = [
    _leaves_a_node_its_old_pages, _leaves_a_node_its_old_ids, _moves_pages_without_telling_their_readers, _moves_books_without_bytes,
]  # fmt: skip


@pytest.mark.parametrize("mutate", [*FREE, *LOCK, *SPLIT, *ROOM, *ORDER, *LATE, *DEMOTE])
def test_the_machine_catches_a_mutant(mutate, monkeypatch):
    _caught(mutate, monkeypatch, TwoTierMachine)


@pytest.mark.parametrize("mutate", [*LEND, *RECLAIM, *MOVE])
def test_the_elastic_machine_catches_a_mutant(mutate, monkeypatch):
    _caught(mutate, monkeypatch, ElasticMachine)


def _caught(mutate, monkeypatch, machine) -> None:
    from hypothesis import Phase
    from hypothesis.internal.conjecture.providers import HypothesisProvider
    from hypothesis.stateful import run_state_machine_as_test

    from sgl_hq.cache.packing_radix_cache import PackingRadixCache

    mutate(monkeypatch, PackingRadixCache)
    # Hypothesis draws some integers from those written in the modules that are loaded: other ones when another test ran before.
    monkeypatch.setattr(HypothesisProvider, "_maybe_draw_constant", lambda *_args, **_options: None)
    quick = settings(  # the same examples every time: finding the mutant must not be a matter of luck
        max_examples=400, stateful_step_count=40, deadline=None, database=None, derandomize=True, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises((AssertionError, AuditError, ExceptionGroup)):
        run_state_machine_as_test(machine, settings=quick)


@pytest.mark.parametrize("reason", [NonFiniteError("NaN"), EscapeOverflowError("too many")], ids=repr)
def test_values_the_format_cannot_hold_stay_dense(monkeypatch, reason):
    from sgl_hq.cache.packing_radix_cache import PackingRadixCache

    machine = TwoTierMachine()
    machine.start(pack="insert", packed_fraction=0.5)

    pack = machine.pool.pack_pages
    monkeypatch.setattr(machine.pool, "pack_pages", lambda *args: pack(*args)._replace(error=lambda: reason))
    machine.arrive(family=0, shared_pages=3, own=5, salt=0)
    machine.idle()
    assert isinstance(machine.tree, PackingRadixCache) and machine.tree.counters.refused["unpackable"] == 1
    assert machine.pool.packed.pages_used == 0
    machine.every_request_reads_its_own_tokens()
    machine.teardown()
