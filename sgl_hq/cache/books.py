"""The books of the radix tree and the packed tier, compared with a walk of the tree. No device is asked, except by `values_differ`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sgl_hq.cache.packing_radix_cache import PackingRadixCache
    from sgl_hq.pool.elastic_memory import ElasticMemory
    from sgl_hq.pool.packed_tier import PackedTier


def differences(tree: PackingRadixCache) -> list[str]:
    """One sentence for each difference between tree, registry and packed tier, empty if there is none. Waits for the device once."""
    found = [*tree_differences(tree), *packed_differences(tree)]
    return [*found, "nodes name other token ids than those of their pages"] if bool(values_differ(tree)) else found


def tree_differences(tree: PackingRadixCache) -> list[str]:
    """Packing is prefix-closed, page lists match keys, sizes agree with a walk, tables and requests name nodes of the tree."""
    found, dense, live_pages = [], {False: 0, True: 0}, 0
    nodes = tree.nodes()
    for n in nodes:
        pages = tree._pages_of.get(n.id)
        if len(n.key) != len(n.value) or (pages is not None and len(pages) * tree.page_size != len(n.key)):
            found.append(f"node {n.id} has {len(n.key)} tokens, {len(n.value)} token ids and {pages and len(pages)} packed pages")
        if pages is None:
            dense[n.lock_ref > 0] += len(n.key)
            continue
        live_pages += len(pages) if n.lock_ref else 0
        if n.parent is not tree.root_node and n.parent.id not in tree._pages_of:
            found.append(f"node {n.id} is packed below dense node {n.parent.id}")
    ids = {n.id for n in nodes}
    for name, table in (("pages", tree._pages_of), ("users", tree._users_of)):
        if astray := set(table) - ids:
            found.append(f"the table of {name} names nodes that are not in the tree: {sorted(astray)[:8]}")
    for request in tree.live.requests():
        if request.last_node is not tree.root_node and request.last_node.id not in ids:
            found.append(f"request {request.rid} ends in node {request.last_node.id}, which is not in the tree")
    counted = (dense[False], dense[True], live_pages)
    booked = (tree.evictable_size_, tree.protected_size_, tree.packed_live_pages)
    if counted != booked:
        found.append(f"evictable and protected dense tokens and live packed pages are {counted} in the tree and {booked} in its books")
    return found


def packed_differences(tree: PackingRadixCache) -> list[str]:
    """Every packed page and sink slot is free, in one node or being written for one, once; each slab is in one tier."""
    if tree.packed_tier is None:
        return []
    owned = [page for _, pages in tree.packed_nodes() for page in pages] + tree.pages_under_way
    found = tree.packed_tier.differences(owned)
    return found + (slab_differences(tree._memory, tree.packed_tier) if tree.elastic else [])


def slab_differences(memory: ElasticMemory, tier: PackedTier) -> list[str]:
    """The capacities of both tiers, and the bytes that back them, follow from which slabs are lent."""
    slabs, lent = memory.slabs, len(memory.lent)
    expected = {
        "packed pages": (tier.pages_total, slabs.packed_pages(lent)),
        "bytes of dense pages": (memory.dense_bytes, (slabs.slabs - lent) * slabs.slab_bytes),
        "bytes of packed pages": (memory.packed_bytes, (1 + lent) * slabs.slab_bytes),
        "bytes in all": (memory.bytes_created, (slabs.slabs + 1) * slabs.slab_bytes),
    }
    return [f"{lent} slabs are lent, and {what} are {is_} instead of {should}" for what, (is_, should) in expected.items() if is_ != should]


def values_differ(tree: PackingRadixCache) -> torch.Tensor:
    """[] bool on the device: a packed node does not name the tokens of its packed pages."""
    packed = tree.packed_nodes()
    if not packed:
        return torch.zeros((), dtype=torch.bool, device=tree.device)
    named = torch.cat([n.value for n, _ in packed])
    pages = [page for _, pages in packed for page in pages]
    if len(named) != len(pages) * tree.page_size:  # `tree_differences` says where
        return torch.ones((), dtype=torch.bool, device=named.device)
    return (named != tree._pool.packed_token_ids(pages)).any()
