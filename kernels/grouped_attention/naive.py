"""The definition, in float64, with loops: what every attention path of the project is compared with."""

from __future__ import annotations

import torch

from sgl_hq.records import AttnState


def attend_naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False) -> AttnState:
    """Same arguments as `reference.attend`, any float dtypes, tokens >= 0. Returns a float64 state."""
    rows, q_heads, _ = q.shape
    kv_heads, tokens, v_dim = v.shape
    o = torch.zeros(rows, q_heads, v_dim, dtype=torch.float64)
    lse = torch.full((rows, q_heads), float("-inf"), dtype=torch.float64)
    for row in range(rows):
        seen = min(tokens, row + 1) if causal else tokens
        for head in range(q_heads):
            kv = head // (q_heads // kv_heads)
            scores = k[kv, :seen].double() @ q[row, head].double() * scale
            if seen:
                lse[row, head] = torch.logsumexp(scores, 0)
                o[row, head] = torch.softmax(scores, 0) @ v[kv, :seen].double()
    return AttnState(o, lse)
