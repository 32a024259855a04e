"""p_attn: the share of a decode step that attention takes on this machine.

Measured on transformers' model in the checkpoint's bfloat16, because its attention is one function that can be watched
on a CPU and on a GPU alike, with a KV cache of the wanted context and batch and without a server. "Attention" is
the call that reads K and V (PyTorch's SDPA); projections, RoPE and the write of the new token are the rest of the step.
A server that fuses the rest (SGLang on a GPU) has a larger share than this; one with slower attention, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sgl_hq.gate.attention_hook import attention_through
from sgl_hq.hq_cache import HQCache
from sgl_hq.lab.clocks import clock_of
from sgl_hq.lab.errors import LabError
from sgl_hq.lab.slot_cache import SlotCache

WARM_UP_STEPS = 2
_NAME = "sgl_hq_ceiling"


@dataclass(frozen=True)
class AttentionShare:
    """Of `len(step_s)` timed decode steps. kv_bytes: K and V that one step reads, all rows and layers."""

    context_tokens: int
    batch: int
    kv_bytes: int
    step_s: tuple[float, ...]
    attention_s: tuple[float, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(inside / whole for inside, whole in zip(self.attention_s, self.step_s, strict=True))

    @property
    def p_attn(self) -> float:
        """Median over the steps."""
        return statistics.median(self.shares)

    @property
    def read_gb_per_s(self) -> float:
        """K and V, 10^9 bytes a second of attention: far below the memory's speed, p_attn is that of a slow kernel."""
        return self.kv_bytes / statistics.median(self.attention_s) / 1e9


@torch.inference_mode()
def measure_share(
    model: Any, ids: list[int], batch: int, steps: int, advance: Callable[[], None] = lambda: None
) -> AttentionShare:
    """ids: the context and the token to decode. model: in bfloat16 and eval mode. advance: called after the prefill and after every
    step, warm-up included.

    Raises LabError if K and V do not fit into memory, or if the model's attention cannot be watched.
    """
    tokens = torch.tensor([ids], device=model.device)
    prefix = HQCache("bf16")  # an uncompressed cache: nothing is packed here
    model(input_ids=tokens[:, :-1], past_key_values=prefix, logits_to_keep=1)
    advance()
    kv_bytes = batch * sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.layers)
    _check_memory(kv_bytes, model.device)
    cache, last = SlotCache(prefix, batch), tokens[:, -1:].expand(batch, 1)
    clock, calls = clock_of(model.device), 0

    def attend(module, query, key, value, attention_mask, **options):
        nonlocal calls
        calls += 1
        with clock.attention():
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    timed = []
    with attention_through(model, _NAME, attend):
        for step in range(WARM_UP_STEPS + steps):
            found = clock.time(lambda: model(input_ids=last, past_key_values=cache))
            timed += [found] if step >= WARM_UP_STEPS else []
            advance()
    if not calls:
        raise LabError(f"{type(model).__name__} does not use transformers' AttentionInterface, so its attention cannot be timed: give --p-attn")
    whole, inside = zip(*timed, strict=True)
    return AttentionShare(len(ids) - 1, batch, kv_bytes, whole, inside)


def _check_memory(kv_bytes: int, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the float32 weights are gone, PyTorch still keeps their memory
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    if kv_bytes > free:
        raise LabError(f"K and V need {kv_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: give a smaller --batch or --context")
