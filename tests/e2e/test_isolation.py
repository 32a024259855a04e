"""Tenants of one packing server, told apart by `extra_key` and `cache_salt`: none reads a page of another, in either tier.

Stale KV of the server is NaN in both tiers (`checked_server.py`): a page of another tenant would show at once.
"""

from __future__ import annotations

import checked_server
import httpx
import openai
import pytest
from soak import books, idle_state, state
from strict_server import STRICT_CHECKS

from sgl_hq.launch.server_process import ServerProcess
from sgl_hq.page_format import PAGE_TOKENS

ARGS = ["--hq-format", "hq7", "--max-total-tokens", "2048", "--hq-packed-fraction", "0.3", "--grammar-backend", "none", "--enable-cache-report",
        "--random-seed", "0"]  # fmt: skip
PAGES = 4
PREFIX = [300 + 7 * i % 2000 for i in range(PAGES * PAGE_TOKENS)]


@pytest.fixture(scope="module")
def server(model):
    server = ServerProcess(str(model), ARGS, env=STRICT_CHECKS, start_timeout_s=900, stop_grace_s=0)
    server.argv[1:3] = [checked_server.__file__]
    with server:
        yield server


def _generate(server, extra_key: str | None, tokens: list[int]) -> tuple[int, list]:
    """(cached tokens, log-probabilities and tokens of the answer)."""
    sampling = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
    answer = httpx.post(server.url + "/generate", json=body | ({} if extra_key is None else {"extra_key": extra_key}), timeout=600)
    answer.raise_for_status()
    meta = answer.json()["meta_info"]
    return meta["cached_tokens"], [entry[:2] for entry in meta["output_token_logprobs"]]


def _salted(server, salt: str) -> int:
    """Cached tokens of the OpenAI request with this cache salt."""
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    answer = client.completions.create(model="m", prompt=PREFIX + [9], max_tokens=1, temperature=0, extra_body={"cache_salt": salt})
    return answer.usage.prompt_tokens_details.cached_tokens if answer.usage.prompt_tokens_details else 0


def test_the_same_prompt_of_two_tenants_is_cached_and_packed_for_each(server):
    server.flush_cache()
    answers, prompt = {}, PREFIX + [198]  # a new line: the next token leads by 3 nats, no rounding chooses another
    for number, tenant in enumerate(("a", "b", None), start=1):
        cached, cold = _generate(server, tenant, prompt)
        assert cached == 0, f"{tenant} was given pages of another tenant"
        for _ in range(2):  # the prefix becomes packed while the second one of all runs
            cached, answers[tenant] = _generate(server, tenant, prompt)
            assert cached == len(PREFIX)
        assert state(server)["packed"]["pages_used"] == number * PAGES, "a tenant's second use packs pages of its own"
        assert cold[0][1] == answers[tenant][0][1]
    assert answers["a"] == answers["b"] == answers[None], "equal prompts over equal packed pages are equal to the bit"


def test_cache_salts_of_the_openai_interface_are_tenants(server):
    server.flush_cache()
    assert [_salted(server, salt) for salt in ("x", "y", "x", "y")] == [0, 0, len(PREFIX), len(PREFIX)]
    assert state(server)["packed"]["pages_used"] == 2 * PAGES


def test_pages_freed_by_one_tenant_show_the_next_one_nothing(server):
    """Tenants in turn, more than both tiers hold: pages go round. Each answers as on an empty server."""
    server.flush_cache()
    prompts = {f"tenant {i}": [400 + (11 + i) * j % 3000 for j in range(PAGES * PAGE_TOKENS)] + [7] for i in range(8)}
    expected = {}
    for tenant, prompt in prompts.items():
        server.flush_cache()
        _generate(server, tenant, prompt)
        expected[tenant] = _generate(server, tenant, prompt)
    server.flush_cache()
    dropped = state(server)["counters"]["pages_dropped"]
    for tenant, prompt in prompts.items():
        assert _generate(server, tenant, prompt)[0] == 0
        assert _generate(server, tenant, prompt) == expected[tenant]
    assert state(server)["counters"]["pages_dropped"] > dropped, "the packed tier was never full"
    idle_state(server)
    assert not books(server)
    log = server.log_text()
    assert "leak" not in log.lower() and "Traceback" not in log
