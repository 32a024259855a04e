"""Requests longer than the dense tier, on a real server: the packed part of a chat takes nothing of it."""

from __future__ import annotations

import pydoc_data.topics

import numpy as np
import pytest
import torch
from prompt_tail import SAME, TAIL_TOKENS, distance, logprobs, send
from strict_server import strict_server

from sgl_hq.page_format import PAGE_TOKENS

# 2,560 tokens' bytes: 448 dense tokens, and packed pages for 2,304.
ARGS = ["--hq-format", "lossless", "--hq-pack", "insert", "--hq-packed-fraction", "0.8", "--max-total-tokens", "2560", "--grammar-backend", "none"]
TURN, TURNS = 256, 7


@pytest.fixture(scope="module")
def server(model):
    with strict_server(model, ARGS) as server:
        yield server


@pytest.fixture(scope="module")
def tokens(model) -> list[int]:
    """A chat of TURNS turns."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(str(model))(pydoc_data.topics.topics["class"] + pydoc_data.topics.topics["specialnames"])["input_ids"]
    # The last turn repeats the first one: who reads that far back knows every token of it.
    return text[: TURN * (TURNS - 1)] + text[:TURN]


def _tail_of_transformers(model, tokens: list[int]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16)(torch.tensor([tokens])).logits[0]
    tail = logits[-TAIL_TOKENS:-1].float().log_softmax(-1)
    return tail.gather(1, torch.tensor(tokens[-TAIL_TOKENS + 1 :])[:, None])[:, 0].numpy()


def _dense_tokens(server) -> int:
    return server.server_info()["max_total_num_tokens"]


def test_a_chat_grows_beyond_the_dense_tier(server, tokens, model):
    assert _dense_tokens(server) < 2 * TURN + 64
    for turn in range(1, TURNS + 1):
        prompt = tokens[: TURN * turn]
        answer = send(server, prompt)
        got = logprobs(answer)
    assert answer.json()["meta_info"]["cached_tokens"] == TURN * (TURNS - 1)
    assert distance(got, _tail_of_transformers(model, prompt)) < SAME
    assert distance(got, _tail_of_transformers(model, prompt[-TURN:])) > 4 * SAME, "the measure would miss a lost prefix"


def test_what_can_never_be_placed_is_refused_and_the_next_is_served(server, tokens):
    refused = send(server, tokens[::-1][:700])
    assert refused.status_code == 400 and "are not packed, and the dense tier holds" in refused.text
    assert len(logprobs(send(server, tokens[: TURN * 2]))) == TAIL_TOKENS - 1


def test_an_answer_is_cut_to_the_dense_tier(server, tokens):
    made = send(server, tokens[::-1][:300], new_tokens=5000).json()["meta_info"]
    # Five pages of prompt, one that SGLang keeps back, and admission asks for less than all.
    assert made["completion_tokens"] == _dense_tokens(server) - 6 * PAGE_TOKENS - 1 and made["finish_reason"]["type"] == "length"
