"""Two layer-local figures of a format beside the gate's: how well it keeps the directions of scores and of outputs.

    score cosine    between q.k over the prefix with packed and with dense K: one vector for each step, layer and query head
    output cosine   between the attention output with packed and with dense K and V: one vector for each of the same

Both come from the dense arm's queries. A cosine says nothing about length, and softmax turns a longer score vector into
a sharper distribution: a high score cosine alone is no evidence of quality.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sgl_hq.gate.attention_hook import attention_through
from sgl_hq.hq_cache import HQCache
from sgl_hq.prefix_codec import PrefixCodec

_NAME = "sgl_hq_cosines"


@dataclass(frozen=True)
class Cosines:
    """Means, and the worst single vector."""

    score_cos_mean: float
    score_cos_min: float
    output_cos_mean: float
    output_cos_min: float


@torch.inference_mode()
def measure_cosines(
    model: Any,
    texts: Sequence[Sequence[int]],
    prefixes: Sequence[int],
    steps: int,
    codecs: Sequence[PrefixCodec],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Cosines]:
    """By codec name, over all texts, prefixes and steps. texts: token ids, max(prefixes) + steps each; prefixes: multiples of 64.

    Unlike the gate this needs one forward for all codecs: nothing of a packed arm reaches the next layer. advance: called
    for every text and prefix.
    """
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for ids in texts:
        tokens = torch.tensor([ids], device=model.device)
        for prefix_tokens in prefixes:
            cache = HQCache("bf16")
            model(input_ids=tokens[:, :prefix_tokens], past_key_values=cache, logits_to_keep=1)
            with attention_through(model, _NAME, _comparing(codecs, prefix_tokens, found)):
                model(input_ids=tokens[:, prefix_tokens : prefix_tokens + steps], past_key_values=cache)
            advance()
    return {name: _summary(layers) for name, layers in found.items()}


def _comparing(
    codecs: Sequence[PrefixCodec], prefix_tokens: int, found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]
) -> Callable[..., Any]:
    """An attention function that adds to `found`, for each codec, the score and the output cosines of its layer."""

    def attend(module, query, key, value, attention_mask, **options):
        def output(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return sdpa_attention_forward(module, query, k, v, attention_mask, **options)[0]

        dense, prefix = output(key, value), [side[:, :, :prefix_tokens] for side in (key, value)]
        scores = _scores(query[0], prefix[0][0])
        for codec in codecs:
            packed = _through(codec, module.layer_idx, *prefix)
            k, v = (torch.cat([side, whole[:, :, prefix_tokens:]], 2) for side, whole in zip(packed, (key, value), strict=True))
            of_scores = cosine_similarity(_scores(query[0], packed[0][0]), scores, dim=-1)
            found[codec.name].append((of_scores, cosine_similarity(output(k, v)[0], dense[0], dim=-1)))
        return dense, None

    return attend


def _through(codec: PrefixCodec, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v `[1, H, T, D]` float32 holding bfloat16 values -> the same shapes, packed and unpacked."""
    packed = codec.pack(layer, *(side[0].transpose(0, 1).bfloat16() for side in (k, v)))
    return tuple(side[None].to(k.dtype) for side in codec.unpack(layer, packed))


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """query `[Hq, S, D]`, key `[Hkv, T, D]` -> `[Hq, S, T]`, unscaled."""
    return query @ key.repeat_interleave(len(query) // len(key), 0).mT


def _summary(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> Cosines:
    scores, outputs = (torch.cat([side.flatten().double() for side in sides]) for sides in zip(*layers, strict=True))
    return Cosines(scores.mean().item(), scores.min().item(), outputs.mean().item(), outputs.min().item())
