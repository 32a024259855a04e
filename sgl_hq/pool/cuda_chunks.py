"""Chunks on a GPU, through CUDA's virtual memory (cuMemCreate, cuMemMap, ...). Needs cuda.bindings, which SGLang brings."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.kv_vmm_backing import _check, _driver

from sgl_hq.pool.chunks import ChunkRange, ChunkStore


class _Addresses:
    """What torch takes for a tensor of bytes at `address`; the address must be backed."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3}


class CudaChunks(ChunkStore):
    """One handle a chunk. A hole of a range with `shared_holes` shows one chunk that belongs to all of them: a kernel that reads there
    through a stale page id, to mask what it read, must not fault. That chunk comes on top of `bytes_created`."""

    def __init__(self, chunk_bytes: int, device_index: int):
        super().__init__(chunk_bytes)
        driver = _driver()
        self._device = torch.device("cuda", device_index)
        self._place, self._access = driver.CUmemAllocationProp(), driver.CUmemAccessDesc()
        self._place.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for location in (self._place.location, self._access.location):
            location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            location.id = device_index
        torch.zeros(1, device=self._device)  # torch makes the CUDA context
        self._ranges: list[ChunkRange] = []
        self._hole = self._create()

    def bytes_of(self, where: ChunkRange) -> torch.Tensor:
        return torch.as_tensor(_Addresses(where.address, len(where.handles) * self.chunk_bytes), device=self._device)

    def reserve(self, chunks: int, shared_holes: bool = False) -> ChunkRange:
        where = super().reserve(chunks, shared_holes)
        self._ranges.append(where)
        if shared_holes:
            self._back(where, 0, [self._hole] * chunks)
            self.bytes_of(where)[: self.chunk_bytes].zero_()  # what is masked is multiplied by 0, and must be finite for that
            torch.cuda.synchronize(self._device)  # unmapping does not wait: the zeros, late on a busy GPU, would fault
        return where

    def create(self, target: ChunkRange, first: int, count: int) -> None:
        super().create(target, first, count)
        self.bytes_of(target)[first * self.chunk_bytes : (first + count) * self.chunk_bytes].zero_()

    def close(self) -> None:
        """Give everything back to the driver. No tensor of any range may be used after this."""
        torch.cuda.synchronize(self._device)
        for where in self._ranges:
            for at, handle in enumerate(where.handles):
                if handle is not None or where.shared_holes:
                    self._release(where, at, 1)
                if handle is not None:
                    _check(_driver().cuMemRelease(handle), "cuMemRelease")
            _check(_driver().cuMemAddressFree(where.address, len(where.handles) * self.chunk_bytes), "cuMemAddressFree")
        _check(_driver().cuMemRelease(self._hole), "cuMemRelease")
        self._ranges.clear()

    def _reserve(self, nbytes: int) -> int:
        return int(_check(_driver().cuMemAddressReserve(nbytes, 0, 0, 0), "cuMemAddressReserve"))

    def _create(self):
        return _check(_driver().cuMemCreate(self.chunk_bytes, self._place, 0), "cuMemCreate")

    def _map(self, target: ChunkRange, at: int, handles: list[object]) -> None:
        if target.shared_holes:
            self._release(target, at, len(handles))
        self._back(target, at, handles)

    def _unmap(self, source: ChunkRange, first: int, count: int) -> None:
        self._release(source, first, count)
        if source.shared_holes:
            self._back(source, first, [self._hole] * count)

    def _back(self, target: ChunkRange, at: int, handles: list[object]) -> None:
        driver, start = _driver(), target.address + at * self.chunk_bytes
        for i, handle in enumerate(handles):
            _check(driver.cuMemMap(start + i * self.chunk_bytes, self.chunk_bytes, 0, handle, 0), "cuMemMap")
        _check(driver.cuMemSetAccess(start, len(handles) * self.chunk_bytes, [self._access], 1), "cuMemSetAccess")

    def _release(self, source: ChunkRange, first: int, count: int) -> None:
        _check(_driver().cuMemUnmap(source.address + first * self.chunk_bytes, count * self.chunk_bytes), "cuMemUnmap")
