"""Every layer's attention output as a function of its cached K and V alone, for gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sgl_hq.gate.attention_hook import attention_through, project_output

_NAME = "sgl_hq_calibration"


class AttentionRecorder:
    """Runs SDPA for `model` and keeps what is needed to run each layer's attention again. A context manager."""

    def __init__(self, model) -> None:
        self._hook = attention_through(model, _NAME, self._attend)
        self._again: dict[int, Callable[[], torch.Tensor]] = {}

    def __enter__(self) -> AttentionRecorder:
        self._hook.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.__exit__(*error)

    def local_outputs(self) -> list[torch.Tensor]:
        """Of every layer, after its output projection, `[S, hidden]`: its queries and the chunk's own K and V are
        constants, only the prefix's K and V are not."""
        return [self._again[layer]() for layer in sorted(self._again)]

    def _attend(self, module, query, key, value, attention_mask, **options):
        def again() -> torch.Tensor:
            k, v = (_constant_suffix(side, query.shape[2]) for side in (key, value))
            output, _ = sdpa_attention_forward(module, query.detach(), k, v, attention_mask, **options)
            return project_output(module, output)

        self._again[module.layer_idx] = again
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _constant_suffix(side: torch.Tensor, steps: int) -> torch.Tensor:
    """`[1, H, T, D]`, the last `steps` tokens cut off from the graph: they depend on the layers before."""
    return torch.cat([side[:, :, :-steps], side[:, :, -steps:].detach()], 2)
