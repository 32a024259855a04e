"""Requests longer than the dense tier, on a real server: the packed part of a chat takes nothing of it."""

from __future__ import annotations

import pydoc_data.topics

import httpx
import numpy as np
import pytest
import torch

from sgl_hq.launch.server_process import ServerProcess
from sgl_hq.page_format import PAGE_TOKENS

# 2,560 tokens' bytes: 448 dense tokens, and packed pages for 2,304.
ARGS = ["--hq-format", "lossless", "--hq-pack", "insert", "--hq-packed-fraction", "0.8", "--max-total-tokens", "2560", "--grammar-backend", "none"]
ENVIRONMENT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_DEBUG_MEMORY_POOL": "1"}
TURN, TURNS, TAIL = 256, 7, 24
# Mean |difference| of log-probabilities: another order of bfloat16 sums stays near 0.02, a foreign or missing prefix is beyond 1.
SAME = 0.15


@pytest.fixture(scope="module")
def server(model):
    with ServerProcess(str(model), ARGS, env=ENVIRONMENT, stop_grace_s=0, start_timeout_s=780) as server:
        yield server
        log = server.log_text()
        assert "leak" not in log.lower() and "Traceback" not in log, log[-3000:]


@pytest.fixture(scope="module")
def tokens(model) -> list[int]:
    """A chat of TURNS turns."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(str(model))(pydoc_data.topics.topics["class"] + pydoc_data.topics.topics["specialnames"])["input_ids"]
    # The last turn repeats the first one: who reads that far back knows every token of it.
    return text[: TURN * (TURNS - 1)] + text[:TURN]


def _ask(server, tokens: list[int], new_tokens: int = 1) -> httpx.Response:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": tokens, "return_logprob": True, "logprob_start_len": len(tokens) - TAIL, "sampling_params": sampling}
    return httpx.post(server.url + "/generate", json=body, timeout=600)


def _tail(answer: httpx.Response) -> np.ndarray:
    answer.raise_for_status()
    return np.array([entry[0] for entry in answer.json()["meta_info"]["input_token_logprobs"][1:]])


def _tail_of_transformers(model, tokens: list[int]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16)(torch.tensor([tokens])).logits[0]
    logprobs = logits[-TAIL:-1].float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(tokens[-TAIL + 1 :])[:, None])[:, 0].numpy()


def _dense_tokens(server) -> int:
    return server.server_info()["max_total_num_tokens"]


def test_a_chat_grows_beyond_the_dense_tier(server, tokens, model):
    assert _dense_tokens(server) < 2 * TURN + 64
    for turn in range(1, TURNS + 1):
        prompt = tokens[: TURN * turn]
        answer = _ask(server, prompt)
        got = _tail(answer)
    assert answer.json()["meta_info"]["cached_tokens"] == TURN * (TURNS - 1)
    assert np.abs(got - _tail_of_transformers(model, prompt)).mean() < SAME
    assert np.abs(got - _tail_of_transformers(model, prompt[-TURN:])).mean() > 4 * SAME, "the measure would miss a lost prefix"


def test_what_can_never_be_placed_is_refused_and_the_next_is_served(server, tokens):
    refused = _ask(server, tokens[::-1][:700])
    assert refused.status_code == 400 and "are not packed, and the dense tier holds" in refused.text
    assert len(_tail(_ask(server, tokens[: TURN * 2]))) == TAIL - 1


def test_an_answer_is_cut_to_the_dense_tier(server, tokens):
    made = _ask(server, tokens[::-1][:300], new_tokens=5000).json()["meta_info"]
    # Five pages of prompt, one that SGLang keeps back, and admission asks for less than all.
    assert made["completion_tokens"] == _dense_tokens(server) - 6 * PAGE_TOKENS - 1 and made["finish_reason"]["type"] == "length"
