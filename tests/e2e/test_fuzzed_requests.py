"""Requests that nobody should send, and the same ones that anybody may: generated from the served OpenAPI, malformed, too long.

One packing server with small pools that checks its books whenever a request ends and whose stale KV is NaN (`checked_server.py`).
Every answer must have the status of success or of a client's mistake, or that of a server without us, which is asked the same then.
SGLang 0.5.17 answers 500 to sampling parameters of other types, lists of lists as `rid`, `echo` of a stream without log-probabilities,
and token ids that no tokenizer takes.

What ends SGLang's scheduler, with or without us, `patches/bad_requests.py` refuses. Kept out (`_within_reason`) are more or fewer than the
possible top log-probabilities, and integers beyond 32 bits, which become tensors.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import checked_server
import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from soak import books, idle_state, probe, state
from strict_server import STRICT_CHECKS

import sgl_hq
from sgl_hq.launch.server_process import ServerProcess

CONTEXT, BUDGET = 2048, 3840  # 28 of the budget's 60 pages are dense: less than a context
MOST_NEW_TOKENS = 16  # a body without a limit would else be answered for minutes, up to the context
ENVIRONMENT = STRICT_CHECKS | {"SGLANG_MAX_NEW_TOKENS_LIMIT": str(MOST_NEW_TOKENS)}
ARGS = ["--max-total-tokens", str(BUDGET), "--context-length", str(CONTEXT), "--chunked-prefill-size", "512", "--grammar-backend", "none",
        "--random-seed", "0"]  # fmt: skip
PACKING = ["--hq-format", "hq7", "--hq-packed-fraction", "0.5"]
GENERATING = {
    "/generate": {"input_ids": [5, 6, 7]},
    "/v1/completions": {"model": "m", "prompt": "One"},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "One"}]},
}
READING = [("/v1/tokenize", "POST"), ("/v1/detokenize", "POST"), ("/health", "GET"), ("/model_info", "GET"), ("/server_info", "GET"),
           ("/v1/loads", "GET"), ("/v1/models", "GET"), ("/v1/models/{model}", "GET")]  # fmt: skip
# Fields that the scheduler and the cache see. The others belong to features that are refused or off: media, adapters, sessions, PD.
FIELDS = {"text", "input_ids", "sampling_params", "rid", "extra_key", "cache_salt", "stream", "return_logprob", "logprob_start_len",
          "top_logprobs_num", "return_text_in_logprobs", "model", "prompt", "messages", "echo", "max_tokens", "max_completion_tokens",
          "max_new_tokens", "min_new_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "ignore_eos",
          "frequency_penalty", "presence_penalty", "repetition_penalty", "logprobs", "top_logprobs", "seed", "user", "stream_options",
          "skip_special_tokens", "no_stop_trim", "continue_final_message", "role", "content"}  # fmt: skip
# Generated integers have no limit, and each choice is a request.
LIMITS = {"max_new_tokens": (-2, 4), "max_tokens": (-2, 4), "max_completion_tokens": (-2, 4), "n": (-2, 2), "logprobs": (0, 5),
          "top_logprobs": (0, 5), "top_logprobs_num": (0, 5), "logprob_start_len": (-1, 2**31), "input_ids": (-5, 60000), "prompt": (-5, 60000)}  # fmt: skip
INT32 = (-(2**31), 2**31 - 1)
EXAMPLES = 4
PREFIX = [200 + i % 3000 for i in range(CONTEXT + 64)]

few = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)


class Served(NamedTuple):
    """Our server, and a vanilla one that is asked what ours answers with a failure."""

    ours: ServerProcess
    vanilla: Vanilla

    def send(self, method: str, path: str, content: bytes | None, kind: str | None = "application/json") -> httpx.Response:
        headers = {} if kind is None else {"Content-Type": kind}
        answer = httpx.request(method, self.ours.url + path, content=content, headers=headers, timeout=600)
        if answer.status_code >= 500:
            without = self.vanilla.send(method, path, content, headers)
            asked = f"{method} {path} {str(content)[:300]}"
            assert without == answer.status_code, f"{answer.status_code} {answer.text[:300]!r} for {asked}, {without} without us"
        return answer


class Vanilla:
    """Started when it is first asked. Its answers are statuses."""

    def __init__(self, model: Path):
        self._server = ServerProcess(str(model), ARGS, env=ENVIRONMENT, start_timeout_s=900, stop_grace_s=0)
        self._lock, self._started = Lock(), False
        self.asked = 0

    def send(self, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> int:
        with self._lock:
            if not self._started:
                self._server.start()
                self._started = True
            self.asked += 1
        return httpx.request(method, self._server.url + path, content=content, headers=headers, timeout=600).status_code

    def stop(self) -> None:
        if self._started:
            self._server.check_alive()
            self._server.stop()


@pytest.fixture(scope="module")
def served(model):
    ours, vanilla = ServerProcess(str(model), [*ARGS, *PACKING], env=ENVIRONMENT, start_timeout_s=900, stop_grace_s=0), Vanilla(model)
    ours.argv[1:3] = [checked_server.__file__]
    with ours:
        try:
            yield Served(ours, vanilla)
        finally:
            vanilla.stop()
            print(f"{vanilla.asked} failures were asked of a server without us\n{ours.log_text()[-3000:]}")


@pytest.fixture(scope="module")
def server(served):
    return served.ours


@pytest.fixture(scope="module")
def before(server):
    """The probe's answers before anything else was sent."""
    return probe(server)


