"""SGLang's own tests of its radix cache, asked of ours at page size 64.

Re-expressed from sgl-project/sglang, test/registered/unit/mem_cache/test_radix_cache_unit.py (commit 0102aa39), class
TestRadixCache. There slots are made-up numbers; here pools are real and a match is judged by the K and V that its ids give.
Every test runs on a tree that never packs (`exact`), one that may and has not (`dense`), and one where each node is packed when it
is inserted (`packed`).

Left out: TestRadixKey and TestTreeNode (SGLang's classes, unchanged); page sizes other than 64; insert without a value (SGLang
uses token ids as slots then, which no server does); test_memory_allocated (needs CUDA, measures SGLang's own tensors; ours are in
test_metadata.py); block hashes that differ by extra key (they came after 0.5.17, whose hashes are of tokens alone).
"""

from __future__ import annotations

import pytest
import torch
from two_tier_parts import P, Parts, build, radix_key

MODES = ["exact", "dense", "packed"]


def tokens_of(*pages: int) -> list[int]:
    """Whole pages, each of one repeated token."""
    return [page for page in pages for _ in range(P)]


class Tree:
    """The parts, and what was written for each inserted sequence."""

    def __init__(self, mode: str, **params):
        self.mode = mode
        self.parts: Parts = build("exact" if mode == "exact" else "bf16", "insert" if mode == "packed" else "pressure", **params)
        self.cache = self.parts.tree
        self.requests = 0

    def insert(self, tokens: list[int], extra_key: str | None = None) -> tuple[int, torch.Tensor]:
        """As a finished request does; (tokens that were there before, K and V of all its pages)."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        slots = self.parts.write(tokens)
        kv = self.parts.read(slots)
        result = self.cache.insert(InsertParams(key=radix_key(tokens, extra_key), value=slots))
        self.parts.allocator.free_segment(slots[: result.prefix_len], start_pos=0)
        self.requests += 1
        self.cache._use(result.last_device_node, f"r{self.requests}")
        self.cache.settle()
        self.check()
        return result.prefix_len, kv

    def match(self, tokens: list[int], extra_key: str | None = None):
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        result = self.cache.match_prefix(MatchPrefixParams(key=radix_key(tokens, extra_key)))
        self.check()
        return result

    def kv(self, tokens: list[int], extra_key: str | None = None) -> torch.Tensor:
        return self.parts.read(self.match(tokens, extra_key).device_indices)

    def evict(self, tokens: int):
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        result = self.cache.evict(EvictParams(num_tokens=tokens))
        self.check()
        return result

    def check(self) -> None:
        """Books, and SGLang's idle invariant."""
        self.cache.check_books()
        dense = self.cache.evictable_size() + self.cache.protected_size()
        assert self.parts.allocator.available_size() + dense == self.parts.pool.size

    @property
    def dense(self) -> bool:
        return self.mode != "packed"


@pytest.fixture(params=MODES)
def tree(request) -> Tree:
    return Tree(request.param)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("events", [False, True])
def test_init(mode, events):
    cache = Tree(mode, enable_kv_cache_events=events).cache
    assert (cache.page_size, cache.disable, cache.enable_kv_cache_events, cache.device) == (P, False, events, torch.device("cpu"))
    assert len(cache.root_node.key) == 0


def test_reset(tree):
    tree.insert(tokens_of(1, 2, 3))
    assert tree.cache.total_size() > 0
    tree.cache.reset()
    tree.parts.allocator.clear()
    assert (tree.cache.total_size(), tree.cache.evictable_size(), tree.cache.protected_size()) == (0, 0, 0)
    assert tree.parts.pool.packed is None or tree.parts.pool.packed.pages_used == 0
    tree.check()
    assert len(tree.match(tokens_of(1, 2, 3)).device_indices) == 0


def test_insert_and_match(tree):
    prefix_len, kv = tree.insert(tokens_of(1, 2, 3))
    assert prefix_len == 0
    assert tree.cache.total_size() == 3 * P
    assert tree.cache.evictable_size() == (3 * P if tree.dense else 0)
    assert torch.equal(tree.kv(tokens_of(1, 2, 3)), kv)
    assert torch.equal(tree.kv(tokens_of(1, 2)), kv[: 2 * P])


def test_a_disabled_cache_keeps_nothing():
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams

    for mode in MODES:
        cache = Tree(mode, disable=True).cache
        assert cache.insert(InsertParams(key=radix_key(tokens_of(1)), value=torch.arange(P))).prefix_len == 0
        assert cache.total_size() == 0
        assert len(cache.match_prefix(MatchPrefixParams(key=radix_key(tokens_of(1)))).device_indices) == 0


def test_total_size(tree):
    assert tree.cache.total_size() == 0
    tree.insert(tokens_of(1, 2, 3))
    assert tree.cache.total_size() == 3 * P
    tree.insert(tokens_of(4, 5))
    assert tree.cache.total_size() == 5 * P


@pytest.mark.parametrize("mode", MODES)
def test_events_of_stored_pages(mode):
    from sglang.srt.disaggregation.kv_events import BlockStored

    tree = Tree(mode, enable_kv_cache_events=True)
    tree.insert(tokens_of(1, 2) + [3] * 5)
    stored = [e for e in tree.cache.take_events() if isinstance(e, BlockStored)]
    assert [e.token_ids for e in stored] == [tokens_of(1), tokens_of(2)]
    silent = Tree(mode)
    silent.insert(tokens_of(1, 2))
    assert silent.cache.take_events() == []


