"""PyTorch path for CPU tensors: every row of the group against the same keys in one call."""

from __future__ import annotations

import torch

from sgl_hq.records import AttnState

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False) -> AttnState:
    """q: [rows, q_heads, head_dim]; k, v: [kv_heads, tokens, head_dim], same dtype (bf16 or float32), tokens >= 1.

    causal: row i sees keys 0..i (rows == tokens). Query head h reads kv head h // (q_heads // kv_heads).
    PyTorch's CPU flash attention accumulates in float32 and returns o in the input dtype and a natural-log lse.
    """
    o, lse = _flash_cpu(q.transpose(0, 1)[None], k[None], v[None], 0.0, causal, scale=scale)
    return AttnState(o[0].transpose(0, 1).float(), lse[0].transpose(0, 1))


def attend_group(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttnState:
    """Non-causal attention of all rows over a packed run; q is computed in the dtype the codec returned (k.dtype)."""
    return attend(q.to(k.dtype), k, v, scale)
