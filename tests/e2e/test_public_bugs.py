"""Bugs that other servers have had with shared KV pages, asked of ours: one lossy server, retraction forced every third step.

Each test measures the log-probabilities of prompt tokens behind a shared prefix, which no earlier token of the answer can
move, and compares them with those of the first, cold request. `int8` changes them by hundredths; pages of another prompt,
of a freed slot or without their scales change them by whole nats. SGLang checks its own books in every step.
"""

from __future__ import annotations

import asyncio
import pydoc_data.topics
import random

import httpx
import numpy as np
import prompt_tail
import pytest
from prompt_tail import SAME, TAIL_TOKENS
from strict_server import strict_server

from sgl_hq.page_format import PAGE_TOKENS

RETRACTION = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "3"}
ARGS = ["--hq-format", "int8", "--hq-allow-ungated", "--max-total-tokens", "2560", "--chunked-prefill-size", "128", "--grammar-backend", "none"]
TOPICS = ("assignment", "class", "try", "import", "function", "with", "for", "operator-summary")


@pytest.fixture(scope="module")
def server(model):
    with strict_server(model, ARGS, RETRACTION) as server:
        yield server


@pytest.fixture(scope="module")
def texts(model) -> list[list[int]]:
    """Token ids of texts that begin differently."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    return [tokenizer(pydoc_data.topics.topics[name])["input_ids"] for name in TOPICS]


def _ask(server, tokens: list[int]) -> np.ndarray:
    return prompt_tail.logprobs(prompt_tail.send(server, tokens))


def _same(got: np.ndarray, cold: np.ndarray) -> bool:
    return prompt_tail.distance(got, cold) < SAME


def _state(server) -> dict:
    return server.server_info()["internal_states"][0]["hq"]


def test_the_measure_tells_a_foreign_prefix_from_the_own_one(server, texts):
    """What the tests below rest on."""
    server.flush_cache()
    tail = texts[0][256 : 256 + TAIL_TOKENS]
    own, foreign = _ask(server, texts[0][:256] + tail), _ask(server, texts[1][:256] + tail)
    assert prompt_tail.distance(own, foreign) > 4 * SAME


def test_vllm_50702_quantised_pages_in_a_full_pool(server, texts):
    """vLLM #50702: a quantised KV cache, prefix caching and a pool that is 100 % used corrupted documents in the middle."""
    server.flush_cache()
    documents = [tokens[start : start + 320 + TAIL_TOKENS] for start in (0, 320) for tokens in texts]
    cold = [_ask(server, document) for document in documents[:2]]
    for document, expected in zip(documents, cold):
        assert _same(_ask(server, document), expected)  # packed now
    for document in documents[2:]:
        _ask(server, document)
    state = _state(server)
    assert state["counters"]["pages_demoted"] > 0, "the dense tier was never short"
    assert state["dense"]["tokens_free"] + state["packed"]["pages_free"] * PAGE_TOKENS < 640, "the pool is not full"
    for _ in range(2):
        for i in (0, 1):
            assert _same(_ask(server, documents[i]), cold[i])


@pytest.mark.parametrize("shared", [PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1])
def test_sglang_22819_a_prefix_of_exactly_one_page(server, texts, shared):
    """SGLang #22819: wrong answers whenever the cached prefix was as long as a page, ten times of ten."""
    server.flush_cache()
    tails = [tokens[500 : 500 + TAIL_TOKENS] for tokens in texts[:3]]
    cold = []
    for tail in tails:
        server.flush_cache()
        cold.append(_ask(server, texts[3][:shared] + tail))
    server.flush_cache()
    for _ in range(3):
        for tail, expected in zip(tails, cold):
            assert _same(_ask(server, texts[3][:shared] + tail), expected)
    # Where less than a page is shared, the first page of each prompt is its own, and used again when that is asked again.
    assert _state(server)["packed"]["pages_used"] == (1 if shared >= PAGE_TOKENS else len(tails))


async def _post(client: httpx.AsyncClient, body: dict) -> httpx.Response:
    return await client.post("/generate", json=body)


async def _abandon(client: httpx.AsyncClient, body: dict, after_s: float) -> None:
    """Close the connection `after_s` after the request was sent."""
    task = asyncio.create_task(_post(client, body))
    await asyncio.sleep(after_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_sglang_23392_cancel_and_retry_beside_unrelated_requests(server, texts):
    """SGLang #23392: a shared prefix, a client that cancels after 15 or 19 ms and retries: unrelated requests were corrupted."""
    server.flush_cache()
    victims = [tokens[: 200 + TAIL_TOKENS] for tokens in texts[:3]]
    cold = [_ask(server, tokens) for tokens in victims]
    shared = texts[4][:256]

    async def storm() -> list[httpx.Response]:
        answers = []
        async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
            for round_ in range(4):
                reading = [asyncio.create_task(_post(client, prompt_tail.body(tokens, new_tokens=6))) for tokens in victims]
                for after_s in (0.015, 0.019, 0.15):
                    request = prompt_tail.body(shared + texts[5][round_ * 30 : round_ * 30 + 60], new_tokens=4)
                    await _abandon(client, request, after_s)
                    await _post(client, request)
                answers += await asyncio.gather(*reading)
        return answers

    for i, answer in enumerate(asyncio.run(storm())):
        assert _same(prompt_tail.logprobs(answer), cold[i % len(victims)])


def test_sglang_38319_38355_retraction_behind_chunked_inserts(server, texts):
    """SGLang #38319, #38355: a chunk of a prompt was inserted, then its request retracted, and pages that the tree still held
    were freed; the prompts behind that prefix stayed wrong until the cache was flushed."""
    server.flush_cache()
    prompts = [tokens[: 360 + TAIL_TOKENS] for tokens in texts[:5]]  # three chunks each
    cold = [_ask(server, tokens) for tokens in prompts]
    server.flush_cache()

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
            order = list(range(len(prompts))) * 2
            random.Random(5).shuffle(order)
            answers = await asyncio.gather(*(_post(client, prompt_tail.body(prompts[i], new_tokens=10)) for i in order))
            return [answers[order.index(i)] for i in range(len(prompts))]

    for answer, expected in zip(asyncio.run(all_at_once()), cold):
        assert _same(prompt_tail.logprobs(answer), expected)
    assert "Retract requests" in server.log_text() or "retract" in server.log_text().lower(), "nothing was retracted"
    for tokens, expected in zip(prompts, cold):
        assert _same(_ask(server, tokens), expected)
    server.flush_cache()
    state = _state(server)
    assert state["dense"]["tokens_free"] == state["dense"]["tokens_total"] and state["packed"]["pages_used"] == 0
