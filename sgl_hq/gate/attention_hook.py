"""A function of ours in the place of a transformers model's attention, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sgl_hq.gate.errors import GateError

_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense")  # names of the last linear map of an attention layer


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
        if isinstance(linear := getattr(module, name, None), torch.nn.Linear):
            return functional.linear(output[0].flatten(1), linear.weight)
    raise GateError(
        f"{type(module).__name__} has no output projection called {', '.join(_OUTPUT_PROJECTIONS)}: the gate cannot measure it"
    )
