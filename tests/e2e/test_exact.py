"""Mode `exact` against vanilla, token by token.

Requests go one at a time, so both servers build the same batches; what batching alone does to vanilla is shown by
`sgl-hq ab --arms vanilla,vanilla --concurrency N`.
"""

from __future__ import annotations

import httpx
import numpy as np
import pytest

from sgl_hq.launch.server_process import ServerProcess

CONTEXT_TOKENS = 4096
ARGS = ["--page-size", "64", "--max-total-tokens", "12288", "--grammar-backend", "none", "--random-seed", "0", "--chunked-prefill-size", "2048"]


def _text_tokens(model) -> list[int]:
    import pydoc_data.topics
    from transformers import AutoTokenizer

    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return AutoTokenizer.from_pretrained(str(model))(text)["input_ids"][:CONTEXT_TOKENS]


def _logprobs(server: ServerProcess, tokens: list[int], start: int, new_tokens: int = 8) -> np.ndarray:
    """Log-probability of every prompt token from `start` on and of every generated one, as SGLang reports them."""
    body = {
        "input_ids": tokens, "return_logprob": True, "logprob_start_len": start,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
    }
    answer = httpx.post(server.url + "/generate", json=body, timeout=600)
    answer.raise_for_status()
    meta = answer.json()["meta_info"]
    values = [entry[0] for entry in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]]
    return np.array(values, dtype=np.float64)


def _measure(server: ServerProcess, tokens: list[int]) -> list[np.ndarray]:
    half = CONTEXT_TOKENS // 2
    return [
        _logprobs(server, tokens, 0),  # the whole context, cold, two chunks
        _logprobs(server, tokens[:half] + tokens[:300], half + 1),  # shares half of it
        _logprobs(server, tokens, CONTEXT_TOKENS - 20),  # the same again, from the cache
    ]


@pytest.fixture(scope="module")
def arms(model):
    tokens = _text_tokens(model)
    assert len(tokens) == CONTEXT_TOKENS
    results, states = {}, {}
    for arm, options in [("vanilla", []), ("exact", ["--hq-format", "exact"])]:
        with ServerProcess(str(model), ARGS + options, stop_grace_s=0) as server:
            results[arm] = _measure(server, tokens)
            states[arm] = server.server_info()["internal_states"][0].get("hq")
    return results, states


def test_the_plugin_is_active_in_one_arm_and_absent_in_the_other(arms):
    _, states = arms
    assert states["vanilla"] is None
    assert states["exact"]["active"] and states["exact"]["format"] == "exact"
    assert states["exact"]["packed"]["bytes_allocated"] == 0 and states["exact"]["counters"]["pages_packed"] == 0


def test_every_log_probability_is_bit_identical(arms):
    results, _ = arms
    lengths = [len(r) for r in results["vanilla"]]
    assert lengths[0] >= CONTEXT_TOKENS - 1 and all(lengths), lengths
    for vanilla, exact in zip(results["vanilla"], results["exact"]):
        assert len(vanilla) == len(exact) and np.isfinite(vanilla).all()
        assert np.abs(vanilla - exact).max() == 0.0
    assert len(set(results["vanilla"][0])) > 3000, "log-probabilities that hardly differ among each other prove nothing"
