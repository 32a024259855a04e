"""A lossy server under 200 random requests with aborts, timeouts and flushes: every page is accounted for afterwards.

SGLang checks its own books while busy and when idle (a leak ends the server); ours are checked from /server_info. The
dense tier is small: most prefixes are longer than what is free in it, so that eviction and packing race for pages.
"""

from __future__ import annotations

import asyncio
import random

import httpx
import openai
import pytest

from sgl_hq.launch.server_process import ServerProcess

REQUESTS, CONCURRENCY = 200, 8
ENVIRONMENT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_DEBUG_MEMORY_POOL": "1"}
ARGS = ["--hq-format", "int8", "--hq-allow-ungated", "--max-total-tokens", "6144", "--grammar-backend", "none", "--chunked-prefill-size", "512"]


@pytest.fixture(scope="module")
def server(model):
    with ServerProcess(str(model), ARGS, env=ENVIRONMENT, stop_grace_s=0, start_timeout_s=780) as server:
        yield server


def _prompt(rng: random.Random) -> list[int]:
    """A prefix shared by its family, 64 to 1,920 tokens, and an own tail."""
    family = rng.randrange(5)
    base = [1000 + 97 * family + (i * (family + 3)) % 5000 for i in range(1920)]
    return base[: rng.choice([64, 200, 640, 1024, 1920])] + [rng.randrange(10, 40000) for _ in range(rng.randrange(1, 90))]


async def _one(client: openai.AsyncOpenAI, http: httpx.AsyncClient, rng: random.Random, outcome: list[str]):
    kind = rng.choices(["read", "disconnect", "timeout", "abort_all", "flush"], [70, 14, 10, 3, 3])[0]
    if kind == "flush":  # refused while requests run, done when none does: both are fine
        await http.post("/flush_cache")
        return outcome.append(kind)
    if kind == "abort_all":
        await http.post("/abort_request", json={"abort_all": True})
        return outcome.append(kind)
    try:
        stream = await client.completions.create(
            model="m", prompt=_prompt(rng), max_tokens=rng.randrange(1, 40), temperature=0, stream=True,
            timeout=rng.uniform(0.05, 1.5) if kind == "timeout" else 120,
        )
        tokens = 0
        async for _chunk in stream:
            tokens += 1
            if kind == "disconnect" and tokens >= rng.randrange(1, 8):
                await stream.close()
                break
        outcome.append(kind)
    except (openai.APITimeoutError, httpx.TimeoutException):  # the latter from inside a stream
        outcome.append("timed out")
    except openai.APIError as error:  # an aborted stream ends with an error event
        assert "abort" in str(error).lower(), error
        outcome.append("aborted")


async def _storm(url: str) -> list[str]:
    rng, outcome = random.Random(7), []
    gate = asyncio.Semaphore(CONCURRENCY)
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client, httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def guarded(seed):
            async with gate:
                await _one(client, http, random.Random(seed), outcome)

        await asyncio.gather(*(guarded(rng.random()) for _ in range(REQUESTS)))
    return outcome


def _probe(url: str) -> str:
    """A fixed request, alone on the server: its tokens must not depend on what happened before."""
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    answer = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "Name the capital of France."}], max_tokens=24, temperature=0
    )
    return answer.choices[0].message.content


def _settle(server: ServerProcess) -> dict:
    """The `hq` block once no request is live."""
    import time

    for _ in range(300):
        state = server.server_info()["internal_states"][0]["hq"]
        if state["live_requests"] == 0:
            return state
        time.sleep(0.1)
    raise AssertionError(f"{state['live_requests']} requests are still live 30 s after the last client left")


def test_every_page_is_accounted_for_after_a_storm(server):
    before = _probe(server.url)
    assert "Paris" in before
    outcome = asyncio.run(_storm(server.url))
    assert len(outcome) == REQUESTS and outcome.count("read") > REQUESTS / 3, outcome

    state = _settle(server)
    dense, packed, counters = state["dense"], state["packed"], state["counters"]
    assert counters["pages_packed"] > 50 and counters["pages_dropped"] > 0, "the storm did not reach the packed tier's limits"
    assert packed["pages_free"] + packed["pages_used"] == packed["pages_total"]
    assert dense["tokens_total"] - dense["tokens_free"] == dense["bytes_used"] // dense["bytes_per_token"]

    server.flush_cache()
    empty = _settle(server)
    assert empty["dense"]["tokens_free"] == empty["dense"]["tokens_total"], "dense tokens leaked"
    assert empty["packed"]["pages_used"] == 0 and empty["packed"]["sinks_free"] == empty["packed"]["sinks_total"], "packed pages leaked"

    assert _probe(server.url) == before, "the same request alone gives other tokens than before the storm"
    log = server.log_text()
    assert "leak" not in log.lower() and "Traceback" not in log, log[-3000:]
