"""An audit of sound books finds nothing; every planted fault is found, and named by the check whose business it is."""

from __future__ import annotations

import logging
from array import array
from types import SimpleNamespace

import pytest
import torch

from sgl_hq.page_format import PAGE_TOKENS as P

DENSE_PAGES, HEADS, DIM, LAYERS = 24, 2, 64, 3


class Server:
    """Pool, allocator and tree of a scheduler: family 0 packed in two nodes, family 1 dense, one request with a page of its own."""

    def __init__(self, raises: bool = False):
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams

        from sgl_hq.audit.audit import Audit
        from sgl_hq.cache.packing_radix_cache import PackingRadixCache
        from sgl_hq.platform_cpu.allocator import CPUPagedAllocator
        from sgl_hq.pool.two_tier_pool import HQTokenToKVPool

        size = DENSE_PAGES * P
        self.pool = HQTokenToKVPool(
            size, page_size=P, dtype=torch.bfloat16, head_num=HEADS, head_dim=DIM, layer_num=LAYERS, device="cpu", enable_memory_saver=False
        )
        generator = torch.Generator().manual_seed(0)
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        self.allocator = CPUPagedAllocator(size, page_size=P, dtype=torch.bfloat16, device="cpu", kvcache=self.pool, need_sort=False)
        params = CacheInitParams(disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=self.allocator, page_size=P)
        self.tree = PackingRadixCache(params, self.pool, "shared")
        self.req_to_token = torch.zeros(4, 8 * P, dtype=torch.int32)
        self.audit = Audit(self.tree, self.allocator, self.req_to_token, every=2, raises=raises)
        self.packed = self.insert(0, 2)
        self.tree.pack(self.packed)
        self.tree.settle()
        self.below = self.insert(0, 5)
        self.tree.pack(self.below)
        self.tree.settle()
        self.dense = self.insert(1, 3)
        self.live()

    def insert(self, family: int, pages: int):
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key = RadixKey(array("q", [family * 1000 + i for i in range(pages * P)]))
        cached = self.tree.match_prefix(MatchPrefixParams(key=key)).device_indices
        value = torch.cat([cached, self.allocator.alloc(pages * P - len(cached))])
        return self.tree.insert(InsertParams(key=key, value=value)).last_device_node

    def live(self):
        """A request behind the packed prefix; its last page is full but for one token."""
        self.tree.inc_lock_ref(self.below)
        row, start, end = 1, 5 * P, 7 * P - 1
        self.req_to_token[row, start : 7 * P] = self.allocator.alloc(2 * P).int()
        kv = SimpleNamespace(kv_allocated_len=end)
        self.request = SimpleNamespace(rid="r", req_pool_idx=row, last_node=self.below, cache_protected_len=start, kv=kv)
        self.tree.live.register(self.request)


@pytest.fixture(params=["hq6", "bf16", "lossless"])
def server(request, monkeypatch):
    monkeypatch.setenv("SGLANG_HQ_FORMAT", request.param)
    monkeypatch.setenv("SGLANG_HQ_PACKED_FRACTION", "0.5")
    return Server()


@pytest.fixture
def quick(monkeypatch):
    """One format, where the fault is not in the bytes."""
    monkeypatch.setenv("SGLANG_HQ_FORMAT", "hq6")
    monkeypatch.setenv("SGLANG_HQ_PACKED_FRACTION", "0.5")
    return Server()


def _drop_packed(tree):
    for node, _ in reversed(tree.packed_nodes()):
        tree._drop(node)


def test_sound_books_pass_through_packing_splitting_dropping_and_flushing(server):
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    assert server.audit.run() == {}
    server.tree.dec_lock_ref(server.below)
    server.tree.live.unregister(server.request)
    server.allocator.free(server.req_to_token[1, 5 * P : 7 * P].long())
    assert server.audit.run() == {}
    server.insert(0, 3)  # splits the lower packed node
    server.tree.evict(EvictParams(num_tokens=2 * P))
    _drop_packed(server.tree)
    assert server.pool.packed.pages_used == 0 and server.audit.run() == {}
    server.tree.pack(server.insert(2, 4))
    server.tree.reset()
    server.allocator.clear()
    assert server.audit.run() == {} and server.audit.describe()["audits"] == 4


