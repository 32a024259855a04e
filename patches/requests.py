"""Requests on their way through SGLang: rows given, rows freed, batches formed."""

from __future__ import annotations

from sgl_hq.cache.packing_radix_cache import PackingRadixCache

# The scheduler process has one tree. ReqToTokenPool.free and ForwardBatch.init_new are not told which one it is.
_tree: PackingRadixCache | None = None


def bind_tree(tree: PackingRadixCache) -> None:
    global _tree
    _tree = tree


def rows_allocated(_result, batch):
    """AFTER alloc_for_extend."""
    batch.tree_cache.on_rows_allocated(batch.reqs)


def row_freed(pool, req):
    """BEFORE ReqToTokenPool.free: afterwards the request no longer knows its row."""
    if _tree is not None:
        _tree.live.unregister(req)


def start_forward(_result, _cls, batch, _model_runner, **_kwargs):
    """AFTER ForwardBatch.init_new. Idle batches have no requests; warm-up runs before the tree exists."""
    if _tree is not None:
        _tree.live.start_forward([request.req_pool_idx for request in batch.reqs or []])
