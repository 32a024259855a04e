"""A function of ours in the place of a transformers model's attention, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from sgl_hq.gate.errors import GateError

_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")  # names of the last linear map of an attention layer


@contextmanager
def attention_through(model: Any, name: str, attend: Callable[..., Any]) -> Iterator[None]:
    """`attend` has the arguments and the result of transformers' `sdpa_attention_forward`; `name` is its own in
    transformers' registry. The model's attention is restored on exit."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def project_output(module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
    """output `[1, S, Hq, D]` -> `[S, hidden]` through the layer's output projection, without its bias."""
    for name in _OUTPUT_PROJECTIONS:
        linear = getattr(module, name, None)
        if isinstance(linear, torch.nn.Linear):
            return functional.linear(output[0].flatten(1), linear.weight)
        if isinstance(linear, Conv1D):  # GPT-2: a linear map whose weight is transposed
            return output[0].flatten(1) @ linear.weight
    raise GateError(
        f"{type(module).__name__} has no output projection called {', '.join(_OUTPUT_PROJECTIONS)}: the gate cannot measure it"
    )


def relative_error(projected: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Both `[S, hidden]`, one layer's output -> `[S]`: |projected - dense| / |dense|."""
    tiny = torch.finfo(dense.dtype).tiny
    return (projected - dense).norm(dim=-1) / dense.norm(dim=-1).clamp_min(tiny)


def median_over_layers(errors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[S]` of every layer -> `[S]`; infinite for NaN."""
    return torch.stack(tuple(errors)).quantile(0.5, dim=0).nan_to_num(nan=torch.inf, posinf=torch.inf)
