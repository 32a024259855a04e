"""Bookkeeping of both tiers against SGLang's real RadixCache, allocator and ReqToTokenPool, as a hypothesis machine.

After every step: SGLang's leak invariant over the dense tier, books of the packed tier, and the K values every live
request would read, through (packed run, dense rest) with the rows below the packed run left stale, are its own tokens'.
At every drop: the leaf is unlocked, and eviction drops a dense one only if the packed tier has no room for any of it.

Tests with one scenario each drive the same machine by hand.
"""

from __future__ import annotations

import zlib
from array import array
from types import SimpleNamespace

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from poison import poison_dense
from two_tier_parts import ROWS, P, build

from sgl_hq.config import AUTO
from sgl_hq.kernels.page_codec import NonFiniteError
from sgl_hq.pool.packing import Packing

DENSE_PAGES, MAX_TOKENS = 24, 12 * P
SINKS = "sink4-K8V8"  # a format whose sequences need sink slots as well


class Request:
    """The fields of SGLang's Req that the cache reads."""

    extra_key, priority = None, 0

    def __init__(self, rid: str, tokens: list[int]):
        self.rid, self.tokens = rid, tokens
        self.origin_input_ids, self.output_ids = array("q", tokens), array("q")
        self.req_pool_idx, self.kv_committed_len, self.inflight_middle_chunks = None, 0, 0
        self._hashes: list[int] = []  # of each prefix

    @property
    def kv(self):
        return SimpleNamespace(kv_allocated_len=self.allocated)

    def values(self, start: int, end: int) -> torch.Tensor:
        """A bf16 bit pattern per position that depends on the whole prefix, as real K does; finite, exact in bf16."""
        for token in self.tokens[len(self._hashes) : end]:
            self._hashes.append(zlib.crc32(token.to_bytes(4, "little"), self._hashes[-1] if self._hashes else 0))
        below_inf = [h & 0x3FFF for h in self._hashes[start:end]]  # 0x7f80
        return torch.tensor(below_inf, dtype=torch.int16).view(torch.bfloat16)

    def get_fill_ids(self):
        return (self.origin_input_ids + self.output_ids)[: self.filled]


