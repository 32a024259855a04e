"""SGLang's FlashInfer backend (`layers/attention/flashinfer_backend.py`): its dense part as a state, base-2 logarithm."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from flashinfer.cascade import merge_state
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sgl_hq.attention.dense_view import as_one_column, swapped


class FlashInferDense(AttentionBackend):
    """Mixed in before FlashInferAttnBackend. One wrapper per kind: windows and cross attention are refused at start."""

    lse_base2 = True

    @contextmanager
    def dense_tables(self, view):
        with swapped(self.indices_updater_prefill, "req_to_token", as_one_column(self.req_to_token_pool.req_to_token)):
            yield

    def dense_extend(self, q, k, v, layer, forward_batch, save_kv_cache: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense prefix and, causally, the new tokens: o [rows, q_heads, v_head_dim] bf16, lse [rows, q_heads] float32."""
        metadata = self.forward_metadata
        if save_kv_cache:
            slots = KVWriteLoc(forward_batch.out_cache_loc, metadata.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, slots, k, v, *self._kv_write_scales(layer))
        (paged,) = metadata.prefill_wrappers
        cache = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        options = {"sm_scale": layer.scaling, "logits_soft_cap": layer.logit_cap}
        if not metadata.use_ragged:  # prefix and new tokens from the cache in one call
            return paged.forward_return_lse(q, cache, causal=True, k_scale=layer.k_scale_float, v_scale=layer.v_scale_float, **options)
        k, v = k.view(-1, layer.tp_k_head_num, layer.head_dim), v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        o, lse = self.prefill_wrapper_ragged.forward_return_lse(q, k, v, causal=True, **options)
        if metadata.extend_no_prefix:
            return o, lse
        return merge_state(o, lse, *paged.forward_return_lse(q, cache, causal=False, **options))
