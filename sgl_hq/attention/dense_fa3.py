"""SGLang's FlashAttention-3 backend (`layers/attention/flashattention_backend.py`): its dense part as a state, natural logarithm."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from sglang.kernels.ops.attention.flash_attention import flash_attn_with_kvcache
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sgl_hq.attention.dense_view import as_one_column, swapped


class FA3Dense(AttentionBackend):
    """Mixed in before FlashAttentionBackend, whose forward can return its LSE for speculative decoding only."""

    lse_base2 = False

    @contextmanager
    def dense_tables(self, view):
        column = as_one_column(self.req_to_token)
        # Stock takes whole rows by index and cuts them to the longest sequence: give it such rows.
        offsets = torch.arange(int(view.seq_lens_cpu.max()), device=column.device)
        entries = (view.req_pool_indices[:, None] + offsets).clamp_(max=len(column) - 1)  # the excess is not read
        rows = column[entries, 0]
        view.req_pool_indices = torch.arange(len(rows), device=column.device)
        with swapped(self, "req_to_token_pool", SimpleNamespace(req_to_token=rows)):
            yield

    def dense_extend(self, q, k, v, layer, forward_batch, save_kv_cache: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense prefix and, causally, the new tokens: o [rows, q_heads, v_head_dim] bf16, lse [rows, q_heads] float32, not
        contiguous."""
        metadata = self.forward_metadata
        if save_kv_cache:
            slots = KVWriteLoc(forward_batch.out_cache_loc, metadata.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, slots, k, v, layer.k_scale, layer.v_scale)
        k_cache, v_cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        o, lse, *_ = flash_attn_with_kvcache(
            q=q,
            k_cache=k_cache.view(-1, self.page_size, layer.tp_k_head_num, layer.head_dim),
            v_cache=v_cache.view(-1, self.page_size, layer.tp_v_head_num, layer.v_head_dim),
            page_table=metadata.page_table,
            cache_seqlens=metadata.cache_seqlens_int32,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k_new=metadata.cu_seqlens_k,
            max_seqlen_q=metadata.max_seq_len_q,
            softmax_scale=layer.scaling,
            causal=True,
            softcap=layer.logit_cap,
            num_splits=self.num_splits,
            return_softmax_lse=True,
            ver=self.fa_impl_ver,
        )
        return o, lse.T  # FlashAttention gives [q_heads, rows]
