"""Does a server's counter of KV bytes used count what is in use? Found out before every arm, because labels can lie.

Emptied: nothing. One request of known length: that many tokens' bytes. Emptied again: nothing. A counter of allocated bytes
fails the first step, one that stands still or counts another width the second, one that only grows the third.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

from sgl_hq.launch.kv_accounts import gauge, read_peak
from sgl_hq.launch.load_ab.refusals import Incomparable
from sgl_hq.launch.server_process import ServerFailed, ServerProcess
from sgl_hq.page_format import PAGE_TOKENS

PROBE_TOKENS = 640  # ten pages of 64
SETTLE_S = 10.0  # for the scheduler to fall idle and publish its gauges, normally milliseconds
SPARE_TOKENS = 4  # with pages of one token: the tokens of the last `empty_cache`, and one that the overlapped next step has taken
FIRST_TOKEN_ID = 1000
PACKS_AT_ONCE = "insert"  # --hq-pack, sgl_hq/cache/pack_policy.py


def probe(
    read_used: Callable[[], float],
    send: Callable[[int], None],
    flush: Callable[[], None],
    token_bytes: float,
    page_tokens: int,
    settle_s: float = SETTLE_S,
) -> None:
    """Raises Incomparable unless the counter follows a request of known length to within a page, or `SPARE_TOKENS`.

    Args:
        read_used: KV bytes in use, as the figures of the arm will be read.
        send: one unshared request of so many prompt tokens and one output token; returns when it is answered.
        flush: empties the prefix cache.
        token_bytes: bytes of a token of such a request once it has ended, in the tier where it then lies.
        page_tokens: the server's page size.
        settle_s: how long the counter may lag behind.
    """
    tolerance = max(page_tokens, SPARE_TOKENS) * token_bytes
    for expected_tokens, when in ((0, "in an empty cache"), (PROBE_TOKENS, "after one request"), (0, "in the cache emptied again")):
        empty_cache(flush, send)
        if expected_tokens:
            send(expected_tokens)
            send(1)  # packed pages take the place of the dense ones some batches later, or when the server falls idle
        _expect(read_used, expected_tokens * token_bytes, tolerance, when, settle_s)


def empty_cache(flush: Callable[[], None], send: Callable[[int], None]) -> None:
    """Flush, and make the gauges show it.

    SGLang publishes its gauges with batches and every 30 s when idle, not on a flush: until then they show what was resident
    before. A request of one token is such a batch; it leaves nothing behind but, with pages of one token, itself.
    """
    flush()
    send(1)


def probe_server(server: ServerProcess, dense_token_bytes: float, hq: dict[str, Any] | None) -> None:
    """`probe` of a running server, read as the sampler reads it. hq: its block of /server_info, None without our plugin."""
    token_bytes = dense_token_bytes
    if hq is not None and hq["pack"] == PACKS_AT_ONCE and hq["packed"]["pages_total"]:
        packed = hq["packed"]
        token_bytes = (PROBE_TOKENS // PAGE_TOKENS * packed["page_bytes"] + packed["sink_bytes"]) / PROBE_TOKENS
    probe(
        read_used=lambda: read_peak(server.metrics(), dense_token_bytes).bytes_used,
        send=lambda tokens: send_one(server, tokens),
        flush=server.flush_cache,
        token_bytes=token_bytes,
        page_tokens=int(gauge(server.metrics(), "sglang:page_size")),
    )


def send_one(server: ServerProcess, tokens: int) -> None:
    """One request of `tokens` prompt tokens and one output token, waited for; raises ServerFailed."""
    prompt = list(range(FIRST_TOKEN_ID, FIRST_TOKEN_ID + tokens))
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}}
    try:
        httpx.post(f"{server.url}/generate", json=body, timeout=60.0, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        server.check_alive()
        raise ServerFailed(f"The server did not answer a request of {tokens} tokens ({error}); log: {server.log_path}") from error


def _expect(read_used: Callable[[], float], expected: float, tolerance: float, when: str, settle_s: float) -> None:
    deadline = time.monotonic() + settle_s
    while abs((used := read_used()) - expected) > tolerance:
        if time.monotonic() > deadline:
            raise Incomparable(
                f"The counter of KV bytes used shows {used:,.0f} {when} where {expected:,.0f} are in use: "
                "it counts something else, such as allocated bytes; mend the counter before measuring this arm"
            )
        time.sleep(0.05)
