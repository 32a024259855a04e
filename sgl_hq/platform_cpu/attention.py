"""Attention on a CPU: dense prefix and the causal new tokens as two states, merged.

SGLang's `torch_native` backend builds a query as long as the whole sequence for every extend and throws the prefix
rows away (`layers/attention/torch_native_backend.py` `_run_sdpa_forward_extend`): 100 new tokens after a prefix of
1,000 cost 1,100 query rows. Here only new tokens are queries. Both arms of an A/B on a CPU use this class.
"""

from __future__ import annotations

from typing import Sequence

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sgl_hq.attention.merge import merge
from sgl_hq.kernels.grouped_attention.reference import attend
from sgl_hq.records import AttnState


class CPUAttnBackend(TorchNativeAttnBackend):
    """Layers that are not plain causal self-attention, or share another layer's KV, go to the stock class."""

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if k is None or not _is_plain(layer):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache:
            self.write_kv(k, v, layer, forward_batch)
        starts = [0] * forward_batch.batch_size
        state = self.extend_state(q.view(-1, layer.tp_q_head_num, layer.qk_head_dim), k, v, layer, forward_batch, starts)
        return state.o.to(q.dtype).flatten(1)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if k is None or not _is_plain(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache:
            self.write_kv(k, v, layer, forward_batch)
        starts = [0] * forward_batch.batch_size
        state = self.decode_state(q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim), layer, forward_batch, starts)
        return state.o.to(q.dtype).flatten(1)

    def write_kv(self, k, v, layer, forward_batch) -> None:
        """Store the new tokens' K and V in the dense tier."""
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v)

    def extend_state(self, q, k, v, layer, forward_batch, dense_starts: Sequence[int]) -> AttnState:
        """New tokens of every request over their dense tokens [dense_starts[i], seq_len_i).

        q: [new tokens, q_heads, head_dim]; k, v: [new tokens, kv_heads, head_dim].
        """
        parts, begin = [], 0
        prefix_lens, new_lens = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
        for i, (prefix, new) in enumerate(zip(map(int, prefix_lens), map(int, new_lens))):
            end = begin + new
            own_k = k[begin:end].view(new, -1, layer.qk_head_dim).transpose(0, 1)
            own_v = v[begin:end].view(new, -1, layer.v_head_dim).transpose(0, 1)
            state = attend(q[begin:end], own_k, own_v, layer.scaling, causal=True)
            if prefix > dense_starts[i]:
                pre_k, pre_v = self._dense_kv(layer, forward_batch, i, dense_starts[i], prefix, q.dtype)
                state = merge(attend(q[begin:end], pre_k, pre_v, layer.scaling), state)
            parts.append(state)
            begin = end
        return AttnState(torch.cat([p.o for p in parts]), torch.cat([p.lse_nat for p in parts]))

    def decode_state(self, q, layer, forward_batch, dense_starts: Sequence[int]) -> AttnState:
        """One token of every request over its dense tokens [dense_starts[i], seq_len_i). q: [requests, q_heads, head_dim]."""
        parts = []
        for i, seq_len in enumerate(forward_batch.seq_lens_cpu.tolist()):
            k, v = self._dense_kv(layer, forward_batch, i, dense_starts[i], seq_len, q.dtype)
            parts.append(attend(q[i : i + 1], k, v, layer.scaling))
        return AttnState(torch.cat([p.o for p in parts]), torch.cat([p.lse_nat for p in parts]))

    def _dense_kv(self, layer, forward_batch, i: int, start: int, end: int, dtype: torch.dtype):
        """K, V [kv_heads, end - start, head_dim] of dense positions [start, end) of request i, in `dtype` (the
        queries' own: a float32 model may have a bfloat16 cache); start is page aligned.

        Whole pages are copied: one memcpy each, against one per token (28 % of a decode step on 2 cores).
        """
        page = self.token_to_kv_pool.page_size
        first_slots = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices[i], start:end:page]
        pages = first_slots // page

        def gather(buffer):
            return buffer.unflatten(0, (-1, page)).index_select(0, pages).flatten(0, 1)[: end - start].transpose(0, 1)

        k, v = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        return gather(k).to(dtype), gather(v).to(dtype)


def _is_plain(layer) -> bool:
    return (
        not layer.is_cross_attention
        and layer.attn_type != AttentionType.ENCODER_ONLY
        and layer.sliding_window_size <= 0
        and layer.qk_head_dim == layer.v_head_dim
    )
