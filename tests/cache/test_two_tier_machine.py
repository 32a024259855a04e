"""Bookkeeping of both tiers against SGLang's real RadixCache, allocator and ReqToTokenPool, as a hypothesis machine.

After every step: SGLang's leak invariant over the dense tier, books of the packed tier, and the K values every live
request would read, through (packed run, dense rest) with the rows below the packed run left stale, are its own tokens'.
"""

from __future__ import annotations

import os
from array import array
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sgl_hq.config import HQConfig
from sgl_hq.kernels.page_codec import EscapeOverflowError, NonFiniteError
from sgl_hq.page_format import PAGE_TOKENS as P

ROWS, DENSE_PAGES, MAX_TOKENS = 8, 24, 12 * P
HEADS, DIM = 1, 8


class Request:
    """The fields of SGLang's Req that the cache reads."""

    extra_key, priority = None, 0

    def __init__(self, rid: str, tokens: list[int]):
        self.rid, self.tokens = rid, tokens
        self.origin_input_ids, self.output_ids = array("q", tokens), array("q")
        self.req_pool_idx, self.kv_committed_len, self.inflight_middle_chunks = None, 0, 0

    @property
    def kv(self):
        return SimpleNamespace(kv_allocated_len=self.allocated)

    def get_fill_ids(self):
        return (self.origin_input_ids + self.output_ids)[: self.filled]


