"""Real processes: a vanilla server that answers and is gone afterwards, one that cannot start, a thread held and let go."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

from sgl_hq.launch.demo_model import ensure_demo_model
from sgl_hq.launch.port_claim import HOST
from sgl_hq.launch.server_log import failure_reason
from sgl_hq.launch.server_process import ServerFailed, ServerProcess
from sgl_hq.launch.thread_freeze import freeze, thaw
from sgl_hq.launch.waves import run_wave
from sgl_hq.launch.workload import ChatRequest

ARGS = "--page-size 64 --max-total-tokens 4096 --grammar-backend none --enable-metrics --enable-cache-report".split()
ARGS += "--decode-log-interval 1 --random-seed 0".split()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(str(ensure_demo_model()), ARGS, log_path=log) as running:
        yield running


def processes_with(word: str) -> list[int]:
    found = [p for p in psutil.process_iter(["cmdline"]) if word in (p.info["cmdline"] or [])]
    return [p.pid for p in found if p.status() != psutil.STATUS_ZOMBIE]


def test_a_chat_through_the_openai_client(server):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=httpx.Client(trust_env=False))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=server.model, messages=messages, max_tokens=16, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


def test_a_server_whose_port_another_one_answers_is_not_taken_for_it(server, tmp_path):
    other = ServerProcess(server.model, ["--not-an-option"], port=server.port, log_path=tmp_path / "log")
    with pytest.raises(ServerFailed, match="another process has taken it|ended with exit code"), other:
        pass
    assert server.server_info()["max_total_num_tokens"] == 4096


def test_a_port_that_somebody_else_took_meanwhile_ends_the_start(tmp_path):
    """As another server's torch.distributed store did: it takes connections and never answers one."""
    model = str(tmp_path / "model")
    server = ServerProcess(model, log_path=tmp_path / "log")
    with socket.create_server((HOST, server.port)), pytest.raises(ServerFailed, match="another process has taken it; start again"), server:
        pass
    assert processes_with(model) == []


def test_vanilla_reports_its_sizes_and_no_plugin(server):
    info = server.server_info()
    assert info["max_total_num_tokens"] == 4096
    assert "hq" not in info["internal_states"][0]
    values = {s.name: s.value for s in server.metrics()}
    assert values["sglang:max_total_num_tokens"] == 4096


def test_a_wave_is_one_batch_and_the_next_one_finds_its_prefixes_cached(server):
    system = " ".join(f"Rule {i}: answer politely." for i in range(40))

    def wave(words):
        messages = [[{"role": "system", "content": system}, {"role": "user", "content": word}] for word in words]
        return [ChatRequest(0, user, m) for user, m in enumerate(messages)]

    async def both():
        http = httpx.AsyncClient(trust_env=False, timeout=300)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http) as client:
            server.flush_cache()
            return [await run_wave(server, client, wave(words), 4) for words in ("AB", "CDEF")]

    first, second = asyncio.run(both())
    assert [(a.prefix, a.user) for a in second.answers] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert all(a.completion_tokens == len(a.logprobs) == len(a.tokens) == 4 for a in first.answers + second.answers)
    assert all(a.cached_tokens >= 64 for a in second.answers)
    prefills = [batch for batch in second.batches if batch[0] == "prefill"]
    assert [new_requests for _, new_requests, _, _ in prefills] == [4]
    assert all(0 < a.first_token_s <= a.last_token_s <= second.duration_s for a in second.answers)


def test_a_failed_start_says_why_and_leaves_nothing(tmp_path):
    model = str(tmp_path / "no-such-model")
    with pytest.raises(ServerFailed, match=r"ended with exit code 1: .*no-such-model"):
        with ServerProcess(model, log_path=tmp_path / "log"):
            pass
    assert processes_with(model) == []


def test_an_exception_inside_with_ends_a_server_that_is_still_starting(tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(seconds):
        if processes_with(model):
            raise Interrupted

    model = str(tmp_path / "model")
    with pytest.raises(Interrupted):
        with ServerProcess(model, log_path=tmp_path / "log", on_wait=interrupt):
            pass
    assert processes_with(model) == []


def test_a_server_that_never_answers_is_given_up_and_ended(tmp_path):
    model = str(tmp_path / "model")
    with pytest.raises(ServerFailed, match="did not answer /health within 0 s"):
        with ServerProcess(model, log_path=tmp_path / "log", start_timeout_s=0):
            pass
    assert processes_with(model) == []


def test_every_process_is_gone_after_stop_and_the_port_is_free_even_from_a_pause(server):
    server.pause_scheduler()
    family = psutil.Process(server._process.pid).children(recursive=True)
    assert len(family) >= 2  # scheduler and detokenizer
    server.stop()
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", server.port))
    server.stop()  # a second time does nothing


def test_freeze_holds_one_thread_and_not_its_neighbour():
    code = "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start(); "
    child = subprocess.Popen([sys.executable, "-c", code + "print('up', flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"up\n"
        neighbours = [t.id for t in psutil.Process(child.pid).threads() if t.id != child.pid]
        freeze(child.pid)
        assert thread_state(child.pid, child.pid) == "t"  # stopped by a tracer
        assert [thread_state(child.pid, t) for t in neighbours] == ["S"]
        thaw(child.pid)
        while thread_state(child.pid, child.pid) == "t":
            time.sleep(0.001)
    finally:
        child.kill()
        child.wait()


def thread_state(process_id: int, thread_id: int) -> str:
    stat = Path(f"/proc/{process_id}/task/{thread_id}/stat").read_text()
    return stat.rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    "log, reason",
    [
        ("", "it wrote nothing"),
        ("one\n\ntwo\nthree\n", "two | three"),
        ("Traceback (most recent call last):\n  File x\nValueError: bad page size\nlast words\n", "ValueError: bad page size"),
        ("usage: ...\nlaunch_server.py: error: unrecognized arguments: --x\n", "launch_server.py: error: unrecognized arguments: --x"),
        ("[2026-01-01 00:00:00] sgl_hq.config.HQConfigError: no\n", "[2026-01-01 00:00:00] sgl_hq.config.HQConfigError: no"),
    ],
)
def test_the_reason_is_the_last_error_of_the_log(log, reason):
    assert failure_reason(log) == reason
