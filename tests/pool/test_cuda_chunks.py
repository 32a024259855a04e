"""What the CUDA driver is asked for when chunks move, against its documented rules. On a GPU: tests/gpu/test_elastic_memory_gpu.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cuda.bindings import driver as real
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHUNK = 2 << 20
OK = real.CUresult.CUDA_SUCCESS


class Driver:
    """Addresses, mappings and handles. cuMemMap may not meet a mapping, cuMemUnmap takes whole mappings, cuMemSetAccess mapped addresses."""

    def __init__(self):
        self.next, self.mapped, self.handles, self.reserved, self.readable = 1 << 40, {}, 0, {}, set()

    def __getattr__(self, name):  # types and flags
        return getattr(real, name)

    def cuMemAddressReserve(self, size, alignment, address, flags):
        self.next += size + CHUNK
        self.reserved[self.next - size] = size
        return OK, self.next - size

    def cuMemAddressFree(self, address, size):
        assert self.reserved.pop(address) == size and not any(address <= at < address + size for at in self.mapped)
        return (OK,)

    def cuMemCreate(self, size, place, flags):
        assert size == CHUNK
        self.handles += 1
        return OK, self.handles

    def cuMemRelease(self, handle):
        assert handle not in self.mapped.values()
        self.handles -= 1
        return (OK,)

    def cuMemMap(self, address, size, offset, handle, flags):
        assert size == CHUNK and address not in self.mapped and any(r <= address < r + n for r, n in self.reserved.items())
        self.mapped[address] = handle
        return (OK,)

    def cuMemSetAccess(self, address, size, access, count):
        for at in range(address, address + size, CHUNK):
            assert at in self.mapped
            self.readable.add(at)
        return (OK,)

    def cuMemUnmap(self, address, size):
        for at in range(address, address + size, CHUNK):
            del self.mapped[at]
            self.readable.discard(at)
        return (OK,)


@pytest.fixture
def make_store(monkeypatch):
    from sgl_hq.pool import cuda_chunks

    def make():
        driver = Driver()
        monkeypatch.setattr(cuda_chunks, "_driver", lambda: driver)
        monkeypatch.setattr(cuda_chunks.CudaChunks, "bytes_of", lambda self, where: torch.empty(0, dtype=torch.uint8))
        no_device = SimpleNamespace(device=torch.device, zeros=lambda *_, **__: None, cuda=SimpleNamespace(synchronize=lambda _: None))
        monkeypatch.setattr(cuda_chunks, "torch", no_device)
        return cuda_chunks.CudaChunks(CHUNK, 0), driver

    return make


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(st.tuples(st.booleans(), st.integers(1, 7)), max_size=30))
def test_every_chunk_is_mapped_once_and_dense_holes_can_be_read(make_store, moves):
    store, driver = make_store()
    dense, arena = store.reserve(8, shared_holes=True), store.reserve(16)
    store.create(dense, 0, 8)
    store.create(arena, 0, 2)
    lent: list[int] = []
    for lend, slab in moves:
        if lend and slab not in lent:
            store.move(dense, slab, arena, 2 + len(lent), 1)
            lent.append(slab)
        elif not lend and lent:
            store.move(arena, 1 + len(lent), dense, lent.pop(), 1)
        backed = [driver.mapped.get(dense.address + at * CHUNK) for at in range(8)]
        records = [driver.mapped.get(arena.address + at * CHUNK) for at in range(16)]
        assert [at for at, handle in enumerate(backed) if handle == store._hole] == sorted(lent)
        assert records == arena.handles and None not in records[: 2 + len(lent)] and set(records[2 + len(lent) :]) == {None}
        assert sorted([h for h in backed if h != store._hole] + [h for h in records if h]) == list(range(2, 12)), "each handle once"
        assert driver.readable == set(driver.mapped) and driver.handles == 11
    store.close()
    assert not driver.mapped and not driver.handles and not driver.reserved