class TwoTierMachine(RuleBasedStateMachine):
    @initialize(pack=st.sampled_from(["shared", "insert", "pressure"]), packed_fraction=st.sampled_from([0.2, 0.5, 0.7]))
    def start(self, pack, packed_fraction):
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

        from sgl_hq.audit.audit import Audit
        from sgl_hq.cache.packing_radix_cache import PackingRadixCache
        from sgl_hq.platform_cpu.allocator import CPUPagedAllocator
        from sgl_hq.pool.two_tier_pool import HQTokenToKVPool

        with patch.dict(os.environ, HQConfig("bf16", pack, packed_fraction).to_env()):
            self.pool = HQTokenToKVPool(
                DENSE_PAGES * P, page_size=P, dtype=torch.bfloat16, head_num=HEADS, head_dim=DIM, layer_num=1, device="cpu",
                enable_memory_saver=False,
            )
        self.allocator = CPUPagedAllocator(
            DENSE_PAGES * P, page_size=P, dtype=torch.bfloat16, device="cpu", kvcache=self.pool, need_sort=False
        )
        self.rows = ReqToTokenPool(ROWS, MAX_TOKENS + P, "cpu", False)
        self.tree = PackingRadixCache(
            CacheInitParams(disable=False, req_to_token_pool=self.rows, token_to_kv_pool_allocator=self.allocator, page_size=P),
            self.pool, pack,
        )
        self.audit = Audit(self.tree, self.allocator, self.rows.req_to_token, every=1, raises=True)
        self.live: list[Request] = []
        self.serial = 0
        # What eviction and packing leave behind must never be read: fill it with NaN (dense slots are poisoned when freed).
        stock_release = self.allocator._release_page_ids

        def poison_and_release(*page_ids):
            for pages in page_ids:
                slots = (pages[:, None] * P + torch.arange(P)).flatten()
                self.pool.k_buffer[0][slots] = float("nan")
            stock_release(*page_ids)

        self.allocator._release_page_ids = poison_and_release

    # ---- what the scheduler does -------------------------------------------------------------------------------

    @precondition(lambda self: len(self.live) < ROWS)
    @rule(family=st.integers(0, 3), shared_pages=st.integers(0, 6), own=st.integers(1, 2 * P), salt=st.integers(0, 3))
    def arrive(self, family, shared_pages, own, salt):
        """Prefill a request: match, lock, allocate, write, insert (SGLang's PrefillAdder, alloc_for_extend, result)."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        tokens = [family * 1000 + i for i in range(shared_pages * P)] + [5000 + salt * 200 + i for i in range(own)]
        self.serial += 1
        req = Request(f"r{self.serial}", tokens)
        match = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens[:-1]))))
        req.prefix_indices, req.last_node = match.device_indices, match.last_device_node
        prefix = req.cache_protected_len = len(req.prefix_indices)
        self.tree.inc_lock_ref(req.last_node)
        if not self._fits(-(-len(tokens) // P) - prefix // P):
            self.tree.dec_lock_ref(req.last_node)
            return
        self.rows.alloc([req])
        self._extend(req, prefix, len(tokens))
        self.tree.on_rows_allocated([req])
        self._write(req, prefix, len(tokens))
        self.tree.cache_unfinished_req(req)
        self.live.append(req)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99), steps=st.integers(1, P), token=st.integers(0, 3))
    def decode(self, pick, steps, token):
        req = self.live[pick % len(self.live)]
        for _ in range(steps):
            if req.allocated >= MAX_TOKENS:
                return
            if req.allocated % P == 0 and not self._fits(1):
                return self._leave(req, insert=False)  # retraction
            seq_lens = torch.tensor([req.allocated + 1])
            row = self.rows.req_to_token[req.req_pool_idx]
            row[req.allocated] = self.allocator.alloc_decode(seq_lens, seq_lens, row[req.allocated - 1 : req.allocated].long())[0]
            req.output_ids.append(9000 + token)
            req.tokens = req.tokens + [9000 + token]
            req.allocated = req.filled = req.allocated + 1
            self._write(req, req.allocated - 1, req.allocated)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99), insert=st.booleans())
    def leave(self, pick, insert):
        """Finish (insert) or abort and retraction (no insert)."""
        self._leave(self.live[pick % len(self.live)], insert)

    @rule(pages=st.integers(1, 10))
    def evict(self, pages):
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        evictable = self.tree.evictable_size()
        before = self.allocator.available_size()
        self.tree.evict(EvictParams(num_tokens=pages * P))
        assert self.allocator.available_size() - before >= min(pages * P, evictable), "evict gave less than promised"

    @precondition(lambda self: not self.live)
    @rule()
    def flush(self):
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()

    # ---- invariants ----------------------------------------------------------------------------------------------

    @invariant()
    def no_token_is_lost(self):
        uncached = sum(-(-r.allocated // P) * P - r.cache_protected_len for r in self.live)
        total = self.allocator.available_size() + self.tree.evictable_size() + self.tree.protected_size() + uncached
        assert total == DENSE_PAGES * P, (total, DENSE_PAGES * P)
        free = self.allocator.free_pages.tolist()
        assert len(set(free)) == len(free)
        self.tree.check_books()
        assert len(self.tree.live) == len(self.live)
        self.audit.step()  # a false alarm would end a server that is in order

    @invariant()
    def every_request_reads_its_own_tokens(self):
        for req in self.live:
            run = self.tree.live.run(req.req_pool_idx)
            parts = []
            for segment in run.segments:
                k, _ = self.pool.packed.read(0, torch.tensor(segment.pages), segment.pages[0])
                parts.append(k[0, :, 0].clone())  # `read` reuses its buffers
            slots = self.rows.req_to_token[req.req_pool_idx, run.tokens : req.allocated].long()
            parts.append(self.pool.k_buffer[0][slots, 0, 0])
            assert torch.equal(torch.cat(parts), _values(req.tokens, 0, req.allocated)), f"{req.rid} reads foreign KV"

    def teardown(self):
        if not hasattr(self, "live"):
            return
        while self.live:
            self._leave(self.live[-1], insert=True)
        self.no_token_is_lost()
        assert self.tree.protected_size() == 0 and len(self.rows.free_slots) == ROWS

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _fits(self, pages: int) -> bool:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        if self.allocator.available_size() + self.tree.evictable_size() < pages * P:
            return False
        short = pages * P - self.allocator.available_size()
        if short > 0:
            self.tree.evict(EvictParams(num_tokens=short))
        return True

    def _extend(self, req, prefix, end):
        one = lambda x: torch.tensor([x])
        last = req.prefix_indices[-1:] if prefix else torch.tensor([-1])
        slots = self.allocator.alloc_extend(one(prefix), one(prefix), one(end), one(end), last, end - prefix)
        row = self.rows.req_to_token[req.req_pool_idx]
        row[:prefix] = req.prefix_indices.int()  # becomes stale when the prefix is packed: must be harmless
        row[prefix:end] = slots.int()
        req.allocated = req.filled = end

    def _write(self, req, start, end):
        slots = self.rows.req_to_token[req.req_pool_idx, start:end].long()
        assert (slots < self.pool.packed_base).all(), "a packed id would be written as a dense slot"
        self.pool.k_buffer[0][slots, 0, 0] = _values(req.tokens, start, end)
        self.pool.k_buffer[0][slots, 0, 1:] = 0

    def _leave(self, req, insert):
        self.tree.cache_finished_req(req, is_insert=insert, kv_len_to_handle=req.allocated)
        self.tree.live.unregister(req)
        self.rows.free(req)
        self.live.remove(req)


def _values(tokens, start, end):
    """A bf16 bit pattern per position that depends on the whole prefix, as real K does; finite, exact in bf16."""
    import zlib

    out, running = [], 0
    for token in tokens[:end]:
        running = zlib.crc32(token.to_bytes(4, "little"), running)
        out.append(running & 0x3FFF)  # below 0x7f80: finite
    return torch.tensor(out[start:end], dtype=torch.int16).view(torch.bfloat16)


TestTwoTierMachine = TwoTierMachine.TestCase
TestTwoTierMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


# ---- the machine must be able to fail: each mutant breaks one rule of the bookkeeping ---------------------------------


def _keeps_dense_pages(monkeypatch, tree_class):
    original = tree_class.pack

    def pack(self, node):
        allocator = self.token_to_kv_pool_allocator
        self.token_to_kv_pool_allocator = SimpleNamespace(free_segment=lambda *a, **k: None)
        try:
            return original(self, node)
        finally:
            self.token_to_kv_pool_allocator = allocator

    monkeypatch.setattr(tree_class, "pack", pack)


def _counts_packed_as_dense(monkeypatch, tree_class):
    monkeypatch.setattr(tree_class, "_dense_tokens", lambda self, node: len(node.key))


def _forgets_epoch(monkeypatch, tree_class):
    original = tree_class.pack

    def pack(self, node):
        epoch = self.epoch
        packed = original(self, node)
        self.epoch = epoch
        return packed

    monkeypatch.setattr(tree_class, "pack", pack)


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


@pytest.mark.parametrize(
    "mutate",
    [_keeps_dense_pages, _counts_packed_as_dense, _forgets_epoch, _splits_without_pages, _drops_without_freeing, _packs_out_of_order],
)
def test_the_machine_catches_a_mutant(mutate, monkeypatch):
    from hypothesis import Phase
    from hypothesis.stateful import run_state_machine_as_test

    from sgl_hq.cache.packing_radix_cache import PackingRadixCache

    mutate(monkeypatch, PackingRadixCache)
    quick = settings(  # the same examples every time: finding the mutant must not be a matter of luck
        max_examples=400, stateful_step_count=40, deadline=None, database=None, derandomize=True, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(TwoTierMachine, settings=quick)


@pytest.mark.parametrize("reason", [NonFiniteError("NaN"), EscapeOverflowError("too many")], ids=repr)
def test_values_the_format_cannot_hold_stay_dense(monkeypatch, reason):
    from sgl_hq.cache.packing_radix_cache import PackingRadixCache

    machine = TwoTierMachine()
    machine.start(pack="insert", packed_fraction=0.5)

    def refuse(*_args, **_kwargs):
        raise reason

    monkeypatch.setattr(machine.pool, "pack_pages", refuse)
    machine.arrive(family=0, shared_pages=3, own=5, salt=0)
    assert isinstance(machine.tree, PackingRadixCache) and machine.tree.counters.refused["unpackable"] == 1
    assert machine.pool.packed.pages_used == 0
    machine.every_request_reads_its_own_tokens()
    machine.teardown()