@pytest.mark.parametrize("where", ["record", "sink"])
@pytest.mark.parametrize("dropped", ["no", "leaf", "flush"])
def test_a_flipped_byte_is_found_before_its_page_is_gone(server, where, dropped):
    tier, page = server.pool.packed, server.tree._pages_of[server.packed.id][0]
    if where == "sink" and not tier.sink_tokens:
        pytest.skip("the format keeps no sinks")
    assert server.audit.run() == {}
    arena, slot = (tier.records, page) if where == "record" else (tier.sink_slots, tier.sink_slot(page))
    arena[LAYERS - 1][slot, 1, 7] ^= 4
    if dropped == "leaf":
        server.tree.dec_lock_ref(server.below)
        server.tree.live.unregister(server.request)
        server.allocator.free(server.req_to_token[1, 5 * P : 7 * P].long())
        _drop_packed(server.tree)
    elif dropped == "flush":
        server.tree.live.unregister(server.request)
        server.tree.reset()
        server.allocator.clear()
    found = server.audit.run()
    assert list(found) == ["checksum"] and f"[{page}]" in found["checksum"][0]


def test_samples_reach_every_page_in_turn(quick):
    pages = [page for _, pages in quick.tree.packed_nodes() for page in pages]
    quick.tree.checksums._taken[pages[4]] += 1
    found = []
    for _ in range(3):
        quick.tree.checksums.check_sample(pages, 2)
        found.append(quick.tree.checksums.differing(quick.tree.checksums.pending().tolist()))
    assert found == [[], [], [pages[4]]]


def _free_twice(s):
    s.pool.packed._free_pages.append(s.tree._pages_of[s.packed.id][1])


def _lose_packed(s):
    s.pool.packed._free_pages.pop()


def _two_nodes(s):
    s.tree._pages_of[s.below.id][0] = s.tree._pages_of[s.packed.id][0]


def _lose_sink(s):
    s.pool.packed._sink_of_page[s.tree._pages_of[s.packed.id][0]] = -1


def _dense_freed_twice(s):
    s.allocator.free_pages = torch.cat([s.allocator.free_pages, s.allocator.free_pages[:1]])


def _dense_freed_in_tree(s):
    s.allocator.free_segment(s.dense.value, start_pos=0)


def _dense_in_two_nodes(s):
    other = s.insert(2, 1)
    s.allocator.free_segment(other.value, start_pos=0)
    other.value = s.dense.value[:P].clone()


def _dense_lost(s):
    s.allocator.alloc(P)


def _private_freed(s):
    s.allocator.free_segment(s.req_to_token[1, 6 * P : 7 * P].long(), start_pos=0)


def _private_is_shared(s):
    s.allocator.free_segment(s.req_to_token[1, 6 * P : 7 * P].long(), start_pos=0)
    s.req_to_token[1, 6 * P : 7 * P] = s.dense.value[:P].int()


def _both_forms(s):
    s.packed.value = s.dense.value[: 2 * P].clone()


def _dense_names_packed(s):
    s.allocator.free_segment(s.dense.value, start_pos=0)
    s.dense.value = s.pool.packed_token_ids([0, 1, 2])


def _packed_below_dense(s):
    pages = s.tree._pages_of.pop(s.packed.id)
    s.pool.packed.free(pages)
    s.packed.value = s.allocator.alloc(2 * P)
    s.tree.protected_size_ += 2 * P
    s.tree.packed_live_pages -= 2


def _sizes_drift(s):
    s.tree.evictable_size_ += P


def _live_pages_drift(s):
    s.tree.packed_live_pages -= 1