@pytest.fixture(scope="module")
def openapi(server):
    return schemathesis.openapi.from_dict(httpx.get(server.url + "/openapi.json", timeout=60).json())


def _post(served: Served, path: str, body: object) -> httpx.Response:
    return served.send("POST", path, json.dumps(body).encode())


def _post_all(served: Served, requests: list[tuple[str, object]]) -> None:
    """All at once, a few at a time: they meet in batches."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda request: _post(served, *request), requests))
    served.ours.check_alive()


def _within_reason(value: object, limits: tuple[int, int] = INT32) -> object:
    """The same value with fields of other features left out and integers put within their limits."""
    if isinstance(value, dict):
        return {key: _within_reason(inner, LIMITS.get(key, INT32)) for key, inner in value.items() if key in FIELDS}
    if isinstance(value, list):
        return [_within_reason(inner, limits) for inner in value]
    return min(max(value, limits[0]), limits[1]) if type(value) is int else value


# ---- generated from the schema ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_generated_bodies_of_generating_requests(served, before, openapi, path, mode):
    """Each body as it is, and again with a prompt where that has none, so that the rest of it is looked at."""
    bodies = []

    @given(case=openapi[path]["POST"].as_strategy(generation_mode=mode))
    @few
    def every_case(case):
        body = _within_reason(case.body)
        if isinstance(body, dict):
            limits = {"sampling_params": {"max_new_tokens": 2}} if path == "/generate" else {"max_tokens": 2}
            bodies.extend([(path, body), (path, limits | body | GENERATING[path])])
        elif isinstance(body, bytes):
            served.send("POST", path, body)

    every_case()
    _post_all(served, bodies)


@pytest.mark.parametrize("path, method", READING)
def test_generated_requests_that_only_read(served, before, openapi, path, method):
    @given(case=openapi[path][method].as_strategy())
    @few
    def every_case(case):
        asked = requests.Request(**case.as_transport_kwargs(base_url=served.ours.url)).prepare()
        content = asked.body.encode() if isinstance(asked.body, str) else asked.body
        served.send(method, asked.path_url, content, asked.headers.get("Content-Type"))

    every_case()
    served.ours.check_alive()


# ---- malformed -------------------------------------------------------------------------------------------------------

NO_JSON = [b"", b"{", b"null", b"[]", b'"text"', b"17", b"\xff\xfe\x00", b'{"input_ids": [1', b'{"a": NaN}', b"[" * 2000, b'{"text": "\\ud800"}']


@pytest.mark.parametrize("path", GENERATING)
def test_bodies_that_are_no_request(served, before, path):
    for raw in NO_JSON:
        served.send("POST", path, raw)
    valid = json.dumps(GENERATING[path] | {"max_tokens": 1}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        served.send("POST", path, valid, kind)
    for method in ("GET", "DELETE", "PATCH"):
        assert served.send(method, path, valid).status_code == 405
    served.ours.check_alive()


WRONG = [-1, 0, 1.5, -1e308, "many", "", True, [], {}, [[]]]
SAMPLING = ["max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "repetition_penalty", "stop",
            "stop_token_ids", "ignore_eos", "json_schema", "regex"]  # fmt: skip
TOP_LEVEL = ["input_ids", "text", "return_logprob", "logprob_start_len", "stream", "rid", "extra_key"]
OPENAI = ["max_tokens", "temperature", "top_p", "echo", "stop", "seed", "cache_salt", "extra_key", "suffix", "prompt", "messages"]


def test_wrong_sampling_parameters(served, before):
    for field in SAMPLING:
        bodies = [{"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2} | {field: value}} for value in WRONG]
        _post_all(served, [("/generate", body) for body in bodies])


def test_wrong_fields(served, before):
    for field in TOP_LEVEL:
        bodies = [{"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2}} | {field: value} for value in WRONG]
        _post_all(served, [("/generate", body) for body in bodies])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_wrong_fields_of_the_openai_interface(served, before, path):
    for field in OPENAI:
        _post_all(served, [(path, GENERATING[path] | {"max_tokens": 2} | {field: value}) for value in WRONG])


TOKEN_IDS = [[], [-1], [49152], [[5], []], ["a"], [1.5], [None], [49151], [[5], [6, 7]], [[5], "a"], {"0": 5}, 5, "5"]


def test_token_ids(served, before):
    _post_all(served, [("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 2}}) for ids in TOKEN_IDS])


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_lengths_around_every_limit(served, before):
    """One token, a page, most of the dense tier, all of it and the context, with one token less and more: served whole or refused by the client's
    fault. Twice, so that what was cached of them is packed and read."""
    dense = state(served.ours)["dense"]["tokens_total"]
    assert dense < CONTEXT, "no prompt of the context's length is longer than the dense tier"
    whole = {}
    for _ in range(2):
        for length in (1, 63, 64, 65, dense - 192, *range(dense - 2, dense + 2), CONTEXT - 1, CONTEXT, CONTEXT + 1):
            body = {"input_ids": PREFIX[:length], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
            answer = _post(served, "/generate", body)
            if answer.status_code == 200:
                whole[length] = answer.json()["meta_info"]["completion_tokens"]
    assert max(whole, default=0) > dense, f"only {sorted(whole)} were served"  # of the longest, the beginning is packed by then
    assert set(whole.values()) == {1}


@pytest.mark.parametrize("new_tokens", [CONTEXT, 10**9, 2**31, 2**63, 2**64])
def test_more_new_tokens_than_the_context_holds(served, before, new_tokens):
    """Refused, or ended at the server's own limit."""
    prompt = PREFIX[: state(served.ours)["dense"]["tokens_total"] - 20]
    answer = _post(served, "/generate", {"input_ids": prompt, "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}})
    assert answer.status_code == 400 or answer.json()["meta_info"]["completion_tokens"] == MOST_NEW_TOKENS


def test_nothing_was_lost_and_the_probe_answers_as_before(server, before):
    idle_state(server, seconds=300)
    assert not books(server)
    assert probe(server) == before
    log = server.log_text()
    assert "leak" not in log.lower() and "Scheduler hit an exception" not in log
    ours = [line for line in log.splitlines() if line.lstrip().startswith(f'File "{Path(sgl_hq.__file__).parent}/')]
    assert not ours, f"a traceback goes through our code: {ours}"
