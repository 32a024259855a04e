"""After the warm-up, SGLang's allocator compiles nothing more, however many rows a batch has."""

import pytest
import torch

pytestmark = pytest.mark.gpu

PAGE, MOST_ROWS = 64, 20


def _compiled() -> int:
    from sglang.kernels.ops.memory.allocator import alloc_decode_kernel, alloc_extend_kernel

    return sum(len(k.device_caches[torch.cuda.current_device()][0]) for k in (alloc_extend_kernel, alloc_decode_kernel))


def _lens(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    lens = torch.full((rows,), tokens, dtype=torch.int64)
    return lens.cuda(), lens


def test_batches_of_all_sizes_find_their_kernels_compiled():
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    from sgl_hq.pool.allocator_warm_up import warm_up_allocator

    before = _compiled()
    warm_up_allocator(PAGE, MOST_ROWS, "cuda")
    warm = _compiled()
    assert warm > before
    allocator = PagedTokenToKVPoolAllocator(MOST_ROWS * 4 * PAGE, PAGE, torch.bfloat16, "cuda", None, need_sort=False)
    for rows in range(1, MOST_ROWS + 1):
        allocator.clear()
        nothing, prompt, grown = _lens(rows, 0), _lens(rows, PAGE + 7), _lens(rows, PAGE + 8)
        last = torch.full((rows,), -1, dtype=torch.int64, device="cuda")
        slots = allocator.alloc_extend(*nothing, *prompt, last, rows * (PAGE + 7))
        assert len(slots.unique()) == rows * (PAGE + 7)
        last = slots.view(rows, -1)[:, -1].contiguous()
        assert torch.equal(allocator.alloc_decode(*grown, last), last + 1)
    assert _compiled() == warm
