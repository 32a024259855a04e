"""Requests that SGLang 0.5.17 lets through to its scheduler, and that end it there for everybody. Found by `tests/e2e/test_fuzzed_requests.py`."""

from __future__ import annotations

import os

from sgl_hq.config import ENV_OF_FIELD


def check(manager, obj, input_ids):
    """BEFORE TokenizerManager._validate_one_request, which answers a ValueError with status 400.

    input_ids: of one request; None where embeddings are sent.
    """
    if not os.environ.get(ENV_OF_FIELD["format"]):
        return  # vanilla: this runs in the process of the HTTP server, where hooks are set before the options are read
    if input_ids is not None:
        size = manager.model_config.vocab_size
        if not len(input_ids):
            raise ValueError("the prompt has no tokens: send at least one")  # a prefill of nothing
        # Out of range is an IndexError in the embedding; `_validate_input_ids_in_vocab` has no caller. Long prompts pass here, so no loop.
        if not (set(map(type, input_ids)) <= {int, bool} and min(input_ids) >= 0 and max(input_ids) < size):
            strange = next(token for token in input_ids if not (isinstance(token, int) and 0 <= token < size))
            raise ValueError(f"{strange!r} is no token id: they are whole numbers from 0 to {size - 1}")
    new_tokens = obj.sampling_params.get("max_new_tokens") if isinstance(obj.sampling_params, dict) else None
    if new_tokens is not None and not isinstance(new_tokens, int):  # TypeError in Req.output_ids_through_stop
        raise ValueError(f"max_new_tokens is {new_tokens!r}: send a whole number")
