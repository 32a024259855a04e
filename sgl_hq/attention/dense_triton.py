"""SGLang's Triton backend (`layers/attention/triton_backend.py`): its dense part as a state, natural logarithm."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sgl_hq.attention.dense_view import as_one_column, swapped


class TritonDense(AttentionBackend):
    """Mixed in before TritonAttnBackend, whose own forward does the work."""

    lse_base2 = False

    @contextmanager
    def dense_tables(self, view):
        with swapped(self, "req_to_token", as_one_column(self.req_to_token)):
            yield

    def dense_extend(self, q, k, v, layer, forward_batch, save_kv_cache: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense prefix and, causally, the new tokens: o [rows, q_heads * v_head_dim] bf16, lse [rows, q_heads] float32."""
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        with swapped(self, "extend_attention_fwd", partial(self.extend_attention_fwd, lse_extend=lse)):
            # Stock wants rows as flat as the model gives them: `empty_like(q)` becomes the output.
            o = super().forward_extend(q.flatten(1), k, v, layer, forward_batch, save_kv_cache)
        return o, lse
