"""Merging attention states (`records.AttnState`).

Merging is associative and commutative; the neutral element has lse -inf and any finite o.
Source: FlashInfer docs/tutorials/recursive_attention.rst.
"""

from __future__ import annotations

import torch

from sgl_hq.records import AttnState


def empty_state(rows: int, q_heads: int, v_head_dim: int, device) -> AttnState:
    """The neutral element: attention over no tokens."""
    return AttnState(
        torch.zeros(rows, q_heads, v_head_dim, dtype=torch.float32, device=device),
        torch.full((rows, q_heads), float("-inf"), dtype=torch.float32, device=device),
    )


def merge(a: AttnState, b: AttnState) -> AttnState:
    """State over the union of two disjoint parts."""
    top = torch.maximum(a.lse_nat, b.lse_nat)
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top)  # both empty: exp(-inf - 0) = 0, no NaN
    wa, wb = torch.exp(a.lse_nat - top), torch.exp(b.lse_nat - top)
    total = wa + wb
    scale = torch.where(total == 0, torch.ones_like(total), total)
    o = (a.o * (wa / scale)[..., None]).addcmul_(b.o, (wb / scale)[..., None])
    return AttnState(o, top + torch.log(total))


def merge_into(state: AttnState, rows: torch.Tensor, part: AttnState) -> None:
    """Merge `part` (one row per entry of `rows`, int64, distinct) into those rows of `state`, in place."""
    merged = merge(AttnState(state.o[rows], state.lse_nat[rows]), part)
    state.o[rows] = merged.o
    state.lse_nat[rows] = merged.lse_nat
