"""What an SGLang server's log says: why it failed, and which batches its scheduler built."""

from __future__ import annotations

import re
import statistics

# "ValueError: ...", "some.module.SomeError: ...", "launch_server.py: error: ...", with or without a "[time] " before it.
_ERROR = re.compile(r"^(\[[^\]]*\] )?([\w.]*(Error|Exception|Refused|Failed)\b: |[\w.-]+: error: )")
_PREFILL = re.compile(r"Prefill batch, #new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+)")
_DECODE = re.compile(r"Decode batch, #running-req: (\d+)")
_THROUGHPUT = re.compile(r"(Decode|Prefill) batch, (?:.*?#running-req: (\d+))?(?:.*?gen throughput \(token/s\): ([0-9.]+))?")


def failure_reason(log: str, lines: int = 2) -> str:
    """The last error lines of a log, joined by ' | '; without any, its last lines."""
    meaningful = [line.strip() for line in log.splitlines() if line.strip()]
    if not meaningful:
        return "it wrote nothing"
    errors = [line for line in meaningful if _ERROR.match(line)]
    unique = list(dict.fromkeys(errors or meaningful))
    return " | ".join(line[:400] for line in unique[-lines:])


def logged_batches(log: str) -> tuple[tuple, ...]:
    """The batches of the scheduler, in order (decode batches are all logged only with --decode-log-interval 1).

    A batch is ("prefill", new requests, new tokens, cached tokens) or ("decode", running requests).
    """
    batches: list[tuple] = []
    for line in log.splitlines():
        if found := _PREFILL.search(line):
            batches.append(("prefill", *map(int, found.groups())))
        elif found := _DECODE.search(line):
            batches.append(("decode", int(found[1])))
    return tuple(batches)


def full_batch_step_ms(log: str, requests: int) -> float | None:
    """Median milliseconds of a decode step while all `requests` run, as the scheduler itself counts them; None if it never says so.

    A decode line tells the throughput since the line before it: only windows between two decode lines that both have the
    full batch, with no prefill in between, count. A client's time per token also holds the steps in which other requests
    still arrive, and these differ from arm to arm.
    """
    steps, full = [], False
    for kind, running, throughput in _THROUGHPUT.findall(log):
        now = kind == "Decode" and int(running or 0) == requests
        if now and full and float(throughput or 0) > 0:
            steps.append(requests / float(throughput) * 1e3)
        full = now
    return statistics.median(steps) if steps else None


def mean_running(log: str) -> float | None:
    """Mean number of requests in a decode step, over the steps that the scheduler logged; None without one."""
    running = [batch[1] for batch in logged_batches(log) if batch[0] == "decode"]
    return statistics.mean(running) if running else None