@pytest.mark.parametrize("mode", MODES)
def test_events_of_removed_pages(mode):
    """A page that moves between the tiers is still cached: it is reported as removed once, when it is dropped."""
    from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored

    tree = Tree(mode, enable_kv_cache_events=True, pages=8)
    capacity = tree.parts.pool.packed.sizes.packed_pages if tree.parts.pool.packed else 0
    names = range(1, 9 + capacity)
    for name in names:
        tree.evict(P if tree.parts.allocator.available_size() < P else 0)
        tree.insert(tokens_of(name))
    tree.evict(8 * P)
    events = tree.cache.take_events()
    stored = [e.block_hashes[0] for e in events if isinstance(e, BlockStored)]
    removed = [h for e in events if isinstance(e, BlockRemoved) for h in e.block_hashes]
    assert len(stored) == len(names) == len(set(stored))
    assert len(set(removed)) == len(removed) and set(removed) <= set(stored)
    assert len(stored) - len(removed) == tree.cache.total_size() // P


def test_extra_keys_are_namespaces(tree):
    kvs = {extra_key: tree.insert(tokens_of(1, 2, 3), extra_key)[1] for extra_key in ("key1", "key2", None)}
    assert tree.cache.total_size() == 9 * P
    for extra_key, kv in kvs.items():
        assert torch.equal(tree.kv(tokens_of(1, 2, 3), extra_key), kv)
    assert len(tree.match(tokens_of(1, 2, 3), "nonexistent").device_indices) == 0
    ids = torch.cat([tree.match(tokens_of(1, 2, 3), extra_key).device_indices for extra_key in kvs])
    assert len(ids.unique()) == 9 * P


def test_lock_references(tree):
    tree.insert(tokens_of(1, 2, 3))
    node = tree.match(tokens_of(1, 2, 3)).last_device_node
    dense = 3 * P if tree.dense else 0
    tree.cache.inc_lock_ref(node)
    assert (tree.cache.protected_size(), tree.cache.evictable_size()) == (dense, 0)
    tree.check()
    tree.evict(3 * P)
    assert len(tree.match(tokens_of(1, 2, 3)).device_indices) == 3 * P, "a locked node was evicted"
    tree.cache.dec_lock_ref(node)
    assert (tree.cache.protected_size(), tree.cache.evictable_size()) == (0, dense)
    tree.check()


def test_evict(tree):
    _, first = tree.insert(tokens_of(1, 2))
    tree.insert(tokens_of(3, 4))
    available = tree.parts.allocator.available_size()
    result = tree.evict(2 * P)
    freed = tree.parts.allocator.available_size() - available
    assert result.num_tokens_evicted == freed == (2 * P if tree.dense else 0)
    if tree.mode == "exact":
        assert tree.cache.total_size() == 2 * P
    else:  # nothing is lost while the packed tier has room
        assert tree.cache.total_size() == 4 * P and torch.equal(tree.kv(tokens_of(1, 2)), first)


@pytest.mark.parametrize("length", [1, P - 1, P, P + 1, 3 * P + 17])
def test_matches_end_at_pages(tree, length):
    tokens = list(range(length))
    _, kv = tree.insert(tokens)
    assert len(tree.match(tokens).device_indices) == length // P * P
    assert torch.equal(tree.kv(tokens), kv)


def test_printing(tree, capsys):
    tree.insert(tokens_of(1, 2, 3))
    tree.cache.pretty_print()
    assert f"#tokens: {3 * P}" in capsys.readouterr().out
    assert "available_size" in tree.cache.available_and_evictable_str()


def test_all_values(tree):
    kvs = [tree.insert(tokens_of(1, 2))[1], tree.insert(tokens_of(3, 4))[1]]
    values = tree.cache.all_values_flatten()
    assert len(values) == len(values.unique()) == 4 * P
    rows = lambda kv: sorted(map(tuple, kv.flatten(1).tolist()))
    assert rows(tree.parts.read(values)) == rows(torch.cat(kvs))


def test_matches_that_split_nodes(tree):
    _, long = tree.insert(tokens_of(1, 2, 3, 4, 5, 6, 7, 8))
    prefix_len, branch = tree.insert(tokens_of(1, 2, 9, 10))
    assert prefix_len == 2 * P
    branch[: 2 * P] = long[: 2 * P]  # the shared pages are those of the first
    assert tree.cache.total_size() == 10 * P
    assert torch.equal(tree.kv(tokens_of(1, 2, 3, 4, 99, 98)), long[: 4 * P])
    assert tree.cache.total_size() == 10 * P
    assert torch.equal(tree.kv(tokens_of(1, 2, 3, 4, 5, 6, 7, 8)), long)
    assert torch.equal(tree.kv(tokens_of(1, 2, 3, 4, 5, 6, 77, 88)), long[: 6 * P])
    assert torch.equal(tree.kv(tokens_of(1, 2, 9, 10)), branch)
    within = tokens_of(1, 2, 3) + [4] * 10 + [99] * 54  # the fourth page differs in its middle
    assert torch.equal(tree.kv(within), long[: 3 * P])
    assert tree.cache.total_size() == 10 * P


@pytest.mark.parametrize("mode", MODES)
def test_block_hashes(mode):
    """Stored per page, other for the same page at another place, split with the node."""
    from sglang.srt.disaggregation.kv_events import BlockStored

    tree = Tree(mode, enable_kv_cache_events=True)

    def stored(tokens):
        tree.insert(tokens)
        return [e for e in tree.cache.take_events() if isinstance(e, BlockStored)]

    first, second = stored(tokens_of(1, 1))
    assert first.block_hashes != second.block_hashes
    assert first.parent_block_hash is None and second.parent_block_hash == first.block_hashes[0]
    node = tree.match(tokens_of(1, 1)).last_device_node
    assert len(node.hash_value) == 2
    (fork,) = stored(tokens_of(1, 3))
    assert fork.parent_block_hash == first.block_hashes[0]
    assert len(node.hash_value) == len(node.parent.hash_value) == 1
