"""SGLang's paged allocator without its Triton kernels."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.utils import get_num_new_pages


class CPUPagedAllocator(PagedTokenToKVPoolAllocator):
    """Same pages in the same order as the Triton kernels (`sglang/kernels/ops/memory/allocator.py`)."""

    def alloc_extend(self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, num_new_pages=None):
        """Slots [extend_num_tokens] int64 for all requests' new tokens, or None if the pages do not suffice."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu)
        if num_new_pages > len(self.free_pages):
            return None
        slots = torch.empty((extend_num_tokens,), dtype=torch.int64)
        alloc_extend_naive(prefix_lens_cpu, seq_lens_cpu, last_loc, self.free_pages, slots, self.page_size, self.device)
        self.free_pages = self.free_pages[num_new_pages:]
        return slots

    def alloc_decode(self, seq_lens, seq_lens_cpu, last_loc):
        """One slot per request: the next of its last page, or the first of a new page. None if pages do not suffice."""
        opens_page = (seq_lens - 1) % self.page_size == 0
        new_pages = int(opens_page.sum())
        if new_pages > len(self.free_pages):
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[opens_page] = self.free_pages[:new_pages] * self.page_size
        self.free_pages = self.free_pages[new_pages:]
        return slots
