"""What an error in K or V costs: a Gauss-Newton metric per layer and kv head, measured with gradients.

The gate bounds two squares: of the change of the logits, and of the relative change of a layer's attention output. For
f(K, V) with derivative J and random r of unit covariance, E[(r . J dK)^2] = |J dK|^2, so the outer products of
d(r . f)/dK, summed over tokens, estimate the quadratic form |J dK|^2. One backward pass per r and window. Both squares
count as shares of their bounds. K is taken after RoPE, as it is cached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from sgl_hq.calibration.attention_recorder import AttentionRecorder
from sgl_hq.gate.bounds import BOUNDS
from sgl_hq.page_format import PAGE_TOKENS

SINK_TOKENS = 4  # kept in bfloat16 by the formats that use this: their errors are zero
LIMITS = {bound.figure: bound.limit for bound in BOUNDS}
_SEED = 0


@dataclass(frozen=True)
class Sensitivity:
    """Of one side, K or V. metric, covariance: `[layers, kv_heads, D, D] float64`.

    metric: cost per decode step of a unit error in every token: logit error (mean square over the vocabulary) and relative
    error of the layer's attention output (squared, mean over layers), each as a share of the gate's bound.
    covariance: of the cached values; of K around the mean of each page, which a packed page stores apart.
    """

    metric: torch.Tensor
    covariance: torch.Tensor


def measure_sensitivity(
    model: Any, windows: Sequence[list[int]], prefix_tokens: int, steps: int, probes: int, advance: Callable[[], None]
) -> tuple[Sensitivity, Sensitivity]:
    """(of K, of V), averaged over windows of `prefix_tokens + steps` token ids. model: transformers, float32, CPU or GPU.

    advance: called after every window.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator(device=model.device).manual_seed(_SEED)
    sums = None
    for ids in windows:
        found = _measure_window(model, torch.tensor([ids], device=model.device), prefix_tokens, steps, probes, generator)
        sums = found if sums is None else [total + part for total, part in zip(sums, found, strict=True)]
        advance()
    k_metric, v_metric, k_covariance, v_covariance = (total.cpu() / len(windows) for total in sums)
    return Sensitivity(k_metric, k_covariance), Sensitivity(v_metric, v_covariance)


def _measure_window(model, ids, prefix_tokens, steps, probes, generator) -> list[torch.Tensor]:
    """Metric of K, of V, covariance of K, of V, of one window."""
    prefix = DynamicCache()
    with torch.no_grad():
        model(ids[:, :prefix_tokens], past_key_values=prefix, logits_to_keep=1)
    sides = [[_rounded(getattr(layer, side)) for layer in prefix.layers] for side in ("keys", "values")]
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(*sides, strict=True)):
        cache.update(k, v, layer)
    with AttentionRecorder(model) as recorder:
        logits = model(ids[:, prefix_tokens : prefix_tokens + steps], past_key_values=cache).logits
        outputs = recorder.local_outputs()  # of every layer, `[S, hidden]`
    leaves, metrics = [*sides[0], *sides[1]], [0.0, 0.0]

    def add(outputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(total, leaves, retain_graph=True)
        for side, part in enumerate((gradients[: len(sides[0])], gradients[len(sides[0]) :])):
            metrics[side] = metrics[side] + _outer(part) / (probes * steps)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device)

    for _ in range(probes):
        add([logits], [noise(logits) / math.sqrt(logits.shape[-1] * LIMITS["mse_max"])])
        per_layer = LIMITS["rel_l2_max"] * math.sqrt(len(outputs))
        add(outputs, [noise(out) / out.detach().norm(dim=-1, keepdim=True) / per_layer for out in outputs])
    centred = [k.unflatten(2, (-1, PAGE_TOKENS)) for k in sides[0]]
    centred = [(pages - pages.mean(3, keepdim=True)).flatten(2, 3) for pages in centred]
    return [*metrics, _outer(centred) / prefix_tokens, _outer(sides[1]) / prefix_tokens]


def _rounded(side: torch.Tensor) -> torch.Tensor:
    """A leaf for gradients, with the values that a bfloat16 cache holds."""
    return side.bfloat16().float().requires_grad_()


def _outer(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over tokens of the outer products, sinks left out: `[1, H, T, D]` a layer -> `[layers, H, D, D] float64`."""
    kept = torch.stack([layer.detach()[0, :, SINK_TOKENS:] for layer in layers])
    return (kept.mT @ kept).double()