def _request_outside_the_tree(s):
    s.request.last_node = SimpleNamespace(id=10**6)


FAULTS = [
    (_free_twice, {"packed_pages": "packed pages both free and in the tree: {packed1}"}),
    (_lose_packed, {"packed_pages": "packed pages lost, neither free nor in the tree"}),
    (_two_nodes, {"packed_pages": "packed pages twice in the tree: {packed0}", "node_values": "nodes name other token ids"}),
    (_lose_sink, {"packed_pages": "sink slots lost", "checksum": "[{packed0}]"}),
    (_dense_freed_twice, {"dense_pages": "dense pages twice free"}),
    (_dense_freed_in_tree, {"dense_pages": "dense pages both free and in the tree"}),
    (_dense_in_two_nodes, {"dense_pages": "dense pages twice in the tree: {dense0}"}),
    (_dense_lost, {"dense_pages": "dense pages lost, held by nobody"}),
    (_private_freed, {"dense_pages": "dense pages both free and of a request alone"}),
    (_private_is_shared, {"dense_pages": "dense pages both in the tree and of a request alone: {dense0}"}),
    (_both_forms, {"node_values": "nodes name other token ids"}),
    (_dense_names_packed, {"dense_pages": "3 page ids in the tree are not of the dense tier"}),
    (_packed_below_dense, {"tree": "is packed below dense node {packed_node}"}),
    (_sizes_drift, {"tree": "evictable and protected dense tokens and live packed pages are"}),
    (_live_pages_drift, {"tree": "evictable and protected dense tokens and live packed pages are"}),
    (_request_outside_the_tree, {"tree": "request r ends in node 1000000"}),
]


@pytest.mark.parametrize("fault, expected", FAULTS, ids=[fault.__name__.strip("_") for fault, _ in FAULTS])
def test_a_planted_fault_is_found(quick, fault, expected):
    assert quick.audit.run() == {}
    pages, dense = quick.tree._pages_of[quick.packed.id], int(quick.dense.value[0]) // P
    names = {"packed0": pages[0], "packed1": pages[1], "dense0": dense, "packed_node": quick.packed.id}
    fault(quick)
    found = quick.audit.run()
    assert found.keys() == expected.keys(), found
    for check, text in expected.items():
        assert any(text.format(**names) in sentence for sentence in found[check]), found[check]
    counted = quick.audit.describe()["findings"]
    assert {check: n for check, n in counted.items() if n} == {check: len(found[check]) for check in found}


def test_a_finding_is_logged_at_the_nth_batch_and_not_again_within_a_minute(quick, caplog):
    _dense_lost(quick)
    with caplog.at_level(logging.ERROR):
        quick.audit.step()
        assert not caplog.records
        for _ in range(5):
            quick.audit.step()
    assert len(caplog.records) == 1 and "sgl_hq audit 1, dense_pages: dense pages lost" in caplog.text
    assert quick.audit.describe()["audits"] == 3 and quick.audit.describe()["findings"]["dense_pages"] == 3


def test_a_finding_is_raised_where_asked_for(monkeypatch):
    from sgl_hq.audit.audit import AuditError

    monkeypatch.setenv("SGLANG_HQ_FORMAT", "hq6")
    monkeypatch.setenv("SGLANG_HQ_PACKED_FRACTION", "0.5")
    server = Server(raises=True)
    _free_twice(server)
    server.audit.step()
    with pytest.raises(AuditError, match="packed_pages: packed pages both free and in the tree.*--hq-audit-raise"):
        server.audit.step()


def test_mode_exact_has_books_too(monkeypatch):
    monkeypatch.setenv("SGLANG_HQ_FORMAT", "exact")
    monkeypatch.setattr("sgl_hq.cache.packing_radix_cache.PackingRadixCache.pack", lambda self, node: None)
    server = Server()
    assert server.audit.run() == {}
    _dense_freed_twice(server)
    assert list(server.audit.run()) == ["dense_pages"]
