"""SGLang's MHA pool plus the packed tier.

Slot ids: [0, D + P) are physical dense slots (stock; page 0 is SGLang's padding page), ids from `packed_base` on
name packed tokens. SGLang carries the latter in radix nodes and rows of `req_to_token`, where only their number
matters; they never reach `set_kv_buffer` or the allocator (design.md sections 0.2 and 2).
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sgl_hq.config import HQConfig, HQConfigError, from_env
from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.pool.chunks import granularity
from sgl_hq.pool.codecs import codecs_of_server
from sgl_hq.pool.elastic_memory import ElasticMemory
from sgl_hq.pool.packed_tier import PackedTier
from sgl_hq.pool.packing import Packing, ids_on
from sgl_hq.pool.sizing import KVShape, tiers_of_dense
from sgl_hq.pool.slabs import slabs_of_dense


class HQTokenToKVPool(MHATokenToKVPool):
    """Dense tier of SGLang (`mem_cache/memory_pool.py` MHATokenToKVPool) with a packed tier beside it.

    `packed` is None in mode `exact`, `memory` where the split is fixed. Unsupported movers of KV raise NotImplementedError: they copy slots by id and
    would read packed ids as physical ones.
    """

    def _create_buffers(self):
        self.config: HQConfig = from_env()
        self.shape = KVShape(self.layer_num, self.head_num, self.head_dim, self.v_head_dim)
        self.packed: PackedTier | None = None
        self.memory: ElasticMemory | None = None
        self.forward_stream: torch.cuda.Stream | None = None  # the stream of the forwards; None: the current one
        if self.config.packs and self.dtype != torch.bfloat16:
            raise HQConfigError(
                f"the KV cache dtype is {self.dtype}: packed pages are made from bfloat16, "
                "start with --dtype bfloat16 --kv-cache-dtype auto"
            )
        codecs = codecs_of_server(self.config, self.shape, self.device) if self.config.packs else []
        layouts = [codec.layout for codec in codecs]
        if self.config.elastic:
            slabs = slabs_of_dense(self.size, layouts, self.shape, granularity(self.device))
            self.memory = ElasticMemory(slabs, layouts, self.shape, self.device)
        super()._create_buffers()
        if self.config.packs:
            if self.memory is None:
                sizes = tiers_of_dense(self.size, self.config.packed_fraction, layouts, self.shape)
            else:
                sizes = self.memory.slabs.sizes(layouts)
            self.packed = PackedTier(codecs, self.shape, sizes, self.device, self.memory)
            if self.packed.on_gpu:
                self.packed.warm_up(self.k_buffer, self.v_buffer)

    def _create_buffers_normal(self):
        if self.memory is None:
            super()._create_buffers_normal()
        else:
            self.k_buffer, self.v_buffer = self.memory.k_buffers, self.memory.v_buffers

    @property
    def packed_base(self) -> int:
        """First packed token id; page aligned."""
        return self.size + self.page_size

    @property
    def dense_bytes_allocated(self) -> int:
        """Bytes of the dense tier, SGLang's padding page included."""
        if self.memory is not None:
            return self.memory.dense_bytes
        return sum(buffer.nbytes for buffer in (*self.k_buffer, *self.v_buffer))

    @property
    def most_tokens(self) -> int:
        """Of one request, in both tiers together."""
        if self.packed is None:
            return self.size
        if self.memory is None:
            return self.size + self.packed.pages_total * PAGE_TOKENS
        slabs, lent = self.memory.slabs, self.memory.slabs.slabs - 1
        return self.size + (slabs.packed_pages(lent) - lent * slabs.pages) * PAGE_TOKENS

    def get_kv_size_bytes(self):
        """(K, V) bytes; the packed tier, which mixes both in one record, is counted half and half."""
        k_bytes, v_bytes = super().get_kv_size_bytes()
        packed = self.packed.bytes_allocated if self.packed else 0
        return k_bytes + packed // 2, v_bytes + packed - packed // 2

    def pack_pages(self, dense_slots: torch.Tensor, starts_sequence: bool) -> Packing:
        """Begin to copy whole dense pages into the packed tier (`PackedTier.write`); the caller frees the dense pages when that is done.

        With SGLang's overlap schedule a forward may be under way whose KV these pages hold, or which reads the packed
        pages that are overwritten here. So the kernel runs behind it, on its stream; whoever writes into the freed
        dense pages is a later forward on that stream. The host does not wait.
        """
        with self._behind_forwards():
            return self.packed.write(self.k_buffer, self.v_buffer, dense_slots, starts_sequence)

    def lend(self, slab: int) -> None:
        """A slab of dense pages, all of them free, to the packed tier. Waits for the forward that is under way: it may still write, for a
        request that has ended, into a page that is free."""
        self._wait_for_forwards()
        self.memory.lend(slab)
        self.packed.set_capacity(self.memory.slabs.packed_pages(len(self.memory.lent)))

    def give_back(self, slab: int) -> None:
        """The packed tier's last slab becomes the dense slab `slab`. What is packed there is moved before (`move_packed_pages`)."""
        self.packed.set_capacity(self.memory.slabs.packed_pages(len(self.memory.lent) - 1))
        self._wait_for_forwards()
        with self._behind_forwards():
            self.memory.give_back(slab)

    def move_packed_pages(self, sources: list[int], targets: list[int]) -> None:
        with self._behind_forwards():
            self.packed.move(sources, targets)

    def move_dense_pages(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole dense pages, behind the forward that is under way; no page is in both lists."""
        with self._behind_forwards():
            here, there = (ids_on(self.device, pages) for pages in (sources, targets))
            for buffer in (*self.k_buffer, *self.v_buffer):
                pages = buffer.unflatten(0, (-1, PAGE_TOKENS))
                pages[there] = pages[here]

    @contextmanager
    def _behind_forwards(self):
        """Kernels launched here run on the stream of the forwards, after what was computed for them on the current one."""
        if self.forward_stream is None:
            yield
            return
        self.forward_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.forward_stream):
            yield

    def _wait_for_forwards(self) -> None:
        if self.packed.on_gpu:
            (self.forward_stream or torch.cuda.current_stream()).synchronize()

    def packed_token_ids(self, pages: list[int]) -> torch.Tensor:
        """[len(pages) * 64] int64 ids that stand for the tokens of packed pages."""
        first = ids_on(self.device, pages) * PAGE_TOKENS + self.packed_base
        return (first[:, None] + torch.arange(PAGE_TOKENS, device=self.device)).flatten()

    def move_kv_cache(self, tgt_loc, src_loc):
        raise NotImplementedError("sgl_hq does not move KV slots (speculative decoding is refused at start)")

    def get_cpu_copy(self, indices, mamba_indices=None):
        raise NotImplementedError("sgl_hq does not offload KV slots (PD retraction is refused at start)")

    def load_cpu_copy(self, kv_cache_cpu, indices, mamba_indices=None):
        raise NotImplementedError("sgl_hq does not offload KV slots (PD retraction is refused at start)")