class TwoTierMachine(RuleBasedStateMachine):
    @initialize(
        pack=st.sampled_from(["shared", "insert", "pressure"]), packed_fraction=st.sampled_from([0.2, 0.5, 0.7, AUTO]),
        fmt=st.sampled_from(["bf16", SINKS]),
    )
    def start(self, pack, packed_fraction, fmt="bf16"):
        from sgl_hq.audit.audit import Audit

        dense_pages = DENSE_PAGES - (packed_fraction == AUTO)  # of six slabs, one page is SGLang's padding
        self.dense_tokens = dense_pages * P
        self.pool, self.allocator, self.rows, self.tree = build(fmt, pack, dense_pages, packed_fraction, layers=1)
        self.audit = Audit(self.tree, self.allocator, self.rows.req_to_token, every=1, raises=True)
        self.live: list[Request] = []
        self.serial = 0
        self.evicting = False
        self.tree._drop, self.drop = self._checked_drop, self.tree._drop
        self.pool.pack_pages, self.pack_pages = self._recorded_pack, self.pool.pack_pages
        self.pool.move_packed_pages, self.move_packed_pages = self._recorded_move, self.pool.move_packed_pages
        self.tree._emptied_slab, self.emptied_slab = self._checked_emptying, self.tree._emptied_slab
        self.packed_values: dict[int, torch.Tensor] = {}  # page -> K of its tokens when it was packed
        self.refuse_next = False
        poison_dense(self.allocator)  # what eviction and packing leave behind must never be read

    # ---- what the scheduler does -------------------------------------------------------------------------------

    @precondition(lambda self: len(self.live) < ROWS)
    @rule(
        family=st.integers(0, 3), shared_pages=st.integers(0, 6), own=st.integers(1, 2 * P), salt=st.integers(0, 3),
        chunk=st.integers(1, 12 * P), refuse=st.integers(0, 7),
    )  # fmt: skip
    def arrive(self, family, shared_pages, own, salt, chunk=MAX_TOKENS, refuse=0):
        """Prefill a request, or its first `chunk` new tokens: match, lock, allocate, write, insert (SGLang's PrefillAdder,
        alloc_for_extend, result). refuse: at 7, the format cannot hold the values of the next node that is packed."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        self.refuse_next |= refuse == 7
        tokens = prompt(family, shared_pages, own, salt)
        self.serial += 1
        req = Request(f"r{self.serial}", tokens)
        match = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens[:-1]))))
        req.prefix_indices, req.last_node = match.device_indices, match.last_device_node
        prefix = req.cache_protected_len = len(req.prefix_indices)
        end = min(len(tokens), prefix + chunk)
        self.tree.inc_lock_ref(req.last_node)
        if not self._fits(-(-end // P) - prefix // P):
            self.tree.dec_lock_ref(req.last_node)
            return
        self.rows.alloc([req])
        req.allocated = req.filled = prefix
        self.live.append(req)
        self._prefill(req, prefix, end)

    @precondition(lambda self: any(map(_unfinished, self.live)))
    @rule(pick=st.integers(0, 99), chunk=st.integers(1, 4 * P))
    def next_chunk(self, pick, chunk):
        """More of a prompt whose first chunk is in the tree; SGLang takes the rest back when no page is left."""
        unfinished = [req for req in self.live if _unfinished(req)]
        req = unfinished[pick % len(unfinished)]
        end = min(len(req.tokens), req.allocated + chunk)
        if not self._fits(-(-end // P) - -(-req.allocated // P)):
            return self._leave(req, insert=False)
        self._prefill(req, req.allocated, end)

    @rule(family=st.integers(0, 3), shared_pages=st.integers(1, 6), own=st.integers(1, 2 * P), salt=st.integers(0, 3))
    def wait(self, family, shared_pages, own, salt):
        """A request in the queue looks its prefix up: splits nodes and makes them recently used, without a lock."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", prompt(family, shared_pages, own, salt)))))

    @precondition(lambda self: not all(map(_unfinished, self.live)))
    @rule(pick=st.integers(0, 99), steps=st.integers(1, P), token=st.integers(0, 3))
    def decode(self, pick, steps, token):
        decoding = [req for req in self.live if not _unfinished(req)]
        req = decoding[pick % len(decoding)]
        for _ in range(steps):
            if req.allocated >= MAX_TOKENS:
                return
            if req.allocated % P == 0 and not self._fits(1):
                return self._leave(req, insert=False)  # retraction
            seq_lens = torch.tensor([req.allocated + 1])
            row = self.rows.req_to_token[req.req_pool_idx]
            slots = self.allocator.alloc_decode(seq_lens, seq_lens, row[req.allocated - 1 : req.allocated].long())
            assert slots is not None, "a page that eviction was to free is not there"
            row[req.allocated] = slots[0]
            req.output_ids.append(9000 + token)
            req.tokens = req.tokens + [9000 + token]
            req.allocated = req.filled = req.allocated + 1
            self._write(req, req.allocated - 1, req.allocated)
            self.tree.batch_done()

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99), insert=st.booleans())
    def leave(self, pick, insert):
        """Finish (insert) or abort and retraction (no insert)."""
        self._leave(self.live[pick % len(self.live)], insert)

    @rule(pages=st.integers(1, 10))
    def evict(self, pages):
        evictable = self.tree.evictable_size()
        before = self.allocator.available_size()
        self._evict(pages * P)
        assert self.allocator.available_size() - before >= min(pages * P, evictable), "evict gave less than promised"

    @rule()
    def idle(self):
        self.tree.settle()

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
        assert total == self.dense_tokens, (total, self.dense_tokens)
        free = self.allocator.free_pages.tolist()
        assert len(set(free)) == len(free)
        self.tree.check_books()
        assert len(self.tree.live) == len(self.live)
        self.audit.step()  # a false alarm would end a server that is in order

    @invariant()
    def leaves_go_in_the_order_of_a_sort(self):
        for order, packed in ((self.tree._dense_order, False), (self.tree._packed_order, True)):
            keys = [self.tree._eviction_key(n) for n in self.tree.evictable_leaves if (n.id in self.tree._pages_of) == packed]
            first = order.first()
            assert (first and first[0]) == min(keys, default=None), "eviction would begin with another leaf"

    @invariant()
    def every_request_reads_its_own_tokens(self):
        for req in self.live:
            run = self.tree.live.run(req.req_pool_idx)
            parts = []
            for segment in run.segments:
                parts.append(self._packed_k(segment.pages))
            slots = self.rows.req_to_token[req.req_pool_idx, run.tokens : req.allocated].long()
            parts.append(self.pool.k_buffer[0][slots, 0, 0])
            assert torch.equal(torch.cat(parts), req.values(0, req.allocated)), f"{req.rid} reads foreign KV"

    def teardown(self):
        if not hasattr(self, "live"):
            return
        while self.live:
            self._leave(self.live[-1], insert=True)
        self.no_token_is_lost()
        assert self.tree.protected_size() == 0 and len(self.rows.free_slots) == ROWS

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _fits(self, pages: int) -> bool:
        if self.allocator.available_size() + self.tree.evictable_size() < pages * P:
            return False
        short = pages * P - self.allocator.available_size()
        if short > 0:
            self._evict(short)
        return True

    def _evict(self, tokens: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.evicting = True
        self.tree.evict(EvictParams(num_tokens=tokens))
        self.evicting = False

    def _checked_drop(self, leaf) -> None:
        """Stands before the tree's `_drop`."""
        assert leaf.lock_ref == 0 and not leaf.children, "a node in use is dropped"
        unpackable = any(n.id in self.tree._unpackable for n in self.tree._path(leaf))
        if self.evicting and leaf.id not in self.tree._pages_of and not unpackable:
            tier = self.pool.packed
            begins = next(n for n in self.tree._path(leaf) if n.id not in self.tree._pages_of).parent is self.tree.root_node
            if not (begins and tier.sink_tokens and not tier.sinks_free):
                assert not tier.pages_free, "a dense page is dropped although a packed one is free"
                older = [n for n in self.tree.evictable_leaves if n.id in self.tree._pages_of and n.last_access_time < leaf.last_access_time]
                assert not older, "a dense page is dropped although a packed one is older"
        self.drop(leaf)

    def _recorded_pack(self, dense_slots, starts_sequence) -> Packing:
        """Stands before the pool's `pack_pages`. The pages hold NaN for as long as a kernel may take to write them."""
        packing = self.pack_pages(dense_slots, starts_sequence)
        values = self.pool.k_buffer[0][dense_slots, 0, 0].clone().split(P)
        self.packed_values.update(zip(packing.pages, values, strict=True))
        refused, self.refuse_next = self.refuse_next, False
        where, records = torch.tensor(packing.pages), self.pool.packed.records[0]
        written = records[where].clone()
        records[where] = 0xFF

        def error():
            if refused:
                return NonFiniteError("NaN")
            records[where] = written
            return packing.error()

        return Packing(packing.pages, error)

    def _checked_emptying(self, free):
        """Stands before the tree's `_emptied_slab`, which may copy pages that nobody reads."""
        values = lambda: [self.pool.k_buffer[0][n.value, 0, 0].clone() for n in self.tree.dense_nodes()]
        before = values()
        found = self.emptied_slab(free)
        assert all(map(torch.equal, before, values())), "a cached page has other bytes after it was copied"
        return found

    def _recorded_move(self, sources, targets) -> None:
        """Stands before the pool's `move_packed_pages`."""
        self.move_packed_pages(sources, targets)
        values = [self.packed_values[source] for source in sources]
        self.packed_values.update(dict.fromkeys(sources, torch.full((P,), float("nan"))) | dict(zip(targets, values, strict=True)))

    def _packed_k(self, pages) -> torch.Tensor:
        """What attention reads from packed pages; of a lossy format, what was packed into them."""
        if self.pool.config.format != "bf16":
            return torch.cat([self.packed_values[page] for page in pages])
        k, _ = self.pool.packed.read(0, torch.tensor(pages), pages[0])
        return k[0, :, 0].clone()  # `read` reuses its buffers

    def _prefill(self, req, prefix, end):
        """One chunk: [prefix, end) of its tokens."""
        one = lambda x: torch.tensor([x])
        last = req.prefix_indices[-1:] if prefix else torch.tensor([-1])
        slots = self.allocator.alloc_extend(one(prefix), one(prefix), one(end), one(end), last, end - prefix)
        assert slots is not None, "pages that eviction was to free are not there"
        row = self.rows.req_to_token[req.req_pool_idx]
        row[:prefix] = req.prefix_indices.int()  # becomes stale when the prefix is packed: must be harmless
        row[prefix:end] = slots.int()
        req.allocated = req.filled = end
        self.tree.on_rows_allocated([req])
        self._write(req, prefix, end)
        self.tree.cache_unfinished_req(req, chunked=_unfinished(req))
        self.tree.batch_done()

    def _write(self, req, start, end):
        slots = self.rows.req_to_token[req.req_pool_idx, start:end].long()
        assert (slots < self.pool.packed_base).all(), "a packed id would be written as a dense slot"
        self.pool.k_buffer[0][slots, 0, 0] = req.values(start, end)
        self.pool.k_buffer[0][slots, 0, 1:] = 0
        self.pool.v_buffer[0][slots] = 0  # no one reads it here, but a lossy format packs no NaN

    def _leave(self, req, insert):
        self.tree.cache_finished_req(req, is_insert=insert, kv_len_to_handle=req.allocated)
        self.tree.live.unregister(req)
        self.rows.free(req)
        self.live.remove(req)


def prompt(family: int, shared_pages: int, own: int, salt: int) -> list[int]:
    """Tokens of a prompt: whole pages that its family shares, then tokens of its own."""
    return [family * 1000 + i for i in range(shared_pages * P)] + [5000 + salt * 200 + i for i in range(own)]


def _unfinished(req: Request) -> bool:
    """A chunk of its prompt is still to come."""
    return req.allocated < len(req.tokens)
