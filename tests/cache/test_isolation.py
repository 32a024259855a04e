"""Tenants that share a server, told apart by SGLang's extra key (cache salt): they share no page, and no page shows what it held before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from poison import NAN_BYTE, poison_dense, poison_packed
from two_tier_parts import LAYERS, P, build, radix_key

from sgl_hq.layer_codecs import layer_codecs
from sgl_hq.pool.packed_tier import PackedTier
from sgl_hq.pool.sizing import KVShape, TierSizes

tenants = st.sampled_from([None, "", "a", "b"])
prompts = st.tuples(st.integers(0, 1), st.integers(1, 4))  # family, pages


class Tenants(RuleBasedStateMachine):
    """The same prompts under several extra keys, in pools too small for them. What is freed is poisoned in both tiers."""

    @initialize(pack=st.sampled_from(["shared", "insert", "pressure"]))
    def start(self, pack):
        self.parts = build("bf16", pack, pages=10, packed_fraction=0.4)
        self.tree, self.tier = self.parts.tree, self.parts.pool.packed
        self.written: dict[tuple, torch.Tensor] = {}  # (tenant, family, page) -> K and V of the page that is cached
        self.serial = 0
        poison_dense(self.parts.allocator)
        poison_packed(self.tier)

    @rule(tenant=tenants, prompt=prompts)
    def request(self, tenant, prompt):
        """A request that finishes: what is cached is used, the rest is written and inserted."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams

        family, pages = prompt
        cached = self._match(tenant, family, pages)
        if self.parts.allocator.available_size() < pages * P:
            self.tree.evict(EvictParams(num_tokens=pages * P - self.parts.allocator.available_size()))
        if self.parts.allocator.available_size() < pages * P:
            return
        slots = self.parts.write(_tokens(family, pages))
        kv = self.parts.read(slots)
        result = self.tree.insert(InsertParams(key=radix_key(_tokens(family, pages), tenant), value=slots))
        assert result.prefix_len <= len(cached.device_indices), "pages of another tenant were taken for this one's"
        self.parts.allocator.free_segment(slots[: result.prefix_len], start_pos=0)
        for page in range(result.prefix_len // P, pages):
            self.written[tenant, family, page] = kv[page * P : (page + 1) * P]
        self.serial += 1
        self.tree._use(result.last_device_node, f"r{self.serial}")

    @rule(tenant=tenants, prompt=prompts)
    def look(self, tenant, prompt):
        """What a tenant is given is what it wrote itself."""
        family, pages = prompt
        found = self._match(tenant, family, pages).device_indices
        kv = self.parts.read(found)
        for page in range(len(found) // P):
            assert torch.equal(kv[page * P : (page + 1) * P], self.written[tenant, family, page])

    @invariant()
    def no_page_has_two_tenants(self):
        if not hasattr(self, "tree"):
            return
        self.tree.check_books()
        owners: dict[int, set] = {}
        stack = list(self.tree.root_node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            for page in (node.value[::P] // P).tolist():
                owners.setdefault(page, set()).add(node.key.extra_key)
        assert all(len(of_page) == 1 for of_page in owners.values()), owners

    def _match(self, tenant, family, pages):
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        return self.tree.match_prefix(MatchPrefixParams(key=radix_key(_tokens(family, pages), tenant)))


def _tokens(family: int, pages: int) -> list[int]:
    return [family * 1000 + i for i in range(pages * P)]


TestTenants = Tenants.TestCase
TestTenants.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def _tier(fmt: str) -> tuple[PackedTier, KVShape]:
    shape = KVShape(LAYERS, 2, 64, 64)
    codecs = layer_codecs(fmt, LAYERS, 64, 64)
    return PackedTier(codecs, shape, TierSizes(0, 3, 2 if codecs[0].fmt.sink_tokens else 0), "cpu"), shape


def _kv(shape: KVShape, pages: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    make = lambda: [torch.randn(pages * P, shape.kv_heads, 64, generator=generator).bfloat16() for _ in range(LAYERS)]
    return make(), make()


@pytest.mark.parametrize("starts_sequence", [True, False])
@pytest.mark.parametrize("fmt", ["bf16", "lossless", "int8", "hq7", "hq4", "K6tV5"])
def test_a_repacked_page_holds_no_byte_of_the_page_before(fmt, starts_sequence):
    """Packed over another tenant's record, over poison and over zeros, a page is the same bytes, unused ones included."""
    used = []
    for before in ("tenant", "poison", "zeros"):
        tier, shape = _tier(fmt)
        if before == "tenant":
            tier.free(tier.write(*_kv(shape, 3, seed=1), torch.arange(3 * P), True).pages)
        elif before == "poison":
            for held in (*tier.records, *tier.sink_slots):
                held.fill_(NAN_BYTE)
        pages = tier.write(*_kv(shape, 2, seed=2), torch.arange(2 * P), starts_sequence).pages
        sink = tier.sink_slot(pages[0])
        used.append([r[pages] for r in tier.records] + ([s[sink] for s in tier.sink_slots] if sink >= 0 else []))
    tenant, poison, zeros = used
    assert all(map(torch.equal, tenant, zeros)) and all(map(torch.equal, poison, zeros))
