"""Freed pages of a CPU pool become NaN in both tiers: whoever reads one spoils its output, so what was there before cannot be shown.

A GPU's pages are written on its forwards' stream, and dense ones are poisoned when packed already: `gpu/poisoned_server.py`.
"""

from __future__ import annotations

import torch

from sgl_hq.page_format import PAGE_TOKENS

NAN_BYTE = 0xFF  # bfloat16 0xFFFF is NaN; as codes and scales it gives NaN or the largest values


def poison_dense(allocator) -> None:
    """Pages of the allocator's pool from now on, when they are freed."""
    release, pool = allocator._release_page_ids, allocator.get_kvcache()

    def poison_and_release(*page_ids):
        for pages in page_ids:
            slots = (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()
            for buffer in (*pool.k_buffer, *pool.v_buffer):
                buffer[slots] = float("nan")
        release(*page_ids)

    allocator._release_page_ids = poison_and_release


def poison_packed(tier) -> None:
    """Pages of a packed tier from now on, when they are freed."""
    free = tier.free

    def free_and_poison(pages):
        free(pages)
        for records in tier.records:
            records[list(pages)] = NAN_BYTE

    tier.free = free_and_poison
