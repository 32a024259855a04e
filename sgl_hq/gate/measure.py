"""Dense arm and packed arms of one window: prefill once, then a teacher-forced chunk of steps after every prefix.

    prefill   tokens [0, longest prefix)                 one forward; K and V of a prefix do not depend on what follows
    dense     tokens [N, N + steps) after the prefix N    one causal forward, K and V as bfloat16
    packed    the same tokens after unpack(pack(prefix))  the same code path; the chunk's own K and V are computed anew
                                                          from disturbed hidden states, so errors propagate

One causal forward over the chunk is the same arithmetic as decoding its tokens one by one (a test compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sgl_hq.gate.attention_probe import AttentionProbe
from sgl_hq.gate.bounds import TOP_K
from sgl_hq.gate.errors import GateError
from sgl_hq.gate.figures import Trial
from sgl_hq.gate.metrics import StepFigures, compare_logits
from sgl_hq.hq_cache import HQCache
from sgl_hq.kernels.page_codec import UnpackablePageError
from sgl_hq.prefix_codec import PrefixCodec

PREFILL_COST = 12  # a prefill takes about as long as this many chunks (SmolLM2, 2,048 tokens): for the progress bar


@torch.inference_mode()
def measure_window(
    model: Any,
    window: str,
    ids: Sequence[int],
    prefixes: Sequence[int],
    steps: int,
    codecs: Sequence[PrefixCodec],
    advance: Callable[[int], None] = lambda cost: None,
) -> dict[str, list[Trial]]:
    """Trials by codec name, one for each prefix.

    Args:
        model: a causal language model of transformers in float32 and eval mode.
        ids: max(prefixes) + steps + 1 tokens. prefixes: multiples of 64.
        advance: called with the cost of what has just been done; `window_cost` in total.
    Raises:
        GateError: the model's own logits are not finite, or its attention cannot be watched.
    """
    tokens = torch.tensor([ids], device=model.device)
    prefill = HQCache("bf16")
    model(input_ids=tokens[:, : max(prefixes)], past_key_values=prefill, logits_to_keep=1)
    advance(PREFILL_COST)
    trials: dict[str, list[Trial]] = {codec.name: [] for codec in codecs}
    with AttentionProbe(model) as probe:
        for prefix_tokens in prefixes:
            chunk = tokens[:, prefix_tokens : prefix_tokens + steps]
            following = tokens[0, prefix_tokens + 1 : prefix_tokens + steps + 1]
            with probe.dense_arm():
                dense = _logits(model, chunk, _prefix(prefill, prefix_tokens, prefill.codec))
            if not dense.isfinite().all():
                raise GateError(f"the model's own logits are not finite on window {window}: check the checkpoint")
            advance(1)
            for codec in codecs:
                cache = _prefix(prefill, prefix_tokens, codec)
                _pack(cache, window)
                with probe.packed_arm():
                    packed = _logits(model, chunk, cache)
                figures = compare_logits(dense, packed, following)
                trials[codec.name].append(_trial(window, cache, figures, probe.relative_l2()))
                advance(1)
    return trials


def window_cost(prefixes: int, codecs: int) -> int:
    """What `advance` is called with in total for one window."""
    return PREFILL_COST + prefixes * (1 + codecs)


def _prefix(prefill: HQCache, prefix_tokens: int, codec: PrefixCodec) -> HQCache:
    """A dense cache of the first `prefix_tokens` tokens that will pack with `codec`."""
    cache = HQCache(codec)
    for index, layer in enumerate(prefill.layers):
        cache.update(layer.keys[:, :, :prefix_tokens], layer.values[:, :, :prefix_tokens], index)
    return cache


def _pack(cache: HQCache, window: str) -> None:
    try:
        cache.pack()
    except UnpackablePageError as error:
        raise GateError(f"{cache.codec.name} cannot hold K or V of window {window} ({error})") from error


def _logits(model: Any, chunk: torch.Tensor, cache: HQCache) -> torch.Tensor:
    """`[S, vocabulary]`."""
    return model(input_ids=chunk, past_key_values=cache).logits[0]


def _trial(window: str, cache: HQCache, figures: StepFigures, rel_l2: torch.Tensor) -> Trial:
    prefix_tokens, layer = cache.packed_tokens, cache.layers[0]
    dims = layer.keys.shape[-1], layer.values.shape[-1]
    values = sum(prefix_tokens * (la.keys[0, :, 0].numel() + la.values[0, :, 0].numel()) for la in cache.layers)
    judged = int(figures.argmax_judged.sum())
    judged_equal = int((figures.argmax_equal & figures.argmax_judged).sum())
    return Trial(
        window=window,
        prefix_tokens=prefix_tokens,
        steps=len(figures.mse),
        mse_max=float(figures.mse.max()),
        mse_mean=float(figures.mse.mean()),
        variance_mse_max=float(figures.variance_mse.max()),
        topk_min=int(figures.topk_common.min()) / TOP_K,
        argmax_judged=judged,
        argmax_equal=judged_equal / judged if judged else 1.0,
        argmax_agreement=float(figures.argmax_equal.double().mean()),
        rel_l2_max=float(rel_l2.max()),
        kl_max=float(figures.kl.max()),
        kl_mean=float(figures.kl.mean()),
        nll_dense=float(figures.nll_dense.mean()),
        nll_packed=float(figures.nll_packed.mean()),
        stored_bits=8 * cache.packed_bytes / values,
        effective_bits=cache.codec.effective_bits_per_dim(*dims, prefix_tokens),
    )
