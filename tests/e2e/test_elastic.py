"""One server whose memory moves between the tiers: a dense request longer than a fixed split allows, more packed than it would hold, again."""

from __future__ import annotations

import pydoc_data.topics

import httpx
import numpy as np
import pytest
import torch

from sgl_hq.launch.server_process import ServerProcess
from sgl_hq.page_format import PAGE_TOKENS, get_format
from sgl_hq.pool.sizing import KVShape, tiers_of_dense

BUDGET_TOKENS = 2560
ARGS = ["--hq-format", "lossless", "--hq-packed-fraction", "auto", "--max-total-tokens", str(BUDGET_TOKENS), "--grammar-backend", "none"]
ARGS += ["--hq-audit", "1", "--hq-audit-raise"]
ENVIRONMENT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_DEBUG_MEMORY_POOL": "1"}
LONG, PREFIX, PREFIXES, OWN, TAIL = 2048, 256, 8, 40, 24
# Mean |difference| of log-probabilities: another order of bfloat16 sums stays near 0.02, a foreign or missing prefix is beyond 1.
SAME = 0.15


@pytest.fixture(scope="module")
def server(model):
    with ServerProcess(str(model), ARGS, env=ENVIRONMENT, stop_grace_s=0, start_timeout_s=780) as server:
        yield server
        log = server.log_text()
        assert "leak" not in log.lower() and "Traceback" not in log, log[-3000:]


@pytest.fixture(scope="module")
def text(model) -> list[int]:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(str(model))("".join(pydoc_data.topics.topics.values()))["input_ids"]
    assert len(tokens) > LONG + PREFIXES * (PREFIX + 2 * OWN)
    return tokens


def _hq(server) -> dict:
    return server.server_info()["internal_states"][0]["hq"]


def _tail(server, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of the last tokens of a prompt."""
    body = {
        "input_ids": tokens, "return_logprob": True, "logprob_start_len": len(tokens) - TAIL,
        "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
    }  # fmt: skip
    answer = httpx.post(server.url + "/generate", json=body, timeout=600)
    answer.raise_for_status()
    return np.array([entry[0] for entry in answer.json()["meta_info"]["input_token_logprobs"][1:]])


class _Reference:
    """Transformers on the same prompts."""

    def __init__(self, model):
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16)
        self.config = self._model.config

    def tail(self, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            logprobs = self._model(torch.tensor([tokens])).logits[0, -TAIL:-1].float().log_softmax(-1)
        return logprobs.gather(1, torch.tensor(tokens[-TAIL + 1 :])[:, None])[:, 0].numpy()


def test_memory_follows_the_load_and_every_answer_is_right(server, model, text):
    reference = _Reference(model)
    config = reference.config
    long_prompt, rest = text[:LONG], text[LONG:]
    prefixes = [rest[i * (PREFIX + 2 * OWN) :][: PREFIX + 2 * OWN] for i in range(PREFIXES)]
    start = _hq(server)
    memory = start["dense"]["bytes_allocated"] + start["packed"]["bytes_allocated"]
    assert start["packed"]["dense_pages_lent"] == 0 and start["dense"]["tokens_total"] > LONG

    # A split that leaves room for the long prompt leaves less to packed pages than all prefixes together.
    shape = KVShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.head_dim)
    layouts, dense = [get_format("lossless").layout(config.head_dim)] * config.num_hidden_layers, LONG + 2 * PAGE_TOKENS
    fixed = tiers_of_dense(dense, 1 - dense / BUDGET_TOKENS, layouts, shape).packed_pages
    packed = PREFIXES * PREFIX // PAGE_TOKENS
    assert fixed < packed / 2

    first = _tail(server, long_prompt)
    assert np.abs(first - reference.tail(long_prompt)).mean() < SAME

    for prefix in prefixes:
        for user in range(2):
            prompt = prefix[:PREFIX] + prefix[PREFIX + user * OWN :][:OWN]
            assert np.abs(_tail(server, prompt) - reference.tail(prompt)).mean() < SAME
    now = _hq(server)
    assert now["packed"]["pages_used"] >= packed and now["packed"]["dense_pages_lent"] > 0, now
    assert now["dense"]["bytes_allocated"] + now["packed"]["bytes_allocated"] == memory
    for prefix in prefixes:  # all of them are there, and right
        prompt = prefix[:PREFIX] + prefix[PREFIX : PREFIX + 2 * OWN]
        assert np.abs(_tail(server, prompt) - reference.tail(prompt)).mean() < SAME

    again = text[LONG // 2 : LONG + LONG // 2]  # a long prompt that nothing is cached of, so the memory has to come back
    assert np.abs(_tail(server, again) - reference.tail(again)).mean() < SAME
    end = _hq(server)
    assert end["counters"]["slabs_reclaimed"] > 0 and end["packed"]["dense_pages_lent"] < now["packed"]["dense_pages_lent"]
    assert end["dense"]["bytes_allocated"] + end["packed"]["bytes_allocated"] == memory
    assert not any(end["audit"]["findings"].values()) and end["audit"]["audits"] > 3 * PREFIXES
    assert np.abs(first - reference.tail(again)).mean() > 4 * SAME, "the measure would miss a foreign prompt"

    assert httpx.post(server.url + "/flush_cache", timeout=60).status_code == 200
    flushed = _hq(server)
    assert flushed["packed"]["dense_pages_lent"] == 0 and flushed["dense"]["tokens_free"] == flushed["dense"]["tokens_total"]
