"""Layer-local error: each layer's attention output with the packed prefix, computed with the *dense* arm's queries.

In the packed arm the error of one layer changes the next layer's input. Comparing layer by layer needs the same query
and the same suffix on both sides, so the probe keeps both from the dense arm's chunk of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sgl_hq.gate.attention_hook import attention_through, median_over_layers, project_output, relative_error
from sgl_hq.gate.errors import GateError

_NAME = "sgl_hq_gate"


@dataclass(frozen=True)
class _DenseLayer:
    """query `[1, Hq, S, D]`; K and V of the chunk itself `[1, Hkv, S, D]`; projected: `[S, hidden]`, without bias."""

    query: torch.Tensor
    k_suffix: torch.Tensor
    v_suffix: torch.Tensor
    projected: torch.Tensor


class AttentionProbe:
    """Runs SDPA for `model` and looks on. Used as a context manager; the model's own attention is restored on exit."""

    def __init__(self, model) -> None:
        self._model = model
        self._dense: dict[int, _DenseLayer] = {}
        self._errors: dict[int, torch.Tensor] = {}
        self._look = None

    def __enter__(self) -> AttentionProbe:
        self._hook = attention_through(self._model, _NAME, self._attend)
        self._hook.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.__exit__(*error)

    @contextmanager
    def dense_arm(self) -> Iterator[None]:
        """Forward passes inside are the dense arm's chunk of steps."""
        self._dense.clear()
        self._look = self._keep
        try:
            yield
        finally:
            self._look = None
        if len(self._dense) != self._model.config.get_text_config().num_hidden_layers:
            raise GateError(
                f"only {len(self._dense)} layers of this model use transformers' AttentionInterface: the gate cannot measure it"
            )

    @contextmanager
    def packed_arm(self) -> Iterator[None]:
        """Forward passes inside are a packed arm's chunk for the same prefix."""
        self._errors.clear()
        self._look = self._compare
        try:
            yield
        finally:
            self._look = None

    def relative_l2(self) -> torch.Tensor:
        """`[S] float32`: median over the layers of |o' - o| / |o|, after the output projection; infinite for NaN."""
        return median_over_layers(tuple(self._errors.values()))

    def _attend(self, module, query, key, value, attention_mask, **options):
        attended = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        if self._look is not None:
            self._look(module, query, key, value, attention_mask, options, attended[0])
        return attended

    def _keep(self, module, query, key, value, attention_mask, options, output) -> None:
        steps = query.shape[2]
        suffix = (side[:, :, -steps:].clone() for side in (key, value))
        self._dense[module.layer_idx] = _DenseLayer(query, *suffix, project_output(module, output))

    def _compare(self, module, query, key, value, attention_mask, options, output) -> None:
        dense = self._dense[module.layer_idx]
        k, v = (
            torch.cat([side[:, :, : -query.shape[2]], suffix], 2)
            for side, suffix in ((key, dense.k_suffix), (value, dense.v_suffix))
        )
        local, _ = sdpa_attention_forward(module, dense.query, k, v, attention_mask, **options)
        self._errors[module.layer_idx] = relative_error(project_output(module, local), dense.projected)
