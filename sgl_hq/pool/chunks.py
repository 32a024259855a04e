"""Ranges of virtual addresses whose memory comes in chunks, and chunks that move from one range to another.

A range never moves, so neither kernels nor captured CUDA graphs learn of it; no chunk is given back, so the sum of bytes stays what
it was. The idea is vAttention's (arXiv 2405.04437); SGLang backs a pool that is sized after graph capture in the same way
(`mem_cache/kv_vmm_backing.py`), but its memory stays where it was put. On a CPU the addresses are a lazily filled mapping.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod

import torch

_MAP_NORESERVE = 0x4000  # of Linux; `mmap` has the name from Python 3.13 on


class ChunkRange:
    """`chunks` chunks of addresses. handles: the chunk that backs each, None = a hole. shared_holes: kernels may read a hole by a stale
    address; what they find there is theirs to mask. Other holes must not be touched."""

    def __init__(self, chunks: int, address: int, shared_holes: bool):
        self.address, self.shared_holes = address, shared_holes
        self.handles: list[object | None] = [None] * chunks

    @property
    def mapped(self) -> int:
        """Chunks that are backed."""
        return sum(handle is not None for handle in self.handles)


class ChunkStore(ABC):
    """Owns all chunks, of `chunk_bytes` each. Callers see to it that no kernel that is under way uses a chunk that they move."""

    def __init__(self, chunk_bytes: int):
        self.chunk_bytes, self.chunks = chunk_bytes, 0

    @property
    def bytes_created(self) -> int:
        """Of all chunks, wherever they are; what holes share is left out."""
        return self.chunks * self.chunk_bytes

    def reserve(self, chunks: int, shared_holes: bool = False) -> ChunkRange:
        """Addresses for `chunks` chunks, all of them holes as yet."""
        return ChunkRange(chunks, self._reserve(chunks * self.chunk_bytes), shared_holes)

    def create(self, target: ChunkRange, first: int, count: int) -> None:
        """Back the holes [first, first + count) with new memory, zeros. Raises RuntimeError when there is none."""
        assert target.handles[first : first + count] == [None] * count, "only a hole can be backed"
        handles = []
        for _ in range(count):
            handles.append(self._create())
            self.chunks += 1
        self._put(target, first, handles)

    def move(self, source: ChunkRange, first: int, target: ChunkRange, at: int, count: int) -> None:
        """Unmap [first, first + count) of `source` and back the holes [at, at + count) of `target` with it. The bytes are undefined then."""
        handles = source.handles[first : first + count]
        assert None not in handles, "a hole cannot be moved"
        assert target.handles[at : at + count] == [None] * count, "only a hole can be backed"
        self._unmap(source, first, count)
        source.handles[first : first + count] = [None] * count
        self._put(target, at, handles)

    def _put(self, target: ChunkRange, at: int, handles: list[object]) -> None:
        self._map(target, at, handles)
        target.handles[at : at + len(handles)] = handles

    @abstractmethod
    def bytes_of(self, where: ChunkRange) -> torch.Tensor:
        """[chunks * chunk_bytes] uint8 over the whole range, whose first chunk must be backed; the memory is not the tensor's."""

    @abstractmethod
    def _reserve(self, nbytes: int) -> int:
        """Returns the address."""

    @abstractmethod
    def _create(self) -> object: ...

    @abstractmethod
    def _map(self, target: ChunkRange, at: int, handles: list[object]) -> None: ...

    @abstractmethod
    def _unmap(self, source: ChunkRange, first: int, count: int) -> None:
        """The addresses of `count` backed chunks become holes."""


class HostChunks(ChunkStore):
    """Anonymous mappings: a hole takes no memory until it is written, and what stood in a chunk that left is zeros."""

    def __init__(self, chunk_bytes: int):
        super().__init__(chunk_bytes)
        self._mappings: dict[int, mmap.mmap] = {}

    def bytes_of(self, where: ChunkRange) -> torch.Tensor:
        return torch.frombuffer(self._mappings[where.address], dtype=torch.uint8)

    def _reserve(self, nbytes: int) -> int:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        self._mappings[address] = mapping
        return address

    def _create(self) -> int:
        return self.chunks

    def _map(self, target: ChunkRange, at: int, handles: list[object]) -> None:
        pass

    def _unmap(self, source: ChunkRange, first: int, count: int) -> None:
        self._mappings[source.address].madvise(mmap.MADV_DONTNEED, first * self.chunk_bytes, count * self.chunk_bytes)


def granularity(device: str) -> int:
    """Bytes of which a chunk on `device` must be a multiple."""
    if torch.device(device).type != "cuda":
        return mmap.PAGESIZE
    from sglang.srt.mem_cache.kv_vmm_backing import query_granularity

    return query_granularity(_index(device))


def make_chunks(device: str, chunk_bytes: int) -> ChunkStore:
    """chunk_bytes: a multiple of `granularity(device)`."""
    if torch.device(device).type != "cuda":
        return HostChunks(chunk_bytes)
    from sgl_hq.pool.cuda_chunks import CudaChunks

    return CudaChunks(chunk_bytes, _index(device))


def _index(device: str) -> int:
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index
