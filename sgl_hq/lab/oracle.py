"""Dense arm and selected arms of one text, teacher-forced.

    prefill    tokens [0, context)                  one dense forward, K and V kept as bfloat16, as a server keeps them
    dense      tokens [context, context + steps)    the reference; its logits must be finite at every step
    selected   the same tokens once for every selector, each with its own K and V of the chunk

Everything computes in float32. One causal forward over the chunk is the same arithmetic as decoding its tokens one by
one, since every step selects for itself (a test compares them).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sgl_hq.gate.bounds import TOP_K
from sgl_hq.gate.measure import PREFILL_COST
from sgl_hq.gate.metrics import compare_logits
from sgl_hq.hq_cache import HQCache
from sgl_hq.lab.errors import LabError
from sgl_hq.lab.oracle_rows import StepRow
from sgl_hq.lab.selected_attention import SelectedAttention
from sgl_hq.lab.selectors import Selector


@torch.inference_mode()
def measure_text(
    model: Any,
    text: str,
    ids: Sequence[int],
    context: int,
    selectors: Sequence[Selector],
    advance: Callable[[int], None] = lambda cost: None,
) -> list[StepRow]:
    """Rows of every selector, in order.

    Args:
        model: a causal language model of transformers in float32 and eval mode.
        ids: context, steps, and the last step's next token.
        advance: called with the cost of what has just been done; `text_cost` in total.
    Raises:
        LabError: the dense reference is not finite at some step, or the model's attention cannot be changed.
    """
    tokens = torch.tensor([ids], device=model.device)
    chunk, following = tokens[:, context:-1], tokens[0, context + 1 :]
    prefill = HQCache("bf16")  # never packed: a cache of bfloat16 K and V
    model(input_ids=tokens[:, :context], past_key_values=prefill, logits_to_keep=1)
    advance(PREFILL_COST)
    attention = SelectedAttention(model)
    with attention.watching(selectors):
        dense = model(input_ids=chunk, past_key_values=copy.deepcopy(prefill)).logits[0]
    wrong = (~dense.isfinite().all(-1)).nonzero().flatten().tolist()
    if wrong:
        raise LabError(f"the dense reference is not finite at step {wrong[0]} of text {text}: check the checkpoint")
    advance(len(selectors))
    rows = []
    for selector in selectors:
        with attention.selecting(selector):
            selected = model(input_ids=chunk, past_key_values=copy.deepcopy(prefill)).logits[0]
        found = compare_logits(dense, selected, following)
        figures = zip(
            found.mse, found.topk_common.double() / TOP_K, found.argmax_equal, found.argmax_judged, attention.relative_l2(selector), found.kl,
            attention.kept_fraction(), attention.read_fraction(), strict=True,
        )  # fmt: skip
        rows += [
            StepRow(selector.name, text, step, context + step, *(value.item() for value in values))
            for step, values in enumerate(figures)
        ]
        advance(1)
    return rows


def text_cost(selectors: int) -> int:
    """What `advance` is called with in total for one text; the dense arm computes every layer with every selector."""
    return PREFILL_COST + 2 * selectors
