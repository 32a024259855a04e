"""SGLang's MHA pool plus the packed tier.

Slot ids: [0, D + P) are physical dense slots (stock; page 0 is SGLang's padding page), ids from `packed_base` on
name packed tokens. SGLang carries the latter in radix nodes and rows of `req_to_token`, where only their number
matters; they never reach `set_kv_buffer` or the allocator (design.md sections 0.2 and 2).
"""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sgl_hq.config import HQConfig, HQConfigError, from_env
from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.pool.codecs import codecs_of_server
from sgl_hq.pool.packed_tier import PackedTier
from sgl_hq.pool.sizing import KVShape, tiers_of_dense


class HQTokenToKVPool(MHATokenToKVPool):
    """Dense tier of SGLang (`mem_cache/memory_pool.py` MHATokenToKVPool) with a packed tier beside it.

    `packed` is None in mode `exact`. Unsupported movers of KV raise NotImplementedError: they copy slots by id and
    would read packed ids as physical ones.
    """

    def _create_buffers(self):
        super()._create_buffers()
        self.config: HQConfig = from_env()
        self.shape = KVShape(self.layer_num, self.head_num, self.head_dim, self.v_head_dim)
        self.packed: PackedTier | None = None
        self.forward_stream: torch.cuda.Stream | None = None  # the stream of the forwards; None: the current one
        if self.config.packs:
            if self.dtype != torch.bfloat16:
                raise HQConfigError(
                    f"the KV cache dtype is {self.dtype}: packed pages are made from bfloat16, "
                    "start with --dtype bfloat16 --kv-cache-dtype auto"
                )
            codecs = codecs_of_server(self.config, self.shape, self.device)
            layouts = [codec.layout for codec in codecs]
            sizes = tiers_of_dense(self.size, self.config.packed_fraction, layouts, self.shape)
            self.packed = PackedTier(codecs, self.shape, sizes, self.device)
            if self.packed.on_gpu:
                self.packed.warm_up(self.k_buffer, self.v_buffer)

    @property
    def packed_base(self) -> int:
        """First packed token id; page aligned."""
        return self.size + self.page_size

    @property
    def dense_bytes_allocated(self) -> int:
        """Bytes of the dense tier, SGLang's padding page included."""
        return sum(buffer.nbytes for buffer in (*self.k_buffer, *self.v_buffer))

    def get_kv_size_bytes(self):
        """(K, V) bytes; the packed tier, which mixes both in one record, is counted half and half."""
        k_bytes, v_bytes = super().get_kv_size_bytes()
        packed = self.packed.bytes_allocated if self.packed else 0
        return k_bytes + packed // 2, v_bytes + packed - packed // 2

    def pack_pages(self, dense_slots: torch.Tensor, starts_sequence: bool) -> list[int]:
        """Copy whole dense pages into the packed tier (`PackedTier.write`); the caller frees the dense pages.

        With SGLang's overlap schedule a forward may be under way whose KV these pages hold, or which reads the packed
        pages that are overwritten here. So the kernel runs behind it, on its stream; whoever writes into the freed
        dense pages is a later forward on that stream. `write` waits for the kernel: the host, and the GPU after it,
        idle from the end of that forward to the next launch, once per packed node.
        """
        if self.forward_stream is None:
            return self.packed.write(self.k_buffer, self.v_buffer, dense_slots, starts_sequence)
        self.forward_stream.wait_stream(torch.cuda.current_stream())  # `dense_slots` was computed there
        with torch.cuda.stream(self.forward_stream):
            return self.packed.write(self.k_buffer, self.v_buffer, dense_slots, starts_sequence)

    def packed_token_ids(self, pages: list[int]) -> torch.Tensor:
        """[len(pages) * 64] int64 ids that stand for the tokens of packed pages."""
        first = torch.tensor(pages, dtype=torch.int64, device=self.device) * PAGE_TOKENS + self.packed_base
        return (first[:, None] + torch.arange(PAGE_TOKENS, device=self.device)).flatten()

    def move_kv_cache(self, tgt_loc, src_loc):
        raise NotImplementedError("sgl_hq does not move KV slots (speculative decoding is refused at start)")

    def get_cpu_copy(self, indices, mamba_indices=None):
        raise NotImplementedError("sgl_hq does not offload KV slots (PD retraction is refused at start)")

    def load_cpu_copy(self, kv_cache_cpu, indices, mamba_indices=None):
        raise NotImplementedError("sgl_hq does not offload KV slots (PD retraction is refused at start)")
