"""Bounds on a request's length: both tiers when it arrives, the dense tier when its packed prefix is known."""

from __future__ import annotations

from sgl_hq.cache.long_requests import hold_to_dense_tier

_MAX_REQ_LEN, _MAX_REQ_INPUT_LEN = 4, 5  # of get_worker_info's tuple


def longest_request(original, worker):
    """AROUND TpModelWorker.get_worker_info."""
    info = list(original(worker))
    pool = worker.model_runner.token_to_kv_pool
    if pool.packed is not None:
        margin = info[_MAX_REQ_LEN] - info[_MAX_REQ_INPUT_LEN]
        info[_MAX_REQ_LEN] = min(worker.model_config.context_len, pool.most_tokens) - 1
        info[_MAX_REQ_INPUT_LEN] = info[_MAX_REQ_LEN] - margin
    return tuple(info)


def longest_answer(original, scheduler, req):
    """AROUND Scheduler.init_req_max_new_tokens: the same bound, over both tiers."""
    if scheduler.tree_cache.packed_tier is None:
        return original(scheduler, req)
    dense_tokens = scheduler.max_total_num_tokens
    scheduler.max_total_num_tokens = scheduler.token_to_kv_pool_allocator.get_kvcache().most_tokens
    try:
        return original(scheduler, req)
    finally:
        scheduler.max_total_num_tokens = dense_tokens


def admit(original, adder, req, has_chunked_req, truncation_align_size):
    """AROUND PrefillAdder.add_one_req."""
    if adder.tree_cache.packed_tier is not None:
        hold_to_dense_tier(adder.tree_cache, adder.token_to_kv_pool_allocator.size, req)
    return original(adder, req, has_chunked_req=has_chunked_req, truncation_align_size=truncation_align_size)
