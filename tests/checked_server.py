"""`python checked_server.py <server arguments>`: sglang.launch_server on a CPU that checks its books and poisons what is stale.

Every time a request ends, `check_books` walks the tree and both tiers. Freed pages are poisoned (`poison.py`): whoever reads one of
them spoils its log-probabilities.
SGLang's child processes run this file too (multiprocessing, spawn), as `__mp_main__`. For GPUs: `gpu/poisoned_server.py`.
"""

from __future__ import annotations

import runpy

from poison import poison_dense, poison_packed

import sgl_hq.plugin

_build = sgl_hq.plugin.build_radix_cache


def build_checked(context):
    tree = _build(context)
    _check_when_requests_end(tree)
    poison_dense(tree.token_to_kv_pool_allocator)
    if tree._packed is not None:
        poison_packed(tree._packed)
    return tree


def _check_when_requests_end(tree) -> None:
    finish = tree.cache_finished_req

    def finish_and_check(req, is_insert=True, *, kv_len_to_handle):
        finish(req, is_insert=is_insert, kv_len_to_handle=kv_len_to_handle)
        tree.check_books()

    tree.cache_finished_req = finish_and_check


sgl_hq.plugin.build_radix_cache = build_checked

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
