"""A server that is flushed, aborted, killed, started again and asked to leave, with requests in flight.

Two servers, one after the other on the same port: the first is killed, the second leaves by SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from strict_server import STRICT_CHECKS

from sgl_hq.launch.server_process import ServerProcess

ARGS = ["--hq-format", "int8", "--hq-allow-ungated", "--max-total-tokens", "8192", "--chunked-prefill-size", "128", "--grammar-backend", "none"]
PREFIX = [1000 + (7 * i) % 5000 for i in range(256)]


def _server(model, port=None) -> ServerProcess:
    return ServerProcess(str(model), ARGS, env=STRICT_CHECKS, port=port, start_timeout_s=780)


def _body(tokens: list[int], new_tokens: int, rid: str | None = None, stream: bool = False) -> dict:
    return {"input_ids": tokens, "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}, "rid": rid, "stream": stream}


def _generate(url: str, *args, **kwargs) -> dict:
    answer = httpx.post(url + "/generate", json=_body(*args, **kwargs), timeout=600)
    answer.raise_for_status()
    return answer.json()


def _packed_answer(url: str, tokens: list[int], new_tokens: int) -> list[int]:
    """Of a request that reads the prefix from packed pages: the third, since the first one's were dense and became packed while the
    second one ran, and a lossy format may choose another token where two are about as likely."""
    for _ in range(3):
        answer = _generate(url, tokens, new_tokens)["output_ids"]
    return answer


def _state(server) -> dict:
    return server.server_info()["internal_states"][0]["hq"]


def _until(server, reached, seconds=120) -> dict:
    """The `hq` block once `reached(block)`."""
    deadline = time.monotonic() + seconds
    while not reached(state := _state(server)):
        assert time.monotonic() < deadline, state
        time.sleep(0.02)
    return state


def _is_empty_after_a_flush(server) -> None:
    _until(server, lambda state: not state["live_requests"])
    server.flush_cache()
    state = _state(server)
    assert state["dense"]["tokens_free"] == state["dense"]["tokens_total"], "dense tokens leaked"
    assert state["packed"]["pages_used"] == 0, "packed pages leaked"


@pytest.fixture(scope="module")
def servers(model):
    """[server]: the test that kills it puts the next one in its place."""
    with _server(model) as first:
        held = [first]
        yield held
        held[0].stop()


def test_a_flush_under_load_is_refused_and_harms_nobody(servers):
    (server,) = servers
    tokens = 128  # so many that it still runs when a busy machine has answered what the server's state is
    alone = _packed_answer(server.url, PREFIX + [5, 6, 7], tokens)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_generate, server.url, PREFIX + [5, 6, 7], tokens)
        _until(server, lambda state: state["live_requests"] == 1)
        refused = httpx.post(server.url + "/flush_cache", timeout=60)
        assert refused.status_code == 400
        assert _state(server)["packed"]["pages_used"] == len(PREFIX) // 64, "the flush took pages that are being read"
        assert running.result()["output_ids"] == alone
    _is_empty_after_a_flush(server)


def test_an_abort_between_two_chunks_gives_every_page_back(servers):
    (server,) = servers
    expected = _packed_answer(server.url, PREFIX + [9], 16)
    long = PREFIX + [2000 + i for i in range(2600)]
    with ThreadPoolExecutor(2) as pool:
        aborted = pool.submit(_generate, server.url, long, 8, rid="long")
        state = _until(server, lambda state: state["live_requests"] == 1 and state["dense"]["tokens_total"] - state["dense"]["tokens_free"] > 512)
        httpx.post(server.url + "/abort_request", json={"rid": "long"}, timeout=60).raise_for_status()
        beside = pool.submit(_generate, server.url, PREFIX + [9], 16)
        assert aborted.result()["meta_info"]["finish_reason"]["type"] == "abort"
        assert beside.result()["output_ids"][:4] == expected[:4]
    assert state["dense"]["tokens_total"] - state["dense"]["tokens_free"] < len(long), "the prompt was complete when it was aborted"
    _is_empty_after_a_flush(server)


def test_a_disconnect_in_mid_stream_leaves_the_others_their_tokens(servers):
    (server,) = servers
    expected = _packed_answer(server.url, PREFIX + [11], 16)

    async def storm() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
            staying = [asyncio.create_task(client.post("/generate", json=_body(PREFIX + [11], 16))) for _ in range(2)]
            for lines in (1, 3):
                async with client.stream("POST", "/generate", json=_body(PREFIX + [12, lines], 64, stream=True)) as stream:
                    async for line in stream.aiter_lines():
                        lines -= line.startswith("data:")
                        if lines < 0:
                            break
            return await asyncio.gather(*staying)

    for answer in asyncio.run(storm()):
        assert answer.json()["output_ids"][:4] == expected[:4]
    _until(server, lambda state: not state["live_requests"], seconds=60)
    _is_empty_after_a_flush(server)


def test_killed_with_requests_in_flight_it_leaves_nothing_and_starts_again_on_its_port(servers, model):
    (server,) = servers
    expected = _packed_answer(server.url, PREFIX + [13], 12)
    family = psutil.Process(server._process.pid).children(recursive=True)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(_generate, server.url, PREFIX + [13], 400) for _ in range(2)]
        _until(server, lambda state: state["live_requests"] == 2)
        server._process.send_signal(signal.SIGKILL)
        for request in running:
            with pytest.raises(httpx.HTTPError):
                request.result()
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, f"{[p.name() for p in alive]} outlived the server"
    server.stop()
    servers[0] = _server(model, port=server.port)
    servers[0].start()
    assert _packed_answer(servers[0].url, PREFIX + [13], 12) == expected


def test_asked_to_leave_it_answers_what_is_in_flight_and_exits(servers):
    (server,) = servers
    expected = _packed_answer(server.url, PREFIX + [14], 40)
    family = psutil.Process(server._process.pid).children(recursive=True)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_generate, server.url, PREFIX + [14], 40)
        _until(server, lambda state: state["live_requests"] == 1)
        server._process.terminate()
        answer = running.result()
    assert answer["meta_info"]["finish_reason"]["type"] == "length" and answer["output_ids"][:4] == expected[:4]
    server._process.wait(timeout=60)
    assert not psutil.wait_procs(family, timeout=30)[1], "a child outlived the server"
    log = server.log_text()
    assert "leak" not in log.lower() and "Traceback" not in log, log[-3000:]
