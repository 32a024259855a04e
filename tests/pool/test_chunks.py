"""Chunks of memory between ranges of addresses, on a CPU. The same on a GPU: tests/gpu/test_elastic_memory_gpu.py."""

from __future__ import annotations

import os

import pytest
import torch

from sgl_hq.pool.chunks import granularity, make_chunks

CHUNK = 16 * 4096


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_chunk_is_read_where_it_was_moved_to_and_addresses_stay():
    store = make_chunks("cpu", CHUNK)
    dense, arena = store.reserve(4, shared_holes=True), store.reserve(8)
    store.create(dense, 0, 4)
    store.create(arena, 0, 1)
    before = store.bytes_of(dense).data_ptr(), store.bytes_of(arena).data_ptr()
    store.bytes_of(dense)[: 4 * CHUNK] = 7
    store.move(dense, 2, arena, 1, 2)
    assert (dense.mapped, arena.mapped, store.bytes_created) == (2, 3, 5 * CHUNK)
    assert dense.handles == [0, 1, None, None]
    assert store.bytes_of(dense)[: 2 * CHUNK].eq(7).all() and store.bytes_of(dense)[2 * CHUNK :].eq(0).all()
    store.bytes_of(arena)[CHUNK : 3 * CHUNK] = 9
    store.move(arena, 1, dense, 2, 2)
    assert store.bytes_of(dense)[: 2 * CHUNK].eq(7).all(), "other chunks are left alone"
    assert (dense.mapped, arena.mapped, store.bytes_created) == (4, 1, 5 * CHUNK)
    assert before == (store.bytes_of(dense).data_ptr(), store.bytes_of(arena).data_ptr())


def test_a_range_takes_no_memory_but_that_of_its_chunks():
    store = make_chunks("cpu", 1 << 20)
    before = _resident_bytes()
    large = store.reserve(1 << 14)  # 16 GiB of addresses
    store.create(large, 0, 32)
    store.bytes_of(large)[: 32 << 20] = 1
    written = _resident_bytes() - before
    assert 30 << 20 < written < 40 << 20
    store.move(large, 16, store.reserve(16), 0, 16)
    assert _resident_bytes() - before < written - (14 << 20)


@pytest.mark.parametrize("first, at", [(1, 0), (0, 1)], ids=["a hole is moved", "a chunk is put over another"])
def test_mistakes_are_found_before_anything_moves(first, at):
    store = make_chunks("cpu", CHUNK)
    source, target = store.reserve(2), store.reserve(2)
    store.create(source, 0, 1)
    store.create(target, 1, 1)
    with pytest.raises(AssertionError, match="hole"):
        store.move(source, first, target, at, 1)
    assert (source.mapped, target.mapped) == (1, 1)


def test_tensors_keep_their_addresses():
    store = make_chunks("cpu", granularity("cpu"))
    addresses = store.reserve(4)
    store.create(addresses, 0, 4)
    view = store.bytes_of(addresses).view(torch.bfloat16).view(4, -1)
    view[3] = 1.5
    assert store.bytes_of(addresses).view(torch.bfloat16)[-1] == 1.5
