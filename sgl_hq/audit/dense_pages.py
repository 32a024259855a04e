"""Who holds each page of the dense tier: the free list, a radix node, one running request alone, or the packed tier, to which it is lent."""

from __future__ import annotations

import numpy as np
import torch

from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.pool.packed_tier import some_ids

# A page's holders are counted in one int64, 15 bits for each kind.
_HOLDERS = ("free", "in the tree", "of a request alone", "lent")
_BITS = 15


class DensePages:
    """allocator: SGLang's PagedTokenToKVPoolAllocator; tree: PackingRadixCache; req_to_token: [rows, tokens] int32 on the device."""

    def __init__(self, allocator, tree, req_to_token: torch.Tensor):
        self._allocator, self._tree, self._req_to_token = allocator, tree, req_to_token

    def holders(self) -> torch.Tensor:
        """[pages + 2] int64 on the device: how often each page is held, by kind. Page 0 is SGLang's padding; the last entry counts ids
        outside the dense tier, among them those of packed tokens."""
        pages = self._allocator.num_pages
        held = torch.zeros(pages + 2, dtype=torch.int64, device=self._req_to_token.device)
        for kind, ids in enumerate((self._free(), self._in_tree(), self._private(), self._lent())):
            inside = torch.where((ids >= 0) & (ids <= pages), ids, pages + 1)
            held.index_add_(0, inside, torch.full_like(inside, 1 << _BITS * kind))
        return held

    def _free(self) -> torch.Tensor:
        return torch.cat((self._allocator.free_pages, self._allocator.release_pages)).to(torch.int64)

    def _in_tree(self) -> torch.Tensor:
        values = [n.value for n in self._tree.dense_nodes()]
        if not values:
            return torch.zeros(0, dtype=torch.int64, device=self._req_to_token.device)
        return torch.cat(values)[::PAGE_TOKENS].to(torch.int64) // PAGE_TOKENS

    def _lent(self) -> torch.Tensor:
        memory = self._allocator.get_kvcache().memory
        pages = [np.zeros(0, np.int64)]
        if memory is not None:
            pages += [np.arange(slab * memory.slabs.pages, (slab + 1) * memory.slabs.pages) for slab in memory.lent]
        return torch.from_numpy(np.concatenate(pages)).to(self._req_to_token.device)

    def _private(self) -> torch.Tensor:
        """Pages behind what a request shares with the tree (`cache_protected_len`, whole pages), up to what it has allocated."""
        rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for request in self._tree.live.requests():
            starts = np.arange(request.cache_protected_len, request.kv.kv_allocated_len, PAGE_TOKENS)
            rows.append(np.full(len(starts), request.req_pool_idx))
            columns.append(starts)
        where = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(columns)])).to(self._req_to_token.device)
        return self._req_to_token[where[0], where[1]].to(torch.int64) // PAGE_TOKENS


def differences(holders: np.ndarray) -> list[str]:
    """One sentence per kind of difference from "each page is held once". holders: `DensePages.holders()` on the host."""
    mask = (1 << _BITS) - 1
    kinds = np.stack([(holders >> _BITS * kind) & mask for kind in range(len(_HOLDERS))])  # [4, pages + 2]
    found, held = [], kinds[:, 1:-1]
    if (lost := np.flatnonzero(held.sum(0) == 0) + 1).size:
        found.append(f"dense pages lost, held by nobody: {some_ids(lost)}")
    for kind, name in enumerate(_HOLDERS):
        if (twice := np.flatnonzero(held[kind] > 1) + 1).size:
            found.append(f"dense pages twice {name}: {some_ids(twice)}")
        for other in range(kind):
            if (both := np.flatnonzero((held[kind] > 0) & (held[other] > 0)) + 1).size:
                found.append(f"dense pages both {_HOLDERS[other]} and {name}: {some_ids(both)}")
        if outside := int(kinds[kind, 0] + kinds[kind, -1]):
            found.append(f"{outside} page ids {name} are not of the dense tier")
    return found
