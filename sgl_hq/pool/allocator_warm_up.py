"""SGLang's page allocator compiles its two kernels for every power of two of rows, when a batch of that many first comes.

That takes about 100 ms each time (`sglang/kernels/ops/memory/allocator.py` says so), in front of a user's first token. With
pages of one token, SGLang's default, neither kernel runs: pages of 64 are ours, so the wait is ours to take away.
"""

from __future__ import annotations

import torch


def warm_up_allocator(page_tokens: int, most_rows: int, device: str) -> None:
    """Compile both kernels for batches of up to `most_rows` rows: one row is allocated each time, out of pages of no pool.

    Dtypes are those of `alloc_for_extend` and `alloc_for_decode` (`mem_cache/allocation.py`): int64 throughout.
    """
    from sglang.kernels.ops.memory.allocator import alloc_decode_kernel, alloc_extend_kernel

    length = torch.ones(1, dtype=torch.int64, device=device)
    before, last_slot, pages, out = length - 1, length - 2, length - 1, torch.empty(page_tokens, dtype=torch.int64, device=device)
    rows = 1
    while rows < 2 * most_rows:
        alloc_extend_kernel[(1,)](before, length, last_slot, pages, out, rows, page_tokens)
        alloc_decode_kernel[(1,)](length, last_slot, pages, out, rows, page_tokens)
        rows *= 2
