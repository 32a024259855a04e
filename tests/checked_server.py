"""`python checked_server.py <server arguments>`: sglang.launch_server on a CPU that checks its books and poisons what is stale.

Every time a request ends, `check_books` walks the tree and both tiers. Dense pages become NaN when they are freed, packed pages
all-ones bytes: whoever reads one of them spoils its log-probabilities, so nothing of another request can be shown by them.
SGLang's child processes run this file too (multiprocessing, spawn), as `__mp_main__`. For GPUs: `gpu/poisoned_server.py`.
"""

from __future__ import annotations

import runpy

import torch

import sgl_hq.plugin
from sgl_hq.page_format import PAGE_TOKENS

NAN_BYTE = 0xFF  # bfloat16 0xFFFF is NaN; as codes and scales it gives NaN or the largest values

_build = sgl_hq.plugin.build_radix_cache


def build_checked(context):
    tree = _build(context)
    _check_when_requests_end(tree)
    _poison_dense(tree.token_to_kv_pool_allocator)
    if tree._packed is not None:
        _poison_packed(tree._packed)
    return tree


def _check_when_requests_end(tree) -> None:
    finish = tree.cache_finished_req

    def finish_and_check(req, is_insert=True, *, kv_len_to_handle):
        finish(req, is_insert=is_insert, kv_len_to_handle=kv_len_to_handle)
        tree.check_books()

    tree.cache_finished_req = finish_and_check


def _poison_dense(allocator) -> None:
    release, pool = allocator._release_page_ids, allocator.get_kvcache()

    def poison_and_release(*page_ids):
        for pages in page_ids:
            slots = (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()
            for buffer in (*pool.k_buffer, *pool.v_buffer):
                buffer[slots] = float("nan")
        release(*page_ids)

    allocator._release_page_ids = poison_and_release


def _poison_packed(tier) -> None:
    free = tier.free

    def free_and_poison(pages):
        free(pages)
        for records in tier.records:
            records[list(pages)] = NAN_BYTE

    tier.free = free_and_poison


sgl_hq.plugin.build_radix_cache = build_checked

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
