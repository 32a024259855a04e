"""The longest prompt: the server's statement is tried, and what it neither answers nor refuses is not waited for."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from sgl_hq.launch.bench_facts import BenchError
from sgl_hq.launch.load_ab import capacity
from sgl_hq.launch.load_ab.capacity import ask, max_context_tokens

STATED = 4025


def server(**changed):
    info = {"max_req_input_len": STATED + 1, "max_total_num_tokens": 2 * STATED}
    facts = {"server_info": lambda: info, "flush_cache": lambda: None, "log_text": lambda: ""}
    return SimpleNamespace(**facts | changed)


@pytest.mark.parametrize("answered, found", [(STATED, STATED), (STATED - 70, STATED - 128)])
def test_the_longest_that_is_answered_below_the_first_that_is_refused(monkeypatch, answered, found):
    asked = []

    def fake(_, tokens):
        asked.append(tokens)
        return 400 if tokens > STATED else 200 if tokens <= answered else None

    monkeypatch.setattr(capacity, "ask", fake)
    assert max_context_tokens(server()) == found and asked[:2] == [STATED + 1, STATED]


def test_of_two_tiers_the_dense_one_bounds_what_is_not_cached(monkeypatch):
    monkeypatch.setattr(capacity, "ask", lambda _, tokens: 200 if tokens <= STATED else 400)
    info = {"max_req_input_len": 3 * STATED, "max_total_num_tokens": STATED + 1}
    assert max_context_tokens(server(server_info=lambda: info)) == STATED


@pytest.mark.parametrize("statuses, message", [({True: 200}, "answers one more with status 200"), ({True: 400, False: None}, "does not answer")])
def test_a_statement_that_is_not_kept_is_refused(monkeypatch, statuses, message):
    monkeypatch.setattr(capacity, "ask", lambda _, tokens: statuses[tokens > STATED])
    with pytest.raises(BenchError, match=message):
        max_context_tokens(server())


PREFILL = "Prefill batch, #new-seq: 1, #new-token: 8, #cached-token: 0"


def test_a_request_that_is_never_placed_is_called_back(monkeypatch):
    aborted, calls = threading.Event(), []

    def call(_, method, path, body=None):
        calls.append((path, body and body["rid"]))
        if path == "/generate":
            assert aborted.wait(10)
        elif path == "/abort_request":
            aborted.set()
        return 200

    monkeypatch.setattr(capacity, "_call", call)
    monkeypatch.setattr(capacity, "ROUND_S", 0.05)
    assert ask(server(), 8) is None
    assert [path for path, _ in calls] == ["/generate", *["/server_info"] * capacity.ROUNDS, "/abort_request"]
    assert calls[0][1] == calls[-1][1]


def test_a_batch_that_takes_long_is_waited_for(monkeypatch):
    """The scheduler does not answer /server_info while it runs one, and logs it then."""
    log, ended = [""], threading.Event()

    def call(_, method, path, body=None):
        assert path != "/abort_request"
        if path == "/generate":
            assert ended.wait(10)
        else:
            threading.Event().wait(0.5)
            log[0] = PREFILL
            ended.set()
        return 200

    monkeypatch.setattr(capacity, "_call", call)
    monkeypatch.setattr(capacity, "ROUND_S", 0.01)
    assert ask(server(log_text=lambda: log[0]), 8) == 200
