"""One gate run: load the model once, measure every window, hand back trials by format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sgl_hq.gate.errors import GateError
from sgl_hq.gate.figures import Trial
from sgl_hq.gate.measure import measure_window, window_cost
from sgl_hq.gate.windows import Window
from sgl_hq.page_format import PAGE_TOKENS
from sgl_hq.prefix_codec import PrefixCodec

_UNSUPPORTED = "the gate measures models whose layers all attend to the whole context with plain softmax attention"


@dataclass(frozen=True)
class GateModel:
    """A model in float32, ready to be measured."""

    model: Any
    tokenizer: Any


def load_model(name: str, device: str = "cpu", revision: str | None = None) -> GateModel:
    """name: a folder or a hub name. Raises GateError when there is no such model or the gate cannot measure its kind."""
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=torch.float32)
        model = model.eval().to(device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GateError(f"cannot load a model from {name!r}: give a folder with a checkpoint or a hub name ({reason})") from error
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "layer_types", None) is None else None
    if kinds != {"full_attention"} or window or getattr(config, "attn_logit_softcapping", None):
        raise GateError(f"{type(model).__name__} does otherwise: {_UNSUPPORTED}")
    return GateModel(model, tokenizer)


def check_sizes(prefixes: Sequence[int], steps: int) -> None:
    """Raises GateError for sizes that no page can have."""
    wrong = [n for n in prefixes if n <= 0 or n % PAGE_TOKENS]
    if wrong or not prefixes or len(set(prefixes)) != len(prefixes):
        raise GateError(
            f"--prefix {','.join(map(str, prefixes))}: give different positive multiples of {PAGE_TOKENS}, for example 512,1024"
        )
    if steps < 1:
        raise GateError(f"--steps {steps}: give at least 1")


def measure(
    loaded: GateModel,
    windows: Sequence[Window],
    prefixes: Sequence[int],
    steps: int,
    codecs: Sequence[PrefixCodec],
    on_window: Callable[[str], None] = lambda name: None,
    advance: Callable[[int], None] = lambda cost: None,
) -> dict[str, tuple[Trial, ...]]:
    """Trials by codec name, in the order of windows and prefixes. Raises GateError before the first forward pass where
    a text or the model's context is too short.

    on_window: called as each window begins. advance: called with costs that add up to `total_cost`.
    """
    check_sizes(prefixes, steps)
    tokens = max(prefixes) + steps + 1  # the last step's next token is only compared with
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens - 1 > context:
        raise GateError(f"the model's context is {context} tokens, prefix and steps need {tokens - 1}: give a shorter --prefix")
    texts = [(window.name, window.token_ids(loaded.tokenizer, tokens)) for window in windows]
    trials: dict[str, list[Trial]] = {codec.name: [] for codec in codecs}
    for name, ids in texts:
        on_window(name)
        for codec_name, found in measure_window(loaded.model, name, ids, prefixes, steps, codecs, advance).items():
            trials[codec_name] += found
    return {name: tuple(found) for name, found in trials.items()}


def total_cost(windows: int, prefixes: int, codecs: int) -> int:
    return windows * window_cost(prefixes, codecs)
