"""The longest prompt that a server answers. What it states is tried first: SGLang takes more than its scheduler can ever place.

A prompt of nearly the whole pool passes the check of its length and then waits for ever, because pages are counted whole and one
is kept in reserve; the last lengths below the stated one are tried page by page.
"""

from __future__ import annotations

import uuid
from concurrent.futures import Future, ThreadPoolExecutor, wait

import httpx

from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.load_ab.counter_probe import FIRST_TOKEN_ID
from sgl_hq.launch.server_log import logged_batches
from sgl_hq.launch.server_process import ServerFailed, ServerProcess
from sgl_hq.page_format import PAGE_TOKENS

ANSWER_TIMEOUT_S = 600.0
ROUNDS, ROUND_S = 6, 0.5  # a batch is logged when the next one has begun: two rounds would do
PAGES_TRIED = 4
_IDS = 1000  # token ids used in turn, all of them words of any vocabulary


def max_context_tokens(server: ServerProcess) -> int:
    """Prompt tokens of the longest request that is answered though nothing of it is cached, to within a page; with one more than stated it is refused (4xx).

    Raises BenchError where the server neither refuses a longer prompt nor answers one of `PAGES_TRIED` pages less than it states.
    Leaves the prompt in the cache.
    """
    info = server.server_info()
    # The first length that it refuses, less one. With packed pages it takes longer requests, but only what of them is packed may be more
    # than the dense tier, `max_total_num_tokens`.
    stated = min(int(info["max_req_input_len"]), int(info["max_total_num_tokens"])) - 1
    status = ask(server, stated + 1)
    if status is None or not httpx.codes.is_client_error(status):
        raise BenchError(f"the server states that it takes at most {stated} tokens and answers one more with status {status}")
    for pages in range(PAGES_TRIED + 1):
        tokens = stated - pages * PAGE_TOKENS
        if tokens > 0 and ask(server, tokens) == httpx.codes.OK:
            return tokens
    raise BenchError(f"the server states that it takes {stated} tokens and does not answer {tokens}: see its log")


def ask(server: ServerProcess, tokens: int) -> int | None:
    """HTTP status of a request of so many prompt tokens and one output token; None when the scheduler cannot place it.

    Nothing else may run on the server.
    """
    server.flush_cache()
    prompt = [FIRST_TOKEN_ID + index % _IDS for index in range(tokens)]
    name, logged = uuid.uuid4().hex, len(server.log_text())
    params = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(1) as sending:
        answer = sending.submit(_call, server, "POST", "/generate", {"rid": name, "input_ids": prompt, "sampling_params": params})
        if not _is_placed(server, answer, logged):
            _call(server, "POST", "/abort_request", {"rid": name})
            answer.result()
            return None
        return answer.result()


def _is_placed(server: ServerProcess, answer: Future[int], logged: int) -> bool:
    """Does the scheduler run batches for the request? Not a matter of seconds: a batch may take many on a slow machine.

    The scheduler answers /server_info between two batches. When it has done so several times and no batch was logged since
    position `logged`, there was none.
    """
    for _ in range(ROUNDS):
        if wait([answer], timeout=ROUND_S).done:
            return True
        _call(server, "GET", "/server_info")
        if logged_batches(server.log_text()[logged:]):
            return True
    return False


def _call(server: ServerProcess, method: str, path: str, body: dict[str, object] | None = None) -> int:
    try:
        return httpx.request(method, f"{server.url}{path}", json=body, timeout=ANSWER_TIMEOUT_S, trust_env=False).status_code
    except httpx.HTTPError as error:
        server.check_alive()
        raise ServerFailed(f"The server did not answer {path} ({error}); log: {server.log_path}") from error
