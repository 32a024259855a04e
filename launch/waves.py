"""Send one wave of chat requests so that every arm builds the same batches, and keep what came back.

Comparing two servers bit for bit needs equal batches in both: the batch a request happens to share, or where its prefill is
cut into chunks, alone changes floating point sums. So the load is not timed arrivals but closed-loop waves. The scheduler's
thread is held (`thread_freeze.py`), the C requests of the wave go out in a fixed order through the real OpenAI client, about
20 ms apart so that the HTTP process keeps that order, until the HTTP process's own counter shows that all C arrived; then the
scheduler goes on and finds the whole wave in its queue. Time to first token counts from that moment, in every arm.

Whether the batches were equal is not taken on trust: the scheduler logs every batch, `Wave.batches` keeps what it
logged, and the comparison counts the waves in which two arms differ.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from sgl_hq.launch.server_log import logged_batches
from sgl_hq.launch.server_process import ServerFailed, ServerProcess
from sgl_hq.launch.workload import ChatRequest

CHAT_PATH = "/v1/chat/completions"
SEND_GAP_S = 0.02
ARRIVAL_TIMEOUT_S = 60.0
# After the HTTP counter has seen the last request it is still being tokenized: a few milliseconds, given ten times over.
SETTLE_S = 0.1
TOP_LOGPROBS = 2


@dataclass(frozen=True)
class Answer:
    """What the server sent for one request. `logprobs[i]` belongs to `tokens[i]`; times are seconds since the scheduler went on."""

    prefix: int
    user: int
    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[str, float], ...], ...]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_s: float
    last_token_s: float


@dataclass(frozen=True)
class Wave:
    """The answers of one wave in sending order, its duration, and the batches the scheduler logged (`server_log.py`)."""

    answers: tuple[Answer, ...]
    duration_s: float
    batches: tuple[tuple, ...]


async def run_wave(
    server: ServerProcess, client: AsyncOpenAI, requests: Sequence[ChatRequest], output_tokens: int
) -> Wave:
    """Send `requests` as one wave and wait for all answers; raises ServerFailed when the server does not take them."""
    log_from = len(server.log_text())
    wanted = _arrived(server) + len(requests)
    clock = _Clock()
    server.pause_scheduler()
    try:
        tasks = []
        for request in requests:
            tasks.append(asyncio.create_task(_stream(client, server.model, request, output_tokens, clock)))
            await asyncio.sleep(SEND_GAP_S)
        deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
        while await asyncio.to_thread(_arrived, server) < wanted:
            if time.monotonic() > deadline:
                raise ServerFailed(f"Not all {len(requests)} requests reached the server in {ARRIVAL_TIMEOUT_S:.0f} s")
            await asyncio.sleep(SEND_GAP_S)
        await asyncio.sleep(SETTLE_S)
    finally:
        clock.start()
        server.resume_scheduler()
    answers = await asyncio.gather(*tasks)
    duration_s = clock.elapsed_s()
    # The scheduler answers this one, so it has left the wave's last batch and its log lines are written.
    await asyncio.to_thread(server.server_info)
    return Wave(tuple(answers), duration_s, logged_batches(server.log_text()[log_from:]))


class _Clock:
    """Seconds since the scheduler went on."""

    def start(self) -> None:
        self._started = time.perf_counter()

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started


async def _stream(
    client: AsyncOpenAI, model: str, request: ChatRequest, output_tokens: int, clock: _Clock
) -> Answer:
    stream = await client.chat.completions.create(
        model=model,
        messages=request.messages,
        max_tokens=output_tokens,
        temperature=0.0,
        logprobs=True,
        top_logprobs=TOP_LOGPROBS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},  # equal lengths, so that batches stay equal to the end
    )
    text, entries, usage, times = [], [], None, []
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text.append(choice.delta.content or "")
            if choice.logprobs is not None and choice.logprobs.content:
                times.append(clock.elapsed_s())
                entries.extend(choice.logprobs.content)
    if usage is None or len(entries) != usage.completion_tokens:
        raise ServerFailed(f"An answer has {len(entries)} log-probabilities and this usage: {usage}")
    return Answer(
        prefix=request.prefix,
        user=request.user,
        text="".join(text),
        tokens=tuple(entry.token for entry in entries),
        logprobs=tuple(entry.logprob for entry in entries),
        top_logprobs=tuple(tuple((t.token, t.logprob) for t in entry.top_logprobs) for entry in entries),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=_cached_tokens(usage),
        completion_tokens=usage.completion_tokens,
        first_token_s=times[0],
        last_token_s=times[-1],
    )


def _cached_tokens(usage: Any) -> int:
    details = usage.prompt_tokens_details
    return (details.cached_tokens or 0) if details is not None else 0


def _arrived(server: ServerProcess) -> int:
    """Chat requests the HTTP process has accepted so far."""
    counts = [s for s in server.metrics() if s.name == "sglang:http_requests_total"]
    return int(sum(s.value for s in counts if s.labels.get("endpoint") == CHAT_PATH))
