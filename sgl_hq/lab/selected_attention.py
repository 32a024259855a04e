"""A model's attention with a selector in it: every layer and decode step attends only to the tokens that it keeps.

    watching(selectors)   the dense arm's chunk; each layer is also computed with every selector from the *dense* query and
                          K, V, which gives the layer-local error of each
    selecting(selector)   the selection acts: the next layer's input comes from what was kept

Dense and selected attention are the same call with another mask, so keeping everything gives the dense arm's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sgl_hq.gate.attention_hook import attention_through, median_over_layers, project_output, relative_error
from sgl_hq.lab.errors import LabError
from sgl_hq.lab.selectors import Selector, StepQueries

_NAME = "sgl_hq_oracle"
_Layer = Callable[[StepQueries, Callable[[torch.Tensor], torch.Tensor], torch.nn.Module], torch.Tensor]


class SelectedAttention:
    """For `model`, one row at a time. All figures are `[S]`, one for each step of the last chunk."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = model.config.get_text_config().num_hidden_layers

    @contextmanager
    def watching(self, selectors: Sequence[Selector]) -> Iterator[None]:
        self._errors: dict[str, list[torch.Tensor]] = {selector.name: [] for selector in selectors}

        def layer(steps, attend, module):
            dense = attend(steps.visible[None])
            projected = project_output(module, dense)
            for selector in selectors:
                local = project_output(module, attend(selector.keep(steps)))
                self._errors[selector.name].append(relative_error(local, projected))
            return dense

        with self._running(layer):
            yield

    @contextmanager
    def selecting(self, selector: Selector) -> Iterator[None]:
        self._attended: list[torch.Tensor] = []
        self._read: list[torch.Tensor] = []

        def layer(steps, attend, module):
            kept = selector.keep(steps)
            of_kv_heads = kept.unflatten(0, (-1, max(1, len(kept) // len(steps.key)))).any(1)
            seen = steps.visible.sum(-1)
            self._attended.append((kept.sum(-1) / seen).mean(0))
            self._read.append((of_kv_heads.sum(-1) / seen).mean(0) + selector.index_fraction(steps.layer))
            return attend(kept)

        with self._running(layer):
            yield

    def relative_l2(self, selector: Selector) -> torch.Tensor:
        """Layer-local, after the output projection, median over the layers; infinite for NaN."""
        return median_over_layers(self._errors[selector.name])

    def kept_fraction(self) -> torch.Tensor:
        """Tokens attended to / tokens before and at the step, mean over layers and query heads."""
        return torch.stack(self._attended).mean(0)

    def read_fraction(self) -> torch.Tensor:
        """What a kernel has to read: a token that any query head of a kv head attends to, and the selector's own index."""
        return torch.stack(self._read).mean(0)

    @contextmanager
    def _running(self, layer: _Layer) -> Iterator[None]:
        calls = 0

        def attend(module, query, key, value, attention_mask, **options):
            nonlocal calls
            calls += 1
            steps = _step_queries(module.layer_idx, query, key, options.get("scaling"))

            def masked(kept: torch.Tensor) -> torch.Tensor:
                return sdpa_attention_forward(module, query, key, value, kept[None], **options)[0]

            return layer(steps, masked, module), None

        with attention_through(self._model, _NAME, attend):
            yield
        if calls != self._layers:
            raise LabError(
                f"{calls} of {self._layers} layers of this model use transformers' AttentionInterface: selectors cannot act on it"
            )


def _step_queries(layer: int, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> StepQueries:
    """query `[1, Hq, S, D]`, key `[1, Hkv, L, D]`; the chunk is the last S of L tokens."""
    steps, length = query.shape[2], key.shape[2]
    token, last = (torch.arange(begin, length, device=query.device) for begin in (0, length - steps))
    return StepQueries(layer, query[0], key[0], query.shape[-1] ** -0.5 if scale is None else scale, token <= last[:, None])
