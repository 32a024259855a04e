"""The attention layer: owns what belongs to one layer of the packed tier and computes its packed state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sgl_hq.attention.device_plan import DevicePlan
from sgl_hq.attention.merge import empty_state, merge_into
from sgl_hq.attention.plan import PackedPlan
from sgl_hq.kernels.grouped_attention import attend_group
from sgl_hq.kernels.grouped_attention.launcher import grouped_attention, merge
from sgl_hq.kernels.grouped_attention.launcher_dense import dense_attention
from sgl_hq.pool.two_tier_pool import HQTokenToKVPool
from sgl_hq.records import AttnState


class DenseState(NamedTuple):
    """What a stock backend computed for its dense part. o: [rows, q_heads, v_head_dim] bf16 or float32; lse: [rows, q_heads]
    float32 of any strides, base 2 if `base2` (FlashInfer), else natural."""

    o: torch.Tensor
    lse: torch.Tensor
    base2: bool


class HQRadixAttention(RadixAttention):
    """Replaces SGLang's class (`layers/radix_attention.py`) before any model is built; `forward` is inherited."""

    def packed_state(self, q: torch.Tensor, plan: PackedPlan, pool: HQTokenToKVPool) -> AttnState:
        """Attention of the batch's query rows over their packed runs; each group's pages are unpacked once.

        q: [rows, q_heads, head_dim], already rotated. Rows without a packed run get the empty state.
        """
        state = empty_state(q.shape[0], self.tp_q_head_num, self.v_head_dim, q.device)
        layer = self.layer_id - pool.start_layer
        for group in plan.groups:
            k, v = pool.packed.read(layer, group.pages, group.first_page)
            merge_into(state, group.q_rows, attend_group(q[group.q_rows], k, v, self.scaling))
        return state

    def attend_packed(self, q: torch.Tensor, plan: DevicePlan, pool: HQTokenToKVPool) -> None:
        """On a GPU: partial states of the plan's rows over its packed pages, into the plan's buffers. No synchronisation.

        q: [rows, q_heads, head_dim] bf16, contiguous, already rotated.
        """
        grouped_attention(q, pool.packed.records[self.layer_id - pool.start_layer], plan.layout, plan.work, self.scaling)

    def attend_dense(self, q: torch.Tensor, plan: DevicePlan, pool: HQTokenToKVPool) -> None:
        """On a GPU, in decode: the same over the dense pages that the plan has listed."""
        dense_attention(q, *pool.get_kv_buffer(self.layer_id), plan.dense, self.scaling)

    def join_packed(
        self, q: torch.Tensor, state: DenseState | None, plan: DevicePlan, pool: HQTokenToKVPool, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `attend_packed` left, the sinks and the dense part of the same rows, as one output.

        state: of the dense part; None: it is what `attend_dense` left. Returns [rows, q_heads * v_head_dim] of q.dtype, in `out` if given.
        """
        sinks = pool.packed.sink_slots[self.layer_id - pool.start_layer] if plan.layout.fmt.sink_tokens else None
        out = torch.empty_like(q) if out is None else out.view(q.shape)
        if state is None:
            rest = {"dense": plan.dense}
        else:
            rest = {"dense_o": state.o.contiguous(), "dense_lse": state.lse, "base2": state.base2}
        merge(q, plan.work, plan.layout, self.scaling, sinks=sinks, **rest, out=out)
        return out.flatten(1)

    def why_not_packable(self) -> str | None:
        """The reason this layer cannot read a packed prefix, or None. Checked before the first request."""
        if self.is_cross_attention or self.attn_type != AttentionType.DECODER:
            return "it is cross attention or not a causal decoder layer"
        if self.sliding_window_size > 0 or self.use_irope:
            return "it attends to a sliding window or to chunks"
        if self.logit_cap:
            return "it caps its logits"
        if self.xai_temperature_len > 0:
            return "it scales its logits by position"
        if self.qk_head_dim != self.v_head_dim:
            return f"its K and V head dims differ ({self.qk_head_dim} and {self.v_head_dim})"
        return None
