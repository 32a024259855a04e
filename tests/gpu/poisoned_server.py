"""`python poisoned_server.py <server arguments>`: sglang.launch_server whose stale KV is NaN.

Dense pages become NaN when they have been packed, packed pages before they are written and when they are freed: whoever
reads one of them spoils its output. SGLang's child processes run this file too (multiprocessing, spawn), as `__mp_main__`.
"""

from __future__ import annotations

import runpy

import torch

import sgl_hq.plugin

NAN_BYTE = 0xFF  # bfloat16 0xFFFF is NaN; as codes and scales it gives NaN or the largest values

_build = sgl_hq.plugin.build_radix_cache


def build_poisoned(context):
    tree = _build(context)
    if tree._packed is not None:
        _poison(tree)
    return tree


def _poison(tree) -> None:
    pool, tier, become_packed = tree._pool, tree.packed_tier, tree._become_packed
    free = tier.free
    tier.arena[:, : tier.pages_total].fill_(NAN_BYTE)  # of elastic tiers, there is no memory behind the others

    def behind_the_forwards():
        return torch.cuda.stream(pool.forward_stream or torch.cuda.current_stream())

    def become_packed_and_poison(node, pages):
        dense_slots = node.value
        become_packed(node, pages)
        with behind_the_forwards():
            for buffer in (*pool.k_buffer, *pool.v_buffer):
                buffer[dense_slots] = float("nan")
            torch.cuda.current_stream().synchronize()  # keeps `dense_slots` alive long enough

    def free_and_poison(pages):
        free(pages)
        with behind_the_forwards():
            tier.arena[:, torch.tensor(list(pages), device=tier.arena.device)] = NAN_BYTE

    tree._become_packed, tier.free = become_packed_and_poison, free_and_poison


sgl_hq.plugin.build_radix_cache = build_poisoned

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
